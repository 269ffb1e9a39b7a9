"""Measure which columns of each matrix matter: the mean squared activation that they multiply.

This is llama.cpp's importance matrix (``llama-imatrix``). Quantisation weighs a column's squared error by it,
since a column's error times its input is what an output is off by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.conversion.layers import Matrices, hidden_states
from tercet.conversion.text import token_rows
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Floats

TOKENS = 16_000  # beyond it the importance changes little: see docs/export.md
HELD_OUT = 2_000  # further tokens of the text, for the check
FEWEST = 500
# An expert that few tokens were sent to is measured too badly to be used alone.
FEWEST_FOR_EXPERT = 32
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)")


@dataclass(frozen=True)
class Calibration:
    """The importance of columns.

    Attributes:
        importance: float32 [columns] by the network's name of a matrix (``....q_proj.weight``).
        tokens: how many tokens were measured.
        held_out: the text's next tokens [rows, length], which were not; None if there are too few.
        unseen_experts: matrices of experts that got the mean of their layer's, because few tokens or none
            were sent to them.
    """

    importance: Mapping[str, Floats]
    tokens: int
    held_out: Tensor | None
    unseen_experts: int


class _Sums:
    """Sums of squared inputs by linear layer."""

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).double()
        self.squares[name] = self.squares.get(name, torch.zeros(flat.shape[1])).double() + flat.square().sum(
            0
        )
        self.counts[name] = self.counts.get(name, 0) + len(flat)


def calibrate(weights: Matrices, tokenizer: Tokenizer, texts: Iterable[str]) -> Calibration:
    """Measure the inputs of every linear layer on a text.

    Args:
        weights: the checkpoint.
        tokenizer: its tokenizer.
        texts: the text; its first `TOKENS` tokens are measured and the next `HELD_OUT` are kept for a check.

    Raises:
        UserError: the text has fewer than `FEWEST` tokens.
    """
    config = weights.config
    rows = token_rows(tokenizer, texts, TOKENS + HELD_OUT, config.max_positions, config.vocab_size)
    if rows.numel() < FEWEST:
        raise UserError(
            f"`calibrate` has {rows.numel()} tokens; at least {FEWEST} are needed to measure activations"
        )
    # A tenth of a short text is held out, as of a long one.
    kept = min(len(rows) - 1, max(1, round(len(rows) * HELD_OUT / (TOKENS + HELD_OUT))))
    measured, held_out = rows[: len(rows) - kept], rows[len(rows) - kept :]
    sums = _Sums()
    hidden_states(weights, measured, sums.add)
    importance = {
        f"{name}.weight": (squares / sums.counts[name]).float().numpy()
        for name, squares in sums.squares.items()
        if _EXPERT.fullmatch(name) is None or sums.counts[name] >= FEWEST_FOR_EXPERT
    }
    unseen = _fill_experts(importance, sums, _experts(weights))
    return Calibration(importance, measured.numel(), held_out if held_out.numel() >= 2 else None, unseen)


def _experts(weights: Matrices) -> list[str]:
    from tercet.model.tensor_names import network_tensors

    names = (part.name.removesuffix(".weight") for part in network_tensors(weights.config))
    return [name for name in names if _EXPERT.fullmatch(name)]


def _fill_experts(importance: dict[str, Floats], sums: _Sums, experts: Iterable[str]) -> int:
    """Give matrices of experts without an entry the mean of their layer's other ones; return their number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in experts:
        match = _EXPERT.fullmatch(name)
        assert match is not None
        groups.setdefault((match[1], match[2]), []).append(name)
    filled = 0
    for names in groups.values():
        missing = [name for name in names if f"{name}.weight" not in importance]
        total = sum((sums.squares[name] for name in names if name in sums.squares), torch.zeros(1).double())
        count = sum(sums.counts.get(name, 0) for name in names)
        for name in missing:
            importance[f"{name}.weight"] = np.asarray((total / max(1, count)).numpy(), np.float32)
        filled += len(missing)
    return filled
