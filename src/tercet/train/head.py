"""The head and its loss: never all logits at once, and their gradient while they are at hand.

A vocabulary of 50,000 makes logits the largest thing of a training step. They are made a piece at a
time, and a piece's gradient takes its place at once and is multiplied on to what the head read and to
the head: nothing is kept for the backward pass, and nothing computed twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer

# Numbers in a piece of logits: 256 MB in float32, and compiled, where nothing else is of their size, 512 MB in
# bfloat16: a GPU's products want many rows.
LARGEST_LOGITS, LARGEST_COMPILED = 1 << 26, 1 << 28


class Losses(NamedTuple):
    """Sums over the supervised tokens, in nats; float32 scalars."""

    total: Tensor  # what is made small: cross-entropy and z-loss, times the scale
    entropy: Tensor  # cross-entropy as it is; no gradient flows from here


class Kernel(Protocol):
    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        z_weight: float,
        cap: float | None,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


def head_losses(
    model: Transformer,
    hidden: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    z_weight: float = 0.0,
    compiler: str | None = None,
) -> Losses:
    """Cross-entropy of the head's logits for ``hidden`` [M, H] against ``targets`` [M], `IGNORED` ones left out.

    scale: of the total, 1 / N for a mean over N tokens. Here and not afterwards, since bfloat16 would round it.
    z_weight: of log(Z)^2 with Z the softmax's normaliser, which keeps that near 1 (PaLM, Chowdhery et al.
        2022, arXiv:2204.02311).
    compiler: PyTorch's, by this backend, makes one program of what is done with a piece of logits.
    """
    weight, cap = model.lm_head.weight, model.config.logit_softcap
    if (
        not torch.is_grad_enabled()
    ):  # a function of one's own is asked for the gradients of parameters all the same
        hidden, weight = hidden.detach(), weight.detach()
    factor = torch.full((), scale, dtype=torch.float32, device=hidden.device)
    return Losses(*cast(Any, _HeadLosses).apply(hidden, weight, targets, factor, z_weight, cap, compiler))


def piece_rows(vocabulary: int, compiled: bool = False) -> int:
    """Rows of a piece of logits: a power of two, so that pieces of a step are mostly alike."""
    most = (LARGEST_COMPILED if compiled else LARGEST_LOGITS) // vocabulary
    return 1 << max(0, most.bit_length() - 1)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        z_weight: float,
        cap: float | None,
        compiler: str | None,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        kernel = _in_place if hidden.device.type == "cpu" else _fusible
        if compiler is not None:
            kernel = _compiled(compiler)
        head = weight.to(hidden.dtype)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        for begin in range(0, len(hidden), rows := piece_rows(len(weight), compiler is not None)):
            piece = hidden[begin : begin + rows]
            logits = F.linear(piece, head)
            found, d_logits = kernel(
                logits, targets[begin : begin + rows], scale, z_weight, cap, of_hidden or of_weight
            )
            sums += found
            if d_hidden is not None:
                torch.mm(cast(Tensor, d_logits), head, out=d_hidden[begin : begin + rows])
            if d_weight is not None:
                d_weight += _product(cast(Tensor, d_logits).T, piece)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        entropy = sums[0].clone()
        ctx.mark_non_differentiable(entropy)
        return sums.sum() * scale, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)  # 1, as a rule
        if d_weight is not None:
            d_weight = (d_weight * upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, where the device can give the sums as it has them."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _fusible(
    logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float, cap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """[2]: cross-entropy and z-loss; and ``scale`` times their gradient by ``logits`` [m, V], in its type.

    Of single operations that a compiler makes one of.
    """
    scores = logits.float()
    bent = None
    if cap is not None:
        bent = torch.tanh(scores / cap)
        scores = bent * cap
    counted = targets != IGNORED
    normaliser = scores.logsumexp(-1)
    chosen = scores.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = torch.where(counted, normaliser - chosen, 0.0).sum()
    z = z_weight * torch.where(counted, normaliser.square(), 0.0).sum()
    sums = torch.stack((entropy, z))
    if not gradient:
        return sums, None
    # Of the normaliser's logarithm: the probabilities. Of its square: twice itself times these.
    share = torch.where(counted, scale * (1 + 2 * z_weight * normaliser), 0.0)
    slopes = (scores - normaliser[:, None]).exp() * share[:, None]
    tokens = torch.arange(logits.shape[1], device=logits.device)
    slopes = torch.where(tokens == targets[:, None], slopes - scale, slopes)
    if bent is not None:
        slopes = slopes * (1 - bent.square())
    return sums, slopes.to(logits.dtype)


def _in_place(
    logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float, cap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_fusible`, and several times as fast on a CPU: PyTorch's softmax, and no memory that is asked for anew."""
    scores = logits.float()
    bent = None
    if cap is not None:
        bent = torch.tanh(scores / cap)
        scores = bent * cap
    counted, rows, columns = targets != IGNORED, torch.arange(len(targets)), targets.clamp(min=0)
    slopes = scores.softmax(-1)  # faster than any exp, so the normaliser is found from the likeliest token
    largest, likeliest = scores.max(-1)
    normaliser = largest - slopes[rows, likeliest].log()
    entropy = torch.where(counted, normaliser - scores[rows, columns], 0.0).sum()
    z = z_weight * torch.where(counted, normaliser.square(), 0.0).sum()
    sums = torch.stack((entropy, z))
    if not gradient:
        return sums, None
    share = torch.where(counted, scale * (1 + 2 * z_weight * normaliser), 0.0)
    slopes *= share[:, None]
    slopes[rows, columns] -= scale * counted
    if bent is not None:
        slopes *= 1 - bent.square_()
    return sums, slopes.to(logits.dtype)


@cache
def _compiled(backend: str) -> Kernel:
    return cast(Kernel, torch.compile(_fusible, backend=backend, dynamic=False, fullgraph=True))
