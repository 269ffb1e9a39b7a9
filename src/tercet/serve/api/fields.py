"""Fields that several endpoints share, and their conversion to the engine's settings.

Bodies are read strictly: strings are not converted to numbers, and unknown fields are refused. ``null`` means
the default everywhere. The classes of the fields are explained in `tercet.serve.api.field_table`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tercet.engine.request import Sampling, Usage
from tercet.engine.sampling_defaults import with_defaults
from tercet.errors import UserError
from tercet.serve.api.field_table import Body, Hint, Ignored, OpenBody, Refused, Used
from tercet.serve.errors import from_user_error, invalid_value, missing_parameter
from tercet.serve.models import Served

CHOICES = 128  # answers to one prompt at most, as at OpenAI
SMALLEST_TOP_P = 1e-9  # used for 0: the best token alone, which always remains
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1)]


def _no_limit(value: Any) -> Any:
    """Return None for -1, which means "no limit" in llama.cpp and its clients."""
    return None if type(value) is int and value == -1 else value


TokenLimit = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_limit)]
ModelName = Annotated[
    str | None, Used("name of the model, as in `/v1/models`; may be left out where one model is served")
]
# The tools of chat completions and of responses.
Tools = Annotated[
    list[Any] | None,
    Used("functions; tools of every other type are not offered to the model, and named in `x-ignored`"),
]
ToolChoice = Annotated[
    str | dict[str, Any] | None, Used("`none`, `auto`, `required`, a function, or `allowed_tools`")
]
ParallelCalls = Annotated[bool | None, Used("false: one call at most, enforced")]

# Fields that change no answer, whatever they hold.
NOT_STORED = Hint("this server stores no answers", (False,))
NO_CACHE_SETTINGS = Hint("this server reuses the common beginning of prompts by itself")
NO_TIERS = Hint("this server answers all requests alike", ("auto", "default", "standard", "standard_only"))
NO_USERS = Hint("this server does not distinguish its users")
User = Annotated[Any, NO_USERS]


class StreamOptions(OpenBody):
    """``include_usage``: a last chunk with the usage."""

    include_usage: Annotated[bool | None, Used("a last chunk with the usage")] = None
    include_obfuscation: Annotated[Any, Hint("this server does not pad streams", (False,))] = None


class SamplingBody(Body):
    """Sampling settings: OpenAI's fields, and those that vLLM and llama.cpp add."""

    model: ModelName = None
    temperature: Annotated[
        Annotated[float, Field(ge=0, le=2)] | None, Used("0 to 2; 0 selects the most probable token")
    ] = None
    top_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Used("0 to 1")] = None
    presence_penalty: Annotated[Annotated[float, Field(ge=-2, le=2)] | None, Used("-2 to 2")] = None
    frequency_penalty: Annotated[Annotated[float, Field(ge=-2, le=2)] | None, Used("-2 to 2")] = None
    logit_bias: Annotated[
        dict[str, Bias] | None,
        Used("maps a token id to -100 … 100; added to the logits before the penalties"),
    ] = None
    seed: Annotated[
        Int64 | None,
        Used("the same request and seed give the same answer; the `n` choices differ from each other"),
    ] = None
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None,
        Used("one string, or up to four; the answer ends before them"),
    ] = None
    n: Annotated[
        Annotated[int, Field(ge=1, le=CHOICES)] | None, Used("1 to 128 answers, sampled independently")
    ] = None
    stream: Annotated[bool | None, Used("send the answer while it is written")] = None
    stream_options: Annotated[StreamOptions | None, Used("ignored without `stream`")] = None
    user: User = None
    # Not OpenAI's: as vLLM, llama.cpp, Ollama and OpenRouter call them.
    top_k: Annotated[Annotated[int, Field(ge=-1)] | None, Used("0 or -1: off")] = None
    min_p: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Used("only tokens at least this fraction as likely as the best one"),
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Field(gt=0, le=10)] | None, Used("above 0 to 10; 1 is off")
    ] = None
    ignore_eos: Annotated[bool | None, Used("go on after the model's stop tokens")] = None
    cache_prompt: Annotated[Any, Hint(NO_CACHE_SETTINGS.reason, (True,))] = None
    id_slot: Annotated[Any, Hint("this server has no slots", (-1,))] = None
    priority: Annotated[Any, Hint(NO_TIERS.reason, (0,))] = None
    keep_alive: Annotated[Any, Hint("models of this server stay loaded")] = None
    request_id: Annotated[Any, Hint("this server names its answers itself, in x-request-id")] = None
    cache_salt: Annotated[Any, NO_CACHE_SETTINGS] = None
    timings_per_token: Annotated[Any, Hint("this server reports no timings", (False,))] = None
    return_progress: Annotated[Any, Hint("streams tell the progress in comments", (False,))] = None
    provider: Annotated[Any, Hint("the model of the request answers, on this server")] = None
    transforms: Annotated[Any, Hint("this server never shortens a conversation", ([],))] = None
    usage: Annotated[Any, Hint("the usage is in every answer; see stream_options for streams")] = None
    skip_special_tokens: Annotated[Any, Refused("texts never hold special tokens", (True,))] = None
    min_tokens: Annotated[Any, Refused("use ignore_eos with max_tokens", (0,))] = None

    def review(self, ignored: Ignored, where: str = "") -> None:
        """Apply the classes of the fields; options of a stream are ignored where there is none."""
        super().review(ignored, where)
        if self.stream_options is not None and not self.stream:
            ignored.add("stream_options", "it has no effect without stream: true")

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
