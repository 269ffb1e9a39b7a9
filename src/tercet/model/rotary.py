"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in PyTorch: cos, sin and the rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.model.config import ModelConfig
from tercet.model.rope import rope_frequencies

SMALLEST_TABLE = 256  # positions; a table doubles from here, so that few are made as a text grows


class RotaryEmbedding:
    """Compute cos and sin by position. It has no parameters, so it is not a module.

    The layout is the half-rotated one of Hugging Face checkpoints. ``local`` selects the base of the
    layers where ``config.has_local_rope``.
    """

    def __init__(self, config: ModelConfig, local: bool = False) -> None:
        self.config, self.local = config, local
        self.by_length = not local and config.rope_scaling is not None and config.rope_scaling.by_length
        self._table: tuple[Tensor, Tensor] | None = None  # of every position, grown on demand

    def __call__(
        self, positions: Tensor, length: int, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, T, rotary] in float32 for ``positions`` [B, T], all below ``length``.

        Frequencies that depend on the sequence's length use the length of the token's own row, or of
        its own segment where ``segments`` [B, T] are given, so that neither batching nor packing
        changes a result.
        """
        if self.by_length:
            return self._by_length(positions, segments)
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].device != positions.device:
            rows = torch.arange(max(SMALLEST_TABLE, 1 << (length - 1).bit_length()), device=positions.device)
            frequencies, factor = rope_frequencies(self.config, length, self.local)
            table = self._table = _cos_and_sin(rows, torch.from_numpy(frequencies), factor)
        return table[0][positions], table[1][positions]

    def _by_length(self, positions: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if segments is None:
            lengths = positions.amax(1, keepdim=True) + 1
        else:
            alike = segments[:, :, None] == segments[:, None, :]
            lengths = (positions[:, None, :] * alike).amax(2) + 1
        distinct, index = torch.unique(lengths, return_inverse=True)
        tables = [rope_frequencies(self.config, length) for length in distinct.tolist()]
        frequencies = torch.stack([torch.from_numpy(table) for table, _ in tables]).to(index.device)
        factor = tables[0][1]  # the same for every length
        return _cos_and_sin(positions, frequencies[index], factor)


def _cos_and_sin(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [..., rotary] for ``positions`` [...] and ``frequencies`` [..., rotary / 2]."""
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + R/2) of the first R dimensions of ``x`` [B, heads, T, D] by its angle."""
    dim = cos.shape[-1]
    rotated, rest = x[..., :dim], x[..., dim:]
    half = dim // 2
    swapped = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
    rotated = rotated * cos + swapped * sin
    return rotated if not rest.shape[-1] else torch.cat((rotated, rest), dim=-1)
