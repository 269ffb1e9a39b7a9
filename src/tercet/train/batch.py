"""A batch: the rows of one forward pass, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches import IGNORED


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
        return Batch(*(None if part is None else moved(part, device) for part in parts))  # type: ignore[arg-type]

    @property
    def document_begins(self) -> Tensor:
        """[D + 1] int32: the start of each of D documents in the concatenated rows, and B * T."""
        rows, time = self.tokens.shape
        if self.segments is None:
            return torch.arange(0, (rows + 1) * time, time, dtype=torch.int32)
        begins = torch.ones(rows, time, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=rows * time).int()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``, without waiting for a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    # A GPU copies from memory that is not pinned only once it is idle.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
