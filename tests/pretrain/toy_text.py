"""Texts of a toy language, and the settings of the smallest network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tercet.pretrain.spool import Spool

WORDS = (
    "the", "a", "small", "red", "green", "cat", "dog", "runs", "sleeps", "under", "tree", "house", "and", "then",
)  # fmt: skip
SMALL: dict[str, Any] = {"layers": 1, "width": 32, "vocab_size": 300, "context": 32, "batch_tokens": 256}


def text_of(seed: int, count: int = 60) -> str:
    """A sentence of ``count`` random words."""
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, count)) + ".\n"


def spool_of(path: Path, texts: list[str]) -> Spool:
    """A spool of ``texts``, all from one source."""
    spool = Spool(path)
    for text in texts:
        spool.append(text, "source")
    return spool
