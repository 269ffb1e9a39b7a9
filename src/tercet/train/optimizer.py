"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that every
direction of it moves by the same amount. Its rows, each what one neuron reads, come out unequally long;
NorMuon (Li et al. 2025, arXiv:2510.05491) divides each by its own recent length. AdamW gives each single
weight a rate of its own, which suits embeddings and norms better.
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

# Coefficients of the odd polynomials a x + b x^3 + c x^5, applied one after the other, that bring singular
# values from [0.003, 1] to 1 fastest: each is as near to 1 as can be on what the one before it left (Amsel
# et al. 2025, "The Polar Express", arXiv:2505.16932, section 3). Four leave them within 20% of 1; five, from
# [0.001, 1], gave no better model.
POLAR = (
    (8.38367471, -24.76591216, 18.35708709),
    (4.04342046, -3.01140508, 0.56951217),
    (3.50557077, -2.62665419, 0.52571949),
    (2.49011582, -1.83427497, 0.4368347),
)
# Weights that are orthogonalised in one call at most: their copies take some 100 MB, and on a GPU 1 GB.
TOGETHER = {"cpu": 1 << 24, "cuda": 1 << 27}
SAFETY = 1.01  # bfloat16 may round a singular value to above 1, where the polynomials diverge


def orthogonalized(matrices: Tensor, steps: int = len(POLAR), dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal matrix nearest to each of ``matrices`` [..., R, C], roughly: singular values become about 1.

    dtype: of the products; bfloat16 is exact enough, since no digit of the result beyond the first matters.
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
    """Momentum, made orthogonal. For parameters with two dimensions.

    lr is the spectral norm of an update of a square matrix; a tall one [R, C] moves sqrt(R / C) times
    as far, so that outputs change alike. Weight decay is decoupled.

    row_decay: how much of the rows' mean squares is kept from step to step. Each row is divided by the root
        of its own, and the whole made as long again as it was (NorMuon). 0: rows stay as they are.
    threads: matrices are shared out among so many. dtype: of the products.
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
        on_cpu = all(one.device.type == "cpu" for group in self.param_groups for one in group["params"])
        threads = threads if on_cpu else 1  # a GPU does all of a batch at once
        self.steps, self.dtype, self._threads = steps, dtype, threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        if any(self._by_pairs(parameter) for group in self.param_groups for parameter in group["params"]):
            from tercet.train.cpu.muon import prepare

            prepare()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:

            def update(work: list[nn.Parameter] | nn.Parameter, group: dict[str, Any] = group) -> None:
                if self._pool is not None and torch.get_num_threads() != 1:
                    torch.set_num_threads(1)  # of this thread
                with torch.no_grad():
                    if isinstance(work, nn.Parameter):
                        self._update_by_pairs(work, group)
                    else:
                        self._update(work, group)

            alone: list[nn.Parameter] = []
            together: list[nn.Parameter] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (alone if self._by_pairs(parameter) else together).append(parameter)
            alone.sort(key=lambda parameter: -parameter.numel())  # so that threads end together
            work: list[list[nn.Parameter] | nn.Parameter] = [*_alike(together, self._threads), *alone]
            if self._pool is None:
                for one in work:
                    update(one)
            else:
                list(self._pool.map(update, work))
        return None

    def _by_pairs(self, parameter: nn.Parameter) -> bool:
        """Whether the written-out products of a training step on a CPU are the fastest for it as well."""
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
        """As `_update` for one parameter, each number read and written once where memory is slow."""
        from tercet.train.cpu.muon import direction, move, row_squares

        state, (rows, columns) = self.state[parameter], parameter.shape
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = cast(Tensor, parameter.grad).contiguous()
        found = direction(gradient, state["momentum"], group["momentum"], SAFETY, _coefficients(self.steps))
        factors = torch.ones(1, rows)
        if group["row_decay"]:
            squares = torch.empty(1, rows)
            row_squares(found, squares[0].numpy())
            factors = self._row_factors([parameter], squares, columns, group["row_decay"])
        factors *= -group["lr"] * max(1.0, rows / columns) ** 0.5
        shrink = np.float32(1 - group["lr"] * group["weight_decay"])
        move(parameter.detach().numpy(), found, factors[0].numpy(), shrink)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move parameters of one shape: small matrices cost as much in calls as in arithmetic, one by one."""
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
        # A sharded matrix: every process orthogonalises the whole of it and keeps its own rows. That costs
        # each the time one process would take, and no second exchange.
        whole = torch.stack([one.full_tensor() if hasattr(one, "full_tensor") else one for one in ahead])
        directions = orthogonalized(whole, self.steps, self.dtype).to(whole.dtype)
        if group["row_decay"]:
            norms = torch.linalg.vector_norm(directions, dim=2, dtype=torch.float32)
            factors = self._row_factors(parameters, norms.square(), columns, group["row_decay"])
            directions = directions * factors[..., None]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        moves = [
            _shared_like(direction, parameter) if hasattr(parameter, "full_tensor") else direction
            for parameter, direction in zip(parameters, directions.unbind(), strict=True)
        ]
        torch._foreach_add_(weights, moves, alpha=size)

    def _row_factors(
        self, parameters: list[nn.Parameter], squares: Tensor, columns: int, decay: float
    ) -> Tensor:
        """[P, R]: what each row of a direction is multiplied by, whose squares sum up to ``squares`` [P, R].

        The mean squares begin at zero and are not corrected for it: what is common to all rows cancels.
        """
        for parameter, square in zip(parameters, squares, strict=True):
            if "row_square" not in self.state[parameter]:
                self.state[parameter]["row_square"] = torch.zeros_like(square)
        kept = [self.state[parameter]["row_square"] for parameter in parameters]
        torch._foreach_lerp_(kept, (squares / columns).unbind(), 1 - decay)
        factors = 1 / (torch.stack(kept).sqrt() + 1e-8)
        before, after = squares.sum(1), (squares * factors.square()).sum(1)
        length: Tensor = (before / (after + 1e-20)).sqrt()
        return factors * length[:, None]


def _shared_like(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """The part of ``whole``, which every process holds, that ``parameter``'s shard has."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    copies = [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(whole, parameter.device_mesh, copies).redistribute(
        placements=parameter.placements
    )


def _alike(parameters: Sequence[nn.Parameter], threads: int) -> list[list[nn.Parameter]]:
    """Parameters of one shape together, a share for each thread, in an order that is always the same."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    found = []
    for (rows, columns), members in by_shape.items():
        most = max(1, TOGETHER.get(members[0].device.type, TOGETHER["cpu"]) // (rows * columns))
        size = min(most, -(-len(members) // threads))
        found += [members[begin : begin + size] for begin in range(0, len(members), size)]
    return found


@dataclass(frozen=True)
class Rates:
    """Peak rates per optimizer step, and what goes with them."""

    kind: Kind
    matrices: float  # of the blocks: Muon's, or AdamW's
    embedding: float | None = None  # AdamW's; None: as matrices
    head: float | None = None  # where it is not the embedding; None: as the embedding
    vectors: float | None = None  # norms and biases; None: as matrices
    weight_decay: float = 0.1  # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95  # Muon's
    row_decay: float = 0.95  # Muon's
    polar_steps: int = len(POLAR)


class Optimizer:
    """One or two of PyTorch's optimizers, whose rates follow one schedule."""

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
            # AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); norms, biases and embeddings are not decayed.
            self.parts.append(torch.optim.AdamW(settings, betas=rates.betas, fused=True))
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, rate: float) -> None:
        """One update at ``rate`` times the peak rates."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything it remembers, as ``MOMENT:PARAMETER``."""
        return {
            f"{moment}:{self.names[parameter]}": value
            for part in self.parts
            for parameter, values in part.state.items()
            for moment, value in values.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what `state` gave."""
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
    """Scale all gradients together so that their norm is at most ``largest``; the norm they had."""
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    found = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if found > largest:  # else they are left alone, which saves reading and writing all of them
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return found
