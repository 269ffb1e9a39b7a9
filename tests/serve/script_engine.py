"""A model that writes a script: an engine on a backend that prefers the script's next token."""

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
    """A backend that writes the tokens of ``says`` after the last ``<|assistant|>``, then the end token.

    If a constraint forbids a token of the script, the likeliest allowed token replaces it, and the script
    continues after it. ``last`` holds the tokens read for the last answer, including the prompt.
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
        scores[self._tokenizer.eos_id] = 1  # otherwise a constrained answer might never end
        scores[script[min(said, len(script) - 1)]] = 20
        return scores


def scripted_engine(tokenizer: Tokenizer, max_positions: int = 4096) -> tuple[Engine, ScriptBackend]:
    """Return an engine and its backend; the backend's ``says`` is the script."""
    backend = ScriptBackend(tokenizer, max_positions)
    assert tokenizer.eos_id is not None
    return Engine(backend, tokenizer, [tokenizer.eos_id]), backend
