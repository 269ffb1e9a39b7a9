"""The importance of a matrix's columns: the mean squared activation that they multiply.

This is llama.cpp's importance matrix (``llama-imatrix``). Quantisation weighs a column's squared error by it,
since a column's error times its input is what an output is off by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tercet.model.layerwise import EMBEDDING, HEAD, Matrices, hidden_states
from tercet.model.tensor_names import network_tensors
from tercet.model.weights import Floats

# An expert that few tokens were sent to is measured too badly to be used alone.
FEWEST_FOR_EXPERT = 32
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)")


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


def column_importance(weights: Matrices, tokens: Tensor) -> tuple[dict[str, Floats], int]:
    """Measure the inputs of every linear layer, the head too.

    Args:
        weights: the network's weights; each tensor is read once.
        tokens: token ids [rows, length].

    Returns:
        float32 [columns] by the network's name of a matrix (``....q_proj.weight``), and the number of matrices of
        experts that got the mean of their layer's, because few tokens or none were sent to them. A tied head
        goes by the embedding's name.
    """
    sums = _Sums()
    hidden = hidden_states(weights, tokens, sums.add)
    importance = {
        f"{name}.weight": (squares / sums.counts[name]).float().numpy()
        for name, squares in sums.squares.items()
        if _EXPERT.fullmatch(name) is None or sums.counts[name] >= FEWEST_FOR_EXPERT
    }
    head = EMBEDDING if weights.config.tie_embeddings else HEAD
    importance[head] = hidden.flatten(0, -2).double().square().mean(0).float().numpy()
    names = (part.name.removesuffix(".weight") for part in network_tensors(weights.config))
    unseen = _fill_experts(importance, sums, [name for name in names if _EXPERT.fullmatch(name)])
    return importance, unseen


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
