"""Fields that several endpoints share, and their conversion to the engine's settings.

Bodies are read strictly: strings are not converted to numbers, and unknown fields are refused. ``null`` means
the default everywhere. `refuse` refuses unsupported fields that would change the output.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tercet.engine.request import Sampling, Usage
from tercet.engine.sampling_defaults import with_defaults
from tercet.errors import UserError
from tercet.serve.errors import from_user_error, invalid_value, missing_parameter, unsupported
from tercet.serve.models import Served

CHOICES = 128  # answers to one prompt at most, as at OpenAI
SMALLEST_TOP_P = 1e-9  # used for 0: the best token alone, which always remains
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """A request, or a part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False)


class StreamOptions(Body):
    """``include_usage``: a last chunk with the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """Sampling settings: OpenAI's fields, and four that OpenAI lacks."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: Int64 | None = None
    stop: StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Not OpenAI's: as vLLM calls them.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None

    def check_stream(self) -> None:
        """Raise APIError for stream options without a stream."""
        if self.stream_options is None:
            return
        if not self.stream:
            raise invalid_value("stream_options", "needs stream: true")
        if self.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation", "this server does not pad streams")

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that contains its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, served: Served, max_tokens: int, logprobs: int | None, number: int = 0) -> Sampling:
        """Return the engine's settings for choice ``number``. APIError for settings that the model lacks."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return Sampling(
                max_tokens=max_tokens,
                **sampling_values(
                    served,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                ),
                presence_penalty=float(self.presence_penalty or 0.0),
                frequency_penalty=float(self.frequency_penalty or 0.0),
                seed=choice_seed(self.seed, number),
                stop=stop,
                logprobs=logprobs,
                ignore_eos=bool(self.ignore_eos),
                logit_bias=self._bias(served),
            )
        except UserError as problem:
            raise from_user_error(problem) from problem

    def _bias(self, served: Served) -> dict[int, float] | None:
        size = served.worker.engine.backend.vocab_size
        biases = {}
        for token, bias in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdecimal() or len(token) > 10 or int(token) >= size:
                raise invalid_value(
                    "logit_bias",
                    f"has the key {token!r:.40}; the keys must be token ids from 0 to {size - 1}",
                )
            biases[int(token)] = float(bias)
        return biases or None


def sampling_values(served: Served, **fields: float | None) -> dict[str, Any]:
    """Return the values that choose tokens, for `Sampling`: the request's, then the model's defaults.

    Args:
        served: the model.
        **fields: fields of `tercet.engine.sampling_defaults.FIELDS`; None where the request does not set it.
    """
    requested = {name: value for name, value in fields.items() if value is not None}
    if "top_k" in requested:
        requested["top_k"] = max(0, requested["top_k"])  # -1 is off too
    if "top_p" in requested:
        requested["top_p"] = max(float(requested["top_p"]), SMALLEST_TOP_P)
    return with_defaults(requested, served.sampling_defaults)


def choice_seed(seed: int | None, number: int) -> int | None:
    """Return a seed for choice ``number`` of a request: different for each choice, the same every time."""
    if seed is None:
        return None
    # Steps of the golden ratio in 64 bits, so that neighbouring seeds give different choices.
    return (seed + number * 0x9E3779B97F4A7C15) % 2**64


def answer_limit(served: Served, tokens: list[int], max_tokens: int | None) -> int:
    """Return how many tokens an answer may have: ``max_tokens``, or fewer where the context ends before."""
    room = served.answer_room(tokens)
    return room if max_tokens is None else min(max_tokens, room)


def string_field(entry: Mapping[str, Any], key: str, where: str) -> str:
    """Return ``entry[key]``. APIError 400 where it is missing or not a string."""
    value = entry.get(key)
    if value is None:
        raise missing_parameter(f"{where}.{key}")
    if not isinstance(value, str):
        raise invalid_value(f"{where}.{key}", "must be a string", "invalid_type")
    return value


def refuse(body: BaseModel, reasons: dict[str, str]) -> None:
    """Raise APIError for the first field of ``reasons`` that is not null."""
    for name, reason in reasons.items():
        if getattr(body, name) is not None:
            raise unsupported(name, reason)


def new_id(prefix: str) -> str:
    """Return a new identifier such as ``chatcmpl-…``."""
    return f"{prefix}-{secrets.token_hex(14)}"


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Return usage in OpenAI's shape."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def total_usage(prompt_tokens: int, usages: Sequence[Usage], answers_per_prompt: int = 1) -> dict[str, Any]:
    """Return the usage of several answers; each prompt counts once.

    Args:
        prompt_tokens: tokens of all prompts together.
        usages: of the answers, in the order of the prompts.
        answers_per_prompt: how many answers each prompt has.
    """
    return usage_object(
        prompt_tokens,
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages[::answers_per_prompt]),
    )


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can express: OpenAI writes -9999 for an impossible token."""
    return logprob if math.isfinite(logprob) else -9999.0
