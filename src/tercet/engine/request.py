"""What goes into an engine and what comes out: requests, sampling settings, completions.

Nothing here knows how tokens are computed. A backend may change; these types do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.engine.grammar import Grammar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end.

    The order is that of transformers: penalties, temperature, top-k, top-p, min-p, draw; before them
    ``logit_bias`` is added.
    Without a ``seed`` every call draws anew; with one the same request gives the same tokens,
    whatever else is in the batch.

    Raises:
        UserError: a value is outside of its range.
    """

    max_tokens: int = 256  # at most; fewer when the model's context ends before
    temperature: float = 0.7  # 0: greedy, the most likely token every time
    top_k: int = 0  # draw from the k most likely tokens only; 0: off
    top_p: float = 1.0  # the fewest tokens whose probabilities reach p (nucleus, arXiv:1904.09751)
    min_p: float = 0.0  # tokens at least this fraction as likely as the best one (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # on tokens of prompt and output; divides the logit (arXiv:1909.05858)
    presence_penalty: float = 0.0  # subtracted once from every token of the output so far
    frequency_penalty: float = 0.0  # subtracted once for every time the token is in the output so far
    seed: int | None = None
    stop: tuple[str, ...] = ()  # end before any of these; they are never in the text
    logprobs: int | None = None  # None: off; n: each token's log-probability and the n most likely
    ignore_eos: bool = False  # go on past the model's stop tokens, up to max_tokens
    # Added to the logits of these tokens; -100 is as good as never, 100 as good as always.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        given: object = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(self.stop))
        for name, wanted, right in _RANGES:
            value = getattr(self, name)
            if name in _OPTIONAL and value is None:
                continue
            kinds = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                kind = "whole number" if name in _WHOLE else "finite number"
                raise UserError(f"{name} is {value!r}; it must be a {kind}")
            if not right(value):
                raise UserError(f"{name} is {value}; it must be {wanted}")
        for text in self.stop:
            checked: object = text
            if not isinstance(checked, str) or not checked:
                raise UserError(f"stop holds {text!r}; every stop must be a string that is not empty")
        self._check_bias()

    def _check_bias(self) -> None:
        for token, bias in (self.logit_bias or {}).items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UserError(f"logit_bias has the key {token!r}; keys are token ids, 0 or more")
            right = isinstance(bias, (int, float)) and not isinstance(bias, bool) and -100 <= bias <= 100
            if not right:
                raise UserError(f"logit_bias of token {token} is {bias!r}; it must be between -100 and 100")

    @property
    def penalizes(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias)


_WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
_OPTIONAL = ("seed", "logprobs")
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("max_tokens", "at least 1", lambda value: value >= 1),
    ("temperature", "0 (greedy) or more", lambda value: value >= 0),
    ("top_k", "0 (off) or more", lambda value: value >= 0),
    ("top_p", "above 0 and at most 1 (off)", lambda value: 0 < value <= 1),
    ("min_p", "between 0 (off) and 1", lambda value: 0 <= value <= 1),
    ("repetition_penalty", "above 0 (1 is off)", lambda value: value > 0),
    ("presence_penalty", "between -2 and 2 (0 is off)", lambda value: -2 <= value <= 2),
    ("frequency_penalty", "between -2 and 2 (0 is off)", lambda value: -2 <= value <= 2),
    ("seed", "0 or more", lambda value: value >= 0),
    ("logprobs", "0 or more", lambda value: value >= 0),
)


@dataclass(frozen=True)
class Request:
    """One prompt, already tokens, and how to go on from it.

    constraint: the form that the output must have; None: any.
    adapter: a name that `Engine.add_adapter` was given; None: the weights as they are.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    constraint: Grammar | None = None
    adapter: str | None = None


@dataclass
class Usage:
    """Tokens read and written; ``cost`` in US dollars where a price is known.

    cached_tokens: those of the prompt that were computed for an earlier request.
    """

    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None
    cached_tokens: int = field(default=0, compare=False)  # how it was computed, not what came


@dataclass
class TokenLogprob:
    """One token's natural log-probability under the model's own distribution.

    That is the softmax of the raw logits, before temperature, penalties and truncation. ``token``
    is the token's text alone (U+FFFD in it where it is part of a character); ``bytes`` are what
    the token adds to the output (nothing for a special token), so that all of them joined give the
    text, up to a stop string. ``entropy``: of the whole distribution in nats, the surprise that was to
    be expected; None from a server.
    """

    token_id: int
    token: str
    logprob: float
    bytes: bytes
    top: list[tuple[int, str, float]] = field(default_factory=list)  # id, text, log-probability; best first
    entropy: float | None = None


@dataclass
class Completion:
    """What one request gave.

    ``tokens`` are all that were generated, a stop token at the end included; ``text`` is without
    stop tokens, other special tokens and stop strings. ``parsed`` is what the text stands for where
    a schema was asked for (the engine leaves it to its caller): the instance of a pydantic class,
    or the value of the JSON.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    usage: Usage
    finish_reason: FinishReason
    seconds: float
    parsed: Any = None
    drafted: int = 0  # tokens that speculation proposed, ...
    accepted: int = 0  # ... and how many of them are in the output


@dataclass
class Delta:
    """A piece of one request's output while it is streamed.

    ``text`` holds whole characters and never a part of a stop string; the texts of a request
    joined are its completion's text, and the same goes for ``tokens`` and ``logprobs``. The last
    delta of a request has its ``completion``, or the ``error`` that it failed with.
    """

    index: int  # which request: its place in the call, or the handle of `Engine.submit`
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    completion: Completion | None = None
    error: Exception | None = None


@dataclass
class Score:
    """The log-probability of a continuation given its prompt (natural logarithm)."""

    logprob: float  # the sum of token_logprobs
    token_logprobs: list[float]
    tokens: list[int]
    is_greedy: bool  # every token is the most likely one: greedy decoding would write this
