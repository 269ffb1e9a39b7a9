"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that every
singular direction moves by the same amount. The rows of the result, each the input weights of a neuron,
differ in length; NorMuon (Li et al. 2025, arXiv:2510.05491) divides each row by its recent length. AdamW
gives every weight its own rate, which suits embeddings and norms better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

Kind = Literal["muon", "adamw"]

# Coefficients of odd polynomials a x + b x^3 + c x^5 that, applied in turn, bring singular values from
# [0.003, 1] to 1 fastest: each is the best approximation of 1 on the range that the previous one maps to
# (Amsel et al. 2025, "The Polar Express", arXiv:2505.16932, section 3). After four, singular values are
# within 20% of 1; five, for [0.001, 1], gave no better model.
POLAR = (
    (8.38367471, -24.76591216, 18.35708709),
    (4.04342046, -3.01140508, 0.56951217),
    (3.50557077, -2.62665419, 0.52571949),
    (2.49011582, -1.83427497, 0.4368347),
)
# Largest number of weights orthogonalised in one call: their copies take some 100 MB, and on a GPU 1 GB.
WEIGHTS_PER_CALL = {"cpu": 1 << 24, "cuda": 1 << 27}
SAFETY = 1.01  # bfloat16 may round a singular value up past 1, where the polynomials diverge


def orthogonalized(matrices: Tensor, steps: int = len(POLAR), dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return an approximation of the nearest orthogonal matrices: singular values become about 1.

    Args:
        matrices: [..., R, C].
        steps: Number of polynomials applied.
        dtype: Type of the matrix products; bfloat16 is exact enough, since only the first digit of the
            result matters.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x.reshape(-1, *x.shape[-2:])
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) * SAFETY + 1e-20).to(dtype)
    for a, b, c in _coefficients(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)


def _coefficients(steps: int) -> list[tuple[float, float, float]]:
    return [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR[:steps]]


class Muon(torch.optim.Optimizer):
    """The Muon optimizer: orthogonalised momentum, for parameters with two dimensions.

    ``lr`` is the spectral norm of the update of a square matrix. A tall matrix [R, C] moves sqrt(R / C) times
    as far, so that outputs change equally. Weight decay is decoupled.

    Args:
        parameters: Matrices to optimize.
        lr: Learning rate.
        momentum: Decay of the gradients' running mean; the update is Nesterov's.
        weight_decay: Decoupled weight decay.
        steps: Polynomials of `orthogonalized`.
        dtype: Type of the matrix products.
        threads: On a CPU, the matrices are distributed over this many threads.
        row_decay: Decay of the rows' running mean squares. Each row is divided by the root of its own mean
            square, then the whole update is rescaled to its former length (NorMuon). 0: rows stay as they
            are.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = len(POLAR),
        dtype: torch.dtype = torch.bfloat16,
        threads: int = 1,
        row_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "row_decay": row_decay}
        super().__init__(parameters, settings)
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        threads = threads if on_cpu else 1  # a GPU computes a whole batch at once
        self.steps, self.dtype, self._threads = steps, dtype, threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        if any(self._by_pairs(parameter) for group in self.param_groups for parameter in group["params"]):
            from tercet.train.cpu.muon import prepare

            prepare()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; ``closure`` is not called."""
        for group in self.param_groups:

            def update(work: list[nn.Parameter] | nn.Parameter, group: dict[str, Any] = group) -> None:
                if self._pool is not None and torch.get_num_threads() != 1:
                    torch.set_num_threads(1)  # for this worker thread
                with torch.no_grad():
                    if isinstance(work, nn.Parameter):
                        self._update_by_pairs(work, group)
                    else:
                        self._update(work, group)

            single: list[nn.Parameter] = []
            batched: list[nn.Parameter] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (single if self._by_pairs(parameter) else batched).append(parameter)
            single.sort(key=lambda parameter: -parameter.numel())  # so that threads end at the same time
            work: list[list[nn.Parameter] | nn.Parameter] = [
                *_batches_by_shape(batched, self._threads),
                *single,
            ]
            if self._pool is None:
                for item in work:
                    update(item)
            else:
                list(self._pool.map(update, work))
        return None

    def _by_pairs(self, parameter: nn.Parameter) -> bool:
        """Return whether the CPU kernels of the training step are the fastest for this parameter, too."""
        if (
            self.dtype != torch.bfloat16
            or parameter.device.type != "cpu"
            or hasattr(parameter, "full_tensor")
        ):
            return False
        from tercet.train.cpu.products import PairedProducts, products_for

        plain = parameter.dtype == torch.float32 and parameter.is_contiguous()
        return plain and isinstance(products_for(self.dtype, parameter.shape), PairedProducts)

    def _update_by_pairs(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Update one parameter as `_update` does, but read and write each number in slow memory only once."""
        from tercet.train.cpu.muon import direction, move, row_squares

        state, (rows, columns) = self.state[parameter], parameter.shape
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = cast(Tensor, parameter.grad).contiguous()
        update = direction(gradient, state["momentum"], group["momentum"], SAFETY, _coefficients(self.steps))
        factors = torch.ones(1, rows)
        if group["row_decay"]:
            squares = torch.empty(1, rows)
            row_squares(update, squares[0].numpy())
            factors = self._row_factors([parameter], squares, columns, group["row_decay"])
        factors *= -group["lr"] * max(1.0, rows / columns) ** 0.5
        shrink = np.float32(1 - group["lr"] * group["weight_decay"])
        move(parameter.detach().numpy(), update, factors[0].numpy(), shrink)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters of one shape together: for small matrices, calls cost as much as arithmetic."""
        weights: list[Tensor] = list(parameters)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        rows, columns = parameters[0].shape
        size = -group["lr"] * max(1.0, rows / columns) ** 0.5
        # Of a sharded matrix every process orthogonalises the whole and keeps its own rows. That costs each
        # process the time of a single one, but needs no second exchange.
        whole = torch.stack([p.full_tensor() if hasattr(p, "full_tensor") else p for p in ahead])
        directions = orthogonalized(whole, self.steps, self.dtype).to(whole.dtype)
        if group["row_decay"]:
            norms = torch.linalg.vector_norm(directions, dim=2, dtype=torch.float32)
            factors = self._row_factors(parameters, norms.square(), columns, group["row_decay"])
            directions = directions * factors[..., None]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        moves = [
            _shard_like(direction, parameter) if hasattr(parameter, "full_tensor") else direction
            for parameter, direction in zip(parameters, directions.unbind(), strict=True)
        ]
        torch._foreach_add_(weights, moves, alpha=size)

    def _row_factors(
        self, parameters: list[nn.Parameter], squares: Tensor, columns: int, decay: float
    ) -> Tensor:
        """Return [P, R] the factors of the rows of P directions, from the rows' squared norms [P, R].

        The running mean squares start at zero without bias correction: a factor common to all rows cancels.
        """
        for parameter, square in zip(parameters, squares, strict=True):
            if "row_square" not in self.state[parameter]:
                self.state[parameter]["row_square"] = torch.zeros_like(square)
        means = [self.state[parameter]["row_square"] for parameter in parameters]
        torch._foreach_lerp_(means, (squares / columns).unbind(), 1 - decay)
        factors = 1 / (torch.stack(means).sqrt() + 1e-8)
        before, after = squares.sum(1), (squares * factors.square()).sum(1)
        length: Tensor = (before / (after + 1e-20)).sqrt()
        return factors * length[:, None]


def _shard_like(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this process's shard of ``whole``, distributed like ``parameter``."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    copies = [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(whole, parameter.device_mesh, copies).redistribute(
        placements=parameter.placements
    )


def _batches_by_shape(parameters: Sequence[nn.Parameter], threads: int) -> list[list[nn.Parameter]]:
    """Group parameters of one shape, split over the threads, in a fixed order."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    batches = []
    for (rows, columns), members in by_shape.items():
        limit = max(
            1, WEIGHTS_PER_CALL.get(members[0].device.type, WEIGHTS_PER_CALL["cpu"]) // (rows * columns)
        )
        size = min(limit, -(-len(members) // threads))
        batches += [members[begin : begin + size] for begin in range(0, len(members), size)]
    return batches


@dataclass(frozen=True)
class Rates:
    """Peak rates per optimizer step, and the optimizers' other settings."""

    kind: Kind
    matrices: float  # rate of the blocks' matrices: Muon's, or AdamW's
    embedding: float | None = None  # AdamW's; None: as ``matrices``
    head: float | None = None  # of a head that is not the embedding; None: as ``embedding``
    vectors: float | None = None  # of norms and biases; None: as ``matrices``
    weight_decay: float = 0.1  # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95  # Muon's
    row_decay: float = 0.95  # Muon's
    polar_steps: int = len(POLAR)  # Muon's polynomials


class Optimizer:
    """One or two PyTorch optimizers whose rates follow one schedule."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: Rates,
        *,
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self.parts: list[torch.optim.Optimizer] = []
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(_group(name, parameter), []).append(parameter)
        embedding = rates.matrices if rates.embedding is None else rates.embedding
        peak = {
            "matrices": rates.matrices,
            "embedding": embedding,
            "head": embedding if rates.head is None else rates.head,
            "vectors": rates.matrices if rates.vectors is None else rates.vectors,
        }
        if rates.kind == "muon" and (matrices := groups.pop("matrices", [])):
            self.parts.append(
                Muon(
                    matrices,
                    rates.matrices,
                    rates.momentum,
                    rates.weight_decay,
                    rates.polar_steps,
                    dtype,
                    threads,
                    rates.row_decay,
                )
            )
        settings = [
            {
                "params": members,
                "lr": peak[name],
                "weight_decay": rates.weight_decay if name in ("matrices", "head") else 0.0,
            }
            for name, members in groups.items()
        ]
        if settings:
            # AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Norms, biases and embeddings do not decay.
            self.parts.append(torch.optim.AdamW(settings, betas=rates.betas, fused=True))
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, rate: float) -> None:
        """Update the parameters at ``rate`` times the peak rates."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            part.step()

    def zero_grad(self) -> None:
        """Discard all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return all moments, by ``MOMENT:PARAMETER``."""
        return {
            f"{moment}:{self.names[parameter]}": value
            for part in self.parts
            for parameter, values in part.state.items()
            for moment, value in values.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the moments that `state` returned."""
        owners = {
            self.names[parameter]: (part, parameter)
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        for key, value in tensors.items():
            moment, _, name = key.partition(":")
            part, parameter = owners[name]
            part.state[parameter][moment] = value.to(parameter.device)


def _group(name: str, parameter: nn.Parameter) -> str:
    if "embed" in name:
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    return "matrices" if parameter.dim() == 2 else "vectors"


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale all gradients by one factor to a total norm of at most ``largest``; return the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if total > largest:  # otherwise skip the call, which would read and write all gradients
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return total
