"""Cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer, attends_by_document
from tercet.train.head import Losses, head_losses

# cuBLAS chooses its algorithms by the size of its workspace, which is fixed at the first product. Always use
# the same size (8 buffers of 4096 KiB), so that a resumed run makes the same choices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# On a GPU, from this share of supervised tokens on, compute the logits of all tokens: the other logits cost
# less than selecting the supervised tokens.
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass.

    Attributes:
        tokens: [B, T] input ids. Rows are padded on the right; causal attention never sees padding.
        targets: [B, T] the id that should follow each input token, or `IGNORED`.
        positions: [B, T] each token's position within its document, where rows hold several documents.
            None: one document per row.
        segments: [B, T] the number of each token's document within its row. None: as ``positions``.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def supervised(self) -> int:
        """Number of tokens that the loss covers."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the same rows on ``device``, without waiting for a GPU."""
        if self.tokens.device == device:
            return self
        parts = (self.tokens, self.targets, self.positions, self.segments)
        return Batch(*(None if part is None else _moved(part, device) for part in parts))  # type: ignore[arg-type]

    @property
    def document_begins(self) -> Tensor:
        """[D + 1] int32: the start of each of D documents in the concatenated rows, and B * T."""
        rows, time = self.tokens.shape
        if self.segments is None:
            return torch.arange(0, (rows + 1) * time, time, dtype=torch.int32)
        begins = torch.ones(rows, time, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=rows * time).int()


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # A GPU copies from memory that is not pinned only once it is idle.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Return the cross-entropy in nats, summed over the supervised tokens of ``batch``.

    A sum, not a mean: dividing by the token count of the whole optimizer step, not of each micro-batch,
    makes the gradient independent of how the step was split.
    """
    return losses_of(model, batch).total


def losses_of(model: Transformer, batch: Batch, scale: float = 1.0, z_weight: float = 0.0) -> Losses:
    """Return the losses of ``batch``, summed over its supervised tokens.

    Args:
        model: The network.
        batch: Rows on the CPU: sizes are read from them there, without waiting for a GPU.
        scale: Factor of the total; see `head_losses`.
        z_weight: Weight of the z-loss; see `head_losses`.
    """
    device = model.device
    length = None if batch.positions is None else int(batch.positions.max()) + 1
    begins = batch.document_begins if attends_by_document(model) else None
    # The head is the most expensive matrix of a small model, and unsupervised tokens need no logits. But rows
    # that are supervised almost everywhere keep one shape, for the compiler.
    supervised = (batch.targets != IGNORED).flatten().nonzero()[:, 0]
    share = len(supervised) / batch.targets.numel()
    select = share < (1 if device.type == "cpu" else NEARLY_ALL)
    if begins is not None:
        begins = _moved(begins, device)
        if model.compiler is not None:  # one program for any number of documents
            torch._dynamo.maybe_mark_dynamic(begins, 0)
    batch = batch.to(device)
    hidden = model.hidden(
        batch.tokens, batch.positions, batch.segments, length=length, document_begins=begins
    ).flatten(0, 1)
    targets = batch.targets.flatten()
    if select:
        supervised = _moved(supervised, device)
        hidden, targets = hidden[supervised], targets[supervised]
    return head_losses(model, hidden, targets, scale=scale, z_weight=z_weight, compiler=model.compiler)
