"""How a model reads a text and goes on from it: each token's probability, and what else might have come.

A language model does one thing: it gives every token of its vocabulary a probability of being next.
Surprise is what that was worth for the token that came, in bits: -log2 p. A token that was certain is
worth nothing; one that had a chance of a half is worth one bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.engine.request import TokenLogprob


@dataclass(frozen=True)
class Alternative:
    """A token that might have come. id: -1 from a server, whose protocol has none."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One token, and what the model thought before it came.

    probability, surprise (bits): None for the first token of a text, which nothing stands before.
    entropy: bits, the surprise that was to be expected there; None where a server does not tell.
    alternatives: the likeliest tokens there, the best first; the token itself is among them if it was likely.
    """

    id: int
    token: str
    probability: float | None
    surprise: float | None
    alternatives: list[Alternative]
    entropy: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A text as a model reads it, and what it writes after it.

    read: the tokens of the text, a chat template's among them; empty where a server does not tell.
    written: the tokens that the model went on with; its first step's alternatives are what may come next.
    finish_reason: why it ended: "stop" or "length".
    """

    model: str
    read: list[Step]
    written: list[Step]
    finish_reason: str

    @property
    def bits_per_token(self) -> float | None:
        """Mean surprise of the text that was read; None where fewer than two tokens are known."""
        known = [step.surprise for step in self.read if step.surprise is not None]
        return sum(known) / len(known) if known else None


def step_of(entry: TokenLogprob) -> Step:
    """The step that an engine or a server describes in natural logarithms."""
    return Step(
        entry.token_id,
        entry.token,
        math.exp(entry.logprob),
        max(0.0, -entry.logprob / math.log(2)),
        [Alternative(token_id, text, math.exp(logprob)) for token_id, text, logprob in entry.top],
        None if entry.entropy is None else max(0.0, entry.entropy / math.log(2)),
    )


def steps_read(
    tokens: Sequence[int], texts: Sequence[str], entries: Sequence[TokenLogprob | None]
) -> list[Step]:
    """The steps of a text that was read; ``entries[0]`` is None, since nothing stands before it."""
    return [
        Step(token, text, None, None, []) if entry is None else step_of(entry)
        for token, text, entry in zip(tokens, texts, entries, strict=True)
    ]
