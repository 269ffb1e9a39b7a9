"""The head and its loss, computed in chunks of logits together with their gradient.

With a vocabulary of 50,000, the logits are the largest tensor of a training step. So they are computed in
chunks. The gradient of a chunk replaces it at once, and is multiplied into the gradients of the head's input
and of its weight. Nothing is stored for the backward pass, and nothing is computed twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer

# Logits in a chunk: 256 MB in float32. Compiled, when no other tensor has their size, 512 MB in bfloat16: a
# GPU's matrix products are faster with many rows.
LARGEST_LOGITS, LARGEST_COMPILED = 1 << 26, 1 << 28


class Losses(NamedTuple):
    """Sums over the supervised tokens, in nats; float32 scalars."""

    total: Tensor  # the training objective: cross-entropy plus z-loss, times the scale
    entropy: Tensor  # unscaled cross-entropy; no gradient flows from it


class Kernel(Protocol):
    """Computes the losses of a chunk of logits and, on request, their gradient."""

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        z_weight: float,
        cap: float | None,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `_fusible` computes."""
        ...


def head_losses(
    model: Transformer,
    hidden: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    z_weight: float = 0.0,
    compiler: str | None = None,
) -> Losses:
    """Return the cross-entropy of the head's logits for ``hidden`` against ``targets``.

    Args:
        model: The network, for its head and its cap on logits.
        hidden: [M, H] the input of the head.
        targets: [M] the correct token of each row; rows with `IGNORED` are not counted.
        scale: Factor of the total: 1 / N for a mean over N tokens. Applied here and not to the gradients,
            because bfloat16 would round it there.
        z_weight: Weight of log(Z)^2, with Z the softmax normaliser; it keeps Z near 1 (PaLM, Chowdhery et
            al. 2022, arXiv:2204.02311).
        compiler: The backend of PyTorch's compiler that fuses the operations on a chunk; None: no compiler.
    """
    weight, cap = model.lm_head.weight, model.config.logit_softcap
    if not torch.is_grad_enabled():
        # Within a Function, `needs_input_grad` is true for parameters even where gradients are disabled.
        hidden, weight = hidden.detach(), weight.detach()
    factor = torch.full((), scale, dtype=torch.float32, device=hidden.device)
    return Losses(*cast(Any, _HeadLosses).apply(hidden, weight, targets, factor, z_weight, cap, compiler))


def chunk_rows(vocabulary: int, compiled: bool = False) -> int:
    """Return the rows of a chunk of logits: a power of two, so that most chunks of a step have one shape."""
    limit = (LARGEST_COMPILED if compiled else LARGEST_LOGITS) // vocabulary
    return 1 << max(0, limit.bit_length() - 1)


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
        hidden_gradient, weight_gradient = ctx.needs_input_grad[:2]
        kernel = _in_place if hidden.device.type == "cpu" else _fusible
        if compiler is not None:
            kernel = _compiled(compiler)
        head = weight.to(hidden.dtype)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_gradient else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_gradient else None
        for begin in range(0, len(hidden), rows := chunk_rows(len(weight), compiler is not None)):
            chunk = hidden[begin : begin + rows]
            logits = F.linear(chunk, head)
            losses, d_logits = kernel(
                logits,
                targets[begin : begin + rows],
                scale,
                z_weight,
                cap,
                hidden_gradient or weight_gradient,
            )
            sums += losses
            if d_hidden is not None:
                torch.mm(cast(Tensor, d_logits), head, out=d_hidden[begin : begin + rows])
            if d_weight is not None:
                d_weight += _product(cast(Tensor, d_logits).T, chunk)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        entropy = sums[0].clone()
        ctx.mark_non_differentiable(entropy)
        return sums.sum() * scale, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)  # usually 1
        if d_weight is not None:
            d_weight = (d_weight * upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` with float32 sums, where the device can return them unrounded."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _fusible(
    logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float, cap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the losses of a chunk of logits with operations that a compiler can fuse.

    Returns:
        [2] cross-entropy and z-loss, summed; and ``scale`` times their gradient with respect to ``logits``
        [m, V], in the type of ``logits``, or None.
    """
    scores = logits.float()
    squashed = None
    if cap is not None:
        squashed = torch.tanh(scores / cap)
        scores = squashed * cap
    counted = targets != IGNORED
    log_z = scores.logsumexp(-1)
    chosen = scores.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = torch.where(counted, log_z - chosen, 0.0).sum()
    z_loss = z_weight * torch.where(counted, log_z.square(), 0.0).sum()
    sums = torch.stack((entropy, z_loss))
    if not gradient:
        return sums, None
    # The gradient of log(Z) is the probabilities; that of its square is 2 log(Z) times the probabilities.
    share = torch.where(counted, scale * (1 + 2 * z_weight * log_z), 0.0)
    slopes = (scores - log_z[:, None]).exp() * share[:, None]
    tokens = torch.arange(logits.shape[1], device=logits.device)
    slopes = torch.where(tokens == targets[:, None], slopes - scale, slopes)
    if squashed is not None:
        slopes = slopes * (1 - squashed.square())
    return sums, slopes.to(logits.dtype)


def _in_place(
    logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float, cap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute what `_fusible` computes, several times as fast on a CPU: PyTorch's softmax, in place."""
    scores = logits.float()
    squashed = None
    if cap is not None:
        squashed = torch.tanh(scores / cap)
        scores = squashed * cap
    counted, rows, columns = targets != IGNORED, torch.arange(len(targets)), targets.clamp(min=0)
    slopes = scores.softmax(-1)  # faster than any exp, so log(Z) is derived from the most likely token
    largest, most_likely = scores.max(-1)
    log_z = largest - slopes[rows, most_likely].log()
    entropy = torch.where(counted, log_z - scores[rows, columns], 0.0).sum()
    z_loss = z_weight * torch.where(counted, log_z.square(), 0.0).sum()
    sums = torch.stack((entropy, z_loss))
    if not gradient:
        return sums, None
    share = torch.where(counted, scale * (1 + 2 * z_weight * log_z), 0.0)
    slopes *= share[:, None]
    slopes[rows, columns] -= scale * counted
    if squashed is not None:
        slopes *= 1 - squashed.square_()
    return sums, slopes.to(logits.dtype)


@cache
def _compiled(backend: str) -> Kernel:
    return cast(Kernel, torch.compile(_fusible, backend=backend, dynamic=False, fullgraph=True))
