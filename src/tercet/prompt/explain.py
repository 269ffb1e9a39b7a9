"""How a model reads a text and continues it: the probability of each token, and the alternatives.

A language model assigns to every token of its vocabulary a probability of being next. The surprise of the
token that came is -log2 p in bits: 0 for a certain token, 1 for a token with a probability of a half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.engine.request import TokenLogprob


@dataclass(frozen=True)
class Alternative:
    """A token that might have come.

    id: -1 from a server, whose protocol has no ids.
    """

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One token, and the model's distribution before it.

    id: -1 from a server, whose protocol has no ids.
    token: its text.
    probability: None for the first token of a text, which has no tokens before it.
    surprise: in bits; None likewise.
    alternatives: the likeliest tokens, the best first; the token itself is among them if it was likely.
    entropy: the expected surprise in bits; None from a server.
    """

    id: int
    token: str
    probability: float | None
    surprise: float | None
    alternatives: list[Alternative]
    entropy: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A text as a model reads it, and its continuation.

    model: the model's reference.
    read: the tokens of the text, including those of a chat template; empty from a server.
    written: the tokens of the continuation; the alternatives of its first step may come next.
    finish_reason: why the continuation ended: "stop" or "length".
    """

    model: str
    read: list[Step]
    written: list[Step]
    finish_reason: str

    @property
    def bits_per_token(self) -> float | None:
        """Mean surprise of the tokens that were read, except the first; None where there are none."""
        known = [step.surprise for step in self.read if step.surprise is not None]
        return sum(known) / len(known) if known else None


def step_of(entry: TokenLogprob) -> Step:
    """Return the step for a token that an engine or a server describes in natural logarithms."""
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
    """Return the steps of a text that was read.

    Args:
        tokens: token ids of the text.
        texts: text of each token.
        entries: log-probabilities of each token; the first is None, since no tokens come before it.
    """
    return [
        Step(token, text, None, None, []) if entry is None else step_of(entry)
        for token, text, entry in zip(tokens, texts, entries, strict=True)
    ]
