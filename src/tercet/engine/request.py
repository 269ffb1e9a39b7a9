"""The inputs and outputs of an engine: requests, sampling settings, completions, scores.

These types do not depend on how tokens are computed, so they are the same for every backend.
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
# Where the values of unset sampling fields come from; see `tercet.engine.sampling_defaults`.
SamplingChoice = Literal["default", "greedy", "neutral"]


@dataclass(frozen=True)
class Sampling:
    """The settings that choose the next token and end the output.

    The order is that of transformers: penalties, temperature, top-k, top-p, min-p, draw. ``logit_bias``
    is added before them. Without a ``seed`` every call draws different tokens; with a seed the same
    request gives the same tokens, whatever else is in the batch.

    Raises:
        UserError: a value is outside of its range.
    """

    max_tokens: int = 256  # the largest length of the output; less where the model's context ends
    temperature: float = 0.7  # 0: greedy, the most likely token every time
    top_k: int = 0  # draw only from the k most likely tokens; 0: off
    top_p: float = 1.0  # the fewest tokens whose probabilities reach p (nucleus, arXiv:1904.09751)
    min_p: float = 0.0  # tokens at least this fraction as likely as the best one (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # on tokens of prompt and output; divides the logit (arXiv:1909.05858)
    presence_penalty: float = 0.0  # subtracted once from every token of the output so far
    frequency_penalty: float = 0.0  # subtracted once for every time the token is in the output so far
    seed: int | None = None
    stop: tuple[str, ...] = ()  # the output ends before any of these strings; its text never contains them
    logprobs: int | None = None  # None: off; n: each token's log-probability and the n most likely
    ignore_eos: bool = False  # continue after the model's stop tokens, up to max_tokens
    # Added to the logits of these tokens; -100 practically excludes a token, 100 practically forces it.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        for name, description, is_valid in _RANGES:
            value = getattr(self, name)
            if name in _OPTIONAL and value is None:
                continue
            kinds = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                kind = "whole number" if name in _WHOLE else "finite number"
                raise UserError(f"`{name}` is {value!r}; it must be a {kind}")
            if not is_valid(value):
                raise UserError(f"`{name}` is {value}; it must be {description}")
        for text in self.stop:
            value = text
            if not isinstance(value, str) or not value:
                raise UserError(f"`stop` holds {text!r}; every stop must be a string that is not empty")
        self._check_bias()

    def _check_bias(self) -> None:
        """Raise UserError unless ``logit_bias`` maps token ids to numbers between -100 and 100."""
        for token, bias in (self.logit_bias or {}).items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UserError(f"`logit_bias` has the key {token!r}; keys are token ids, 0 or more")
            is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not is_number or not -100 <= bias <= 100:
                raise UserError(f"`logit_bias` of token {token} is {bias!r}; it must be between -100 and 100")

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
    """One prompt and the settings of its output.

    Attributes:
        tokens: the prompt's token ids.
        sampling: the settings that choose tokens and end the output.
        constraint: the form that the output must have; None for any.
        adapter: the name of an adapter that `Engine.add_adapter` loaded; None for the weights alone.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    constraint: Grammar | None = None
    adapter: str | None = None


@dataclass
class Usage:
    """The numbers of tokens of prompt and completion, and their cost.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the output.
        cost: in US dollars, where a price is known.
        cached_tokens: tokens of the prompt that were computed for an earlier request.
    """

    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None
    cached_tokens: int = field(default=0, compare=False)  # about the computation, not the output


@dataclass
class TokenLogprob:
    """One token's natural log-probability under the model's own distribution.

    That is the softmax of the raw logits, before temperature, penalties and truncation.

    Attributes:
        token_id: the token.
        token: the token's text alone, with U+FFFD where it is a part of a character.
        logprob: its natural log-probability.
        bytes: the bytes that the token adds to the output (none for a special token); joined, those of
            all tokens give the text, up to a stop string.
        top: the likeliest tokens.
        entropy: of the whole distribution in nats, the expected surprise; None from a server.
    """

    token_id: int
    token: str
    logprob: float
    bytes: bytes
    top: list[tuple[int, str, float]] = field(default_factory=list)  # id, text, log-probability; best first
    entropy: float | None = None


@dataclass
class Completion:
    """The output of one request.

    Attributes:
        text: without stop tokens, other special tokens and stop strings.
        tokens: all generated tokens, including a stop token at the end.
        logprobs: one for each token, where they are requested.
        usage: the numbers of tokens.
        finish_reason: "stop" for a stop token, a stop string or a complete constraint, else "length".
        seconds: from when the request began to run to its end.
        parsed: the value of the text where a schema was requested: an instance of the pydantic class,
            or the value of the JSON. The engine leaves it to its caller.
        drafted: tokens that speculation proposed.
        accepted: how many of them are in the output.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    usage: Usage
    finish_reason: FinishReason
    seconds: float
    parsed: Any = None
    drafted: int = 0
    accepted: int = 0


@dataclass
class Delta:
    """A piece of one request's output while it is streamed.

    The texts of a request's deltas, joined, are the text of its completion; the same holds for tokens
    and logprobs.

    Attributes:
        index: the request: its index in the call, or its handle from `Engine.submit`.
        text: whole characters, and never a part of a stop string.
        tokens: the tokens since the last delta.
        logprobs: one for each of these tokens, where they are requested.
        completion: the whole output, in the last delta of a request that finished.
        error: the reason, in the last delta of a request that failed.
    """

    index: int
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
    is_greedy: bool  # every token is the most likely one, so greedy decoding would write this continuation
