"""Measure which columns of each matrix matter: the mean squared activation that they multiply.

This is llama.cpp's importance matrix (``llama-imatrix``). Quantisation weighs a column's squared error by it,
since a column's error times its input is what an output is off by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tercet.data.measured_text import token_rows
from tercet.errors import UserError
from tercet.model.importance import column_importance
from tercet.model.layerwise import Matrices
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Floats

TOKENS = 16_000  # bounds the time
HELD_OUT = 2_000  # further tokens of the text, for the check
FEWEST = 500


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
    importance, unseen = column_importance(weights, measured)
    return Calibration(importance, measured.numel(), held_out if held_out.numel() >= 2 else None, unseen)
