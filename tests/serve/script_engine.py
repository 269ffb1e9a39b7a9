"""A model that says what it is told: an engine on a backend that wants one token after the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.engine.engine import Engine
from tercet.model.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from fake_backend import FakeBackend


class ScriptBackend(FakeBackend):
    """After the last ``<|assistant|>`` come the tokens of ``says``, then the end.

    A token that a constraint forbids is replaced by the likeliest that it allows, and the script goes on
    behind it. ``last``: what was read of the last answer, prompt and all.
    """

    def __init__(self, tokenizer: Tokenizer, max_positions: int = 4096) -> None:
        super().__init__(
            tokenizer.vocab_size, num_pages=1024, page_size=16, max_tokens=256, max_positions=max_positions
        )
        self._tokenizer = tokenizer
        self._begin = tokenizer.id_of("<|assistant|>")
        self.says = ""
        self.last: list[int] = []

    def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        self.last = list(history)
        said = len(history) - 1 - max(n for n, token in enumerate(history) if token == self._begin)
        script = [*self._tokenizer.encode(self.says, special=False), self._tokenizer.eos_id]
        scores = np.zeros(self.vocab_size, np.float32)
        scores[self._tokenizer.eos_id] = 1  # rather than going on for ever
        scores[script[min(said, len(script) - 1)]] = 20
        return scores


def engine_saying(tokenizer: Tokenizer, max_positions: int = 4096) -> tuple[Engine, ScriptBackend]:
    """An engine, and the backend whose ``says`` is the script."""
    backend = ScriptBackend(tokenizer, max_positions)
    assert tokenizer.eos_id is not None
    return Engine(backend, tokenizer, [tokenizer.eos_id]), backend
