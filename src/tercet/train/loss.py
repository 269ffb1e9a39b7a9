"""Cross-entropy over the supervised tokens only, and its gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer, attends_by_document
from tercet.train.head import Losses, head_losses

# cuBLAS chooses products by the memory it has to work with, which is settled when the first is asked for: always
# as much (4096 KiB, eight times), so that a run that is gone on with chooses alike.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NEARLY_ALL = 0.9  # of the tokens are supervised: the others cost less than choosing


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
        """The same rows on ``device``; a GPU is not waited for."""
        if self.tokens.device == device:
            return self
        parts = (self.tokens, self.targets, self.positions, self.segments)
        return Batch(*(None if part is None else _moved(part, device) for part in parts))  # type: ignore[arg-type]

    @property
    def document_begins(self) -> Tensor:
        """[D + 1] int32: where each document begins, of all rows laid end to end; the last: B T."""
        rows, time = self.tokens.shape
        if self.segments is None:
            return torch.arange(0, (rows + 1) * time, time, dtype=torch.int32)
        begins = torch.ones(rows, time, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=rows * time).int()


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return (
        tensor.contiguous().pin_memory().to(device, non_blocking=True)
    )  # from other memory a GPU copies when it is idle


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the supervised tokens of ``batch``.

    A sum, not a mean: dividing by the tokens of the whole optimizer step, not of each piece, makes
    the gradient independent of how a step was cut into pieces.
    """
    return losses_of(model, batch).total


def losses_of(model: Transformer, batch: Batch, scale: float = 1.0, z_weight: float = 0.0) -> Losses:
    """Sums over the supervised tokens of ``batch``; ``scale`` and ``z_weight`` as in `head_losses`.

    What has to be known of the batch is asked where it lies, on the CPU: a GPU is not waited for.
    """
    device = model.device
    length = None if batch.positions is None else int(batch.positions.max()) + 1
    begins = batch.document_begins if attends_by_document(model) else None
    # The head is the dearest matrix of a small model, and no logits are needed where nothing is asked. But rows
    # that are supervised almost everywhere keep one shape, for the compiler.
    asked = (batch.targets != IGNORED).flatten().nonzero()[:, 0]
    share = len(asked) / batch.targets.numel()
    choose = share < (1 if device.type == "cpu" else NEARLY_ALL)
    if begins is not None:
        begins = _moved(begins, device)
        if model.compiler is not None:  # one program for any number of documents
            torch._dynamo.maybe_mark_dynamic(begins, 0)
    batch = batch.to(device)
    hidden = model.hidden(
        batch.tokens, batch.positions, batch.segments, length=length, document_begins=begins
    ).flatten(0, 1)
    targets = batch.targets.flatten()
    if choose:
        asked = _moved(asked, device)
        hidden, targets = hidden[asked], targets[asked]
    return head_losses(model, hidden, targets, scale=scale, z_weight=z_weight, compiler=model.compiler)


class Gradients(Protocol):
    """Gradients of one optimizer step."""

    def gradients(self, batches: Sequence[Batch]) -> tuple[float | Tensor, int]:
        """Mean loss in nats over the supervised tokens of all ``batches``, and how many those are.

        Sets every parameter's ``grad`` to the gradient of that mean. A loss that is a tensor may still be
        being computed, by a GPU: ``float`` waits for it.
        """
        ...


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Let PyTorch's compiler make one program of each block and one of the loss, in place.

    Each for one shape of batch, and anew for another: so it is the same whatever ran before, calibration or nothing.

    Block by block: all are alike, so that one is compiled, in seconds, and what surrounds them (rotary
    tables, masks) stays as it is. A block that is no single program (a mixture of
    experts asks how many tokens each gets) fails when it first runs.
    """
    for block in model.model.layers:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    model.compiler = backend


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """The blocks as they are written, for batches of any shape.

    Compiled ones would be compiled anew for some of them, half a minute each.
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


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU: gradients are added up in an order that is always the same, so that runs can be repeated.

    Attention's backward pass adds in whatever order its blocks end, if it isn't asked not to.
    """
    if device.type != "cuda":
        yield
        return
    debugging: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), debugging.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    debugging.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        debugging.fill_uninitialized_memory = filled


class Autograd:
    """PyTorch's own gradients: any network, any device."""

    def __init__(self, model: Transformer, z_weight: float = 0.0) -> None:
        self.model, self.z_weight = model, z_weight

    def gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        tokens = sum(batch.supervised for batch in batches)
        for parameter in self.model.parameters():
            parameter.grad = None
        total = torch.zeros((), device=self.model.device)
        for batch in batches:
            if batch.supervised:
                losses = losses_of(self.model, batch, 1 / tokens, self.z_weight)
                losses.total.backward()  # type: ignore[no-untyped-call]
                total += losses.entropy
        return total / max(1, tokens), tokens


def gradients_of(model: Transformer, threads: int, z_weight: float = 0.0) -> Gradients:
    """The fastest way to this network's gradients: the written-out passes where they know it."""
    from tercet.train.cpu.support import supports

    if not supports(model):
        return Autograd(model, z_weight)
    from tercet.train.cpu.step import Stepper

    return Stepper(model, threads, z_weight)
