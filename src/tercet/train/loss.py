"""Cross-entropy over the supervised tokens only, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer

# Logits larger than this many numbers (256 MB in float32) are made in pieces and recomputed in the
# backward pass, so that a vocabulary of 150,000 does not decide how long a sequence may be.
LARGEST_LOGITS = 1 << 26


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass.

    tokens: [B, T] input ids. Rows are padded on the right; causal attention never sees padding.
    targets: [B, T] the id that should follow each input token, or `IGNORED`.
    positions, segments: [B, T] where rows hold several documents: each token's place in its own, and
        the document's number in its row. None: one document a row.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def supervised(self) -> int:
        """How many tokens the loss is over."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same rows on ``device``."""
        if self.tokens.device == device:
            return self
        parts = (self.tokens, self.targets, self.positions, self.segments)
        return Batch(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the supervised tokens of ``batch``.

    A sum, not a mean: dividing by the tokens of the whole optimizer step, not of each piece, makes
    the gradient independent of how a step was cut into pieces.
    """
    return loss_sums(model, batch)[0]


def loss_sums(model: Transformer, batch: Batch, z_weight: float = 0.0) -> Tensor:
    """[2]: the cross-entropy as in `loss_sum`; and ``z_weight`` log(Z)^2 with Z the softmax's normaliser,

    which keeps that near 1 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
    """
    batch = batch.to(model.device)
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments)
    chosen = batch.targets != IGNORED
    # The head is the dearest matrix of a small model, and no logits are needed where nothing is asked.
    hidden, targets = hidden[chosen], batch.targets[chosen]
    rows = max(1, LARGEST_LOGITS // model.config.vocab_size)
    if len(targets) <= rows:
        return _piece(model, hidden, targets, z_weight)
    total = hidden.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(targets), rows):
        piece = hidden[start : start + rows], targets[start : start + rows]
        total = total + checkpoint(_piece, model, *piece, z_weight, use_reentrant=False)
    return total


def _piece(model: Transformer, hidden: Tensor, targets: Tensor, z_weight: float) -> Tensor:
    logits = model.logits(hidden)
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    z = z_weight * logits.logsumexp(-1).square().sum() if z_weight else torch.zeros_like(entropy)
    return torch.stack((entropy, z))


class Gradients(Protocol):
    """Gradients of one optimizer step."""

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Mean loss in nats over the supervised tokens of all ``batches``, and how many those are.

        Sets every parameter's ``grad`` to the gradient of that mean.
        """
        ...


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Let PyTorch's compiler make one program of each block, in place. For batches of one shape.

    Block by block: all are alike, so that one is compiled, in seconds, and what surrounds them (rotary
    tables, masks, the loss in pieces) stays as it is. A block that is no single program (a mixture of
    experts asks how many tokens each gets) fails when it first runs.
    """
    for block in model.model.layers:
        block.compile(backend=backend, dynamic=False, fullgraph=True)


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """The blocks as they are written, for batches of any shape.

    Compiled ones would be compiled anew for every shape, and fail at the ninth.
    """
    blocks = list(model.model.layers)
    compiled = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, program in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = program


class Autograd:
    """PyTorch's own gradients: any network, any device."""

    def __init__(self, model: Transformer, z_weight: float = 0.0) -> None:
        self.model, self.z_weight = model, z_weight

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        tokens = sum(batch.supervised for batch in batches)
        for parameter in self.model.parameters():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            if batch.supervised:
                both = loss_sums(self.model, batch, self.z_weight) / tokens
                both.sum().backward()  # type: ignore[no-untyped-call]
                total += float(both[0].detach())
        return total, tokens


def gradients_of(model: Transformer, threads: int, z_weight: float = 0.0) -> Gradients:
    """The fastest way to this network's gradients: the written-out passes where they know it."""
    from tercet.train.cpu.support import supports

    if not supports(model):
        return Autograd(model, z_weight)
    from tercet.train.cpu.step import Stepper

    return Stepper(model, threads, z_weight)
