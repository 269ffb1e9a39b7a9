"""Requests to Ollama's API: their fields, and the settings of the engine.

https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tercet.engine.grammar import Grammar
from tercet.engine.request import Sampling
from tercet.errors import UserError
from tercet.serve.api.field_table import Hint, Ignored, OpenBody, Refused, Used, WhereKnown
from tercet.serve.api.fields import Int64, StopText, answer_limit, choice_seed, sampling_values
from tercet.serve.api.prompts import TokenId
from tercet.serve.api.response_format import checked_schema
from tercet.serve.errors import from_user_error, invalid_value
from tercet.serve.models import Served

Json = dict[str, Any]
_REMOVED = Hint("Ollama has removed this option, too")
_LOADED = Hint("the server's own settings decide how a model is loaded")
_STAYS = Hint("models of this server stay loaded")
_READS_TEXT = Refused("models of this server read text", ([],))


def _whole(value: Any) -> Any:
    """Return 40 for 40.0: some clients have no whole numbers."""
    return int(value) if type(value) is float and value.is_integer() else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


WholeNumber = Annotated[Int64, BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Options(OpenBody):
    """``options``. Where a value is not set, the publisher's applies, as at the other endpoints."""

    temperature: Annotated[
        Annotated[float, Field(ge=0)] | None, Used("0 selects the most probable token")
    ] = None
    top_k: Annotated[WholeNumber | None, Used("0 or less: off")] = None
    top_p: Annotated[Fraction | None, Used("0 to 1")] = None
    min_p: Annotated[
        Fraction | None, Used("only tokens at least this fraction as likely as the best one")
    ] = None
    seed: Annotated[
        WholeNumber | None, Used("the same request and seed give the same answer; -1: another one each time")
    ] = None
    num_predict: Annotated[
        Annotated[WholeNumber, Field(ge=-2)] | None,
        Used("the largest length of the answer; 0, -1 and -2: up to the end of the context"),
    ] = None
    stop: Annotated[
        StopText | list[StopText] | None, Used("one string or several; the answer ends before them")
    ] = None
    repeat_penalty: Annotated[
        Annotated[float, Field(gt=0, le=10)] | None, Used("above 0 to 10; 1 is off")
    ] = None
    repeat_last_n: Annotated[
        Annotated[WholeNumber, Field(ge=-1)] | None,
        Used("0: no penalties; -1: on all tokens; other numbers are ignored, as penalties are on all tokens"),
    ] = None
    presence_penalty: Annotated[Penalty | None, Used("-2 to 2")] = None
    frequency_penalty: Annotated[Penalty | None, Used("-2 to 2")] = None
    typical_p: Annotated[Any, Refused("this server does not have it", (1, 1.0))] = None
    num_ctx: Annotated[Any, Hint("the context is the model's own, whose length `/api/show` tells")] = None
    num_keep: Annotated[Any, Hint("this server never shortens a prompt")] = None
    num_batch: Annotated[Any, _LOADED] = None
    num_gpu: Annotated[Any, _LOADED] = None
    main_gpu: Annotated[Any, _LOADED] = None
    num_thread: Annotated[Any, _LOADED] = None
    use_mmap: Annotated[Any, _LOADED] = None
    draft_num_predict: Annotated[Any, _LOADED] = None
    numa: Annotated[Any, _REMOVED] = None
    use_mlock: Annotated[Any, _REMOVED] = None
    low_vram: Annotated[Any, _REMOVED] = None
    f16_kv: Annotated[Any, _REMOVED] = None
    logits_all: Annotated[Any, _REMOVED] = None
    vocab_only: Annotated[Any, _REMOVED] = None
    tfs_z: Annotated[Any, _REMOVED] = None
    penalize_newline: Annotated[Any, _REMOVED] = None
    mirostat: Annotated[Any, _REMOVED] = None
    mirostat_eta: Annotated[Any, _REMOVED] = None
    mirostat_tau: Annotated[Any, _REMOVED] = None

    def review(self, ignored: Ignored, where: str = "") -> None:
        """Apply the classes of the fields."""
        super().review(ignored, where)
        if (self.repeat_last_n or 0) > 0:
            ignored.add(f"{where}repeat_last_n", "penalties are on all tokens of prompt and answer")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_tokens(self) -> int | None:
        """The largest length of the answer; None: up to the end of the context."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None

    @property
    def penalties(self) -> dict[str, float]:
        """The penalties on repetition that are set, by the engine's names; all off with ``repeat_last_n`` 0."""
        if self.repeat_last_n == 0:
            return {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        values = {
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    @property
    def draw_seed(self) -> int | None:
        """The seed in the engine's range; None for -1."""
        return None if self.seed in (None, -1) else choice_seed(self.seed, 0)

    def sampling(self, served: Served, tokens: list[int], logprobs: int | None) -> Sampling:
        """Return the engine's settings for an answer to ``tokens``. APIError 400 for a wrong value."""
        penalties = self.penalties
        try:
            return Sampling(
                max_tokens=answer_limit(served, tokens, self.max_tokens),
                seed=self.draw_seed,
                stop=self.stops,
                logprobs=logprobs,
                presence_penalty=penalties.get("presence_penalty", 0.0),
                frequency_penalty=penalties.get("frequency_penalty", 0.0),
                **sampling_values(
                    served,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    repetition_penalty=penalties.get("repetition_penalty"),
                ),
            )
        except UserError as problem:
            raise from_user_error(problem, "options") from problem


class ModelBody(OpenBody):
    """What every request has."""

    model: Annotated[
        str | None,
        Used(
            "name of the model, as in `/api/tags`, with or without `:latest`; may be left out where one model "
            "is served"
        ),
    ] = None
    keep_alive: Annotated[Any, _STAYS] = None
    options: Annotated[Options | None, Used("see its fields")] = None

    @property
    def unloads(self) -> bool:
        """Whether the request, where it is empty, is to unload the model."""
        return self.keep_alive in (0, "0") or (
            isinstance(self.keep_alive, str) and bool(self.keep_alive) and not self.keep_alive.strip("0smh")
        )


class AnswerBody(ModelBody):
    """What ``/api/chat`` and ``/api/generate`` share."""

    stream: Annotated[bool | None, Used("lines of JSON while the answer is written; true by default")] = None
    format: Annotated[
        str | dict[str, Any] | None, Used("`json`, or a JSON Schema, which is enforced token by token")
    ] = None
    think: Annotated[
        bool | Literal["low", "medium", "high", "max"] | None,
        WhereKnown("true, false or a level: `enable_thinking` or `reasoning_effort` of the chat template"),
    ] = None
    logprobs: Annotated[bool | None, Used("log-probabilities of all tokens of the answer")] = None
    top_logprobs: Annotated[
        Annotated[WholeNumber, Field(ge=0, le=20)] | None, Used("0 to 20, with `logprobs: true`")
    ] = None
    truncate: Annotated[
        Any, Hint("this server never shortens a conversation; one that is too long is refused", (False,))
    ] = None
    shift: Annotated[Any, Hint("an answer ends where the context ends", (False,))] = None

    @property
    def shown_logprobs(self) -> int | None:
        """How many alternatives each log-probability has; None: there are none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def effort(self) -> str | None:
        """``think`` as a level of effort."""
        if self.think is None or isinstance(self.think, str):
            return "high" if self.think == "max" else self.think
        return "medium" if self.think else "none"

    async def form(self) -> Grammar | None:
        """Return the grammar of the answer; None for any text. APIError 400 where it cannot be enforced."""
        if not self.format:
            return None
        if self.format == "json":
            return await checked_schema({"type": "object"}, "format")
        if isinstance(self.format, str):
            raise invalid_value("format", f"is {self.format!r:.60}; it must be json or a JSON Schema")
        return await checked_schema(self.format, "format")


class CalledFunction(OpenBody):
    """The function of an earlier call."""

    name: Annotated[str, Used("its name")]
    arguments: Annotated[dict[str, Any] | None, Used("an object")] = None
    index: Annotated[Any, Hint("calls are in their order", tuple(range(128)))] = None


class EarlierCall(OpenBody):
    """An earlier call of the assistant."""

    function: Annotated[CalledFunction, Used("name and arguments")]
    id: Annotated[str | None, Used("which results name")] = None
    type: Annotated[Any, Hint("all calls are of functions", ("function",))] = None


class InputMessage(OpenBody):
    """One message."""

    role: Annotated[
        Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_lower)],
        Used("`system`, `user`, `assistant` or `tool`"),
    ]
    content: Annotated[str | None, Used("a text; may be missing")] = None
    thinking: Annotated[str | None, WhereKnown("the assistant's earlier reasoning")] = None
    tool_calls: Annotated[list[EarlierCall] | None, Used("earlier calls of the assistant")] = None
    tool_name: Annotated[str | None, Used("the function whose result this is")] = None
    tool_call_id: Annotated[str | None, Used("the call whose result this is")] = None
    images: Annotated[Any, _READS_TEXT] = None


class ChatRequest(AnswerBody):
    """The body of ``POST /api/chat``."""

    messages: Annotated[
        list[InputMessage] | None,
        Used("the conversation; a last message of the assistant is continued; none: the answer is empty"),
    ] = None
    tools: Annotated[
        list[Any] | None, Used("functions; tools of other types are not offered, and named in `x-ignored`")
    ] = None


class GenerateRequest(AnswerBody):
    """The body of ``POST /api/generate``."""

    prompt: Annotated[str | None, Used("the user's message; none: the answer is empty")] = None
    system: Annotated[str | None, Used("the system message")] = None
    raw: Annotated[bool | None, Used("true: the prompt is continued as it is, without the chat template")] = (
        None
    )
    context: Annotated[
        list[TokenId] | None, Used("`context` of an earlier answer, which the conversation continues")
    ] = None
    suffix: Annotated[
        str | None, Refused("models of this server only continue texts; they cannot insert", ("",))
    ] = None
    template: Annotated[
        str | None, Refused("prompts follow the model's own chat template; send `raw` text instead", ("",))
    ] = None
    images: Annotated[Any, _READS_TEXT] = None


class EmbedRequest(ModelBody):
    """The body of ``POST /api/embed``."""

    input: Annotated[str | list[str] | None, Used("a text or several")] = None
    truncate: Annotated[
        bool | None, Used("false: a text that is too long is refused; otherwise its end is cut off")
    ] = None
    dimensions: Annotated[
        WholeNumber | None, Used("keeps the first components and scales them to length 1")
    ] = None


class EmbeddingsRequest(ModelBody):
    """The body of ``POST /api/embeddings``, the older form."""

    prompt: Annotated[str | None, Used("a text, whose end is cut off where it is too long")] = None


class ShowRequest(OpenBody):
    """The body of ``POST /api/show``."""

    model: Annotated[str | None, Used("name of the model")] = None
    name: Annotated[str | None, Used("the older name of `model`")] = None
    verbose: Annotated[Any, Hint("there is no more to tell", (False,))] = None
    system: Annotated[Any, Hint("it changes nothing of the model", ("",))] = None
    template: Annotated[Any, Hint("it changes nothing of the model", ("",))] = None
    options: Annotated[Any, Hint("they change nothing of the model", ({},))] = None


class PullRequest(OpenBody):
    """The body of ``POST /api/pull``."""

    model: Annotated[str | None, Used("a reference, as for `tercet pull`")] = None
    name: Annotated[str | None, Used("the older name of `model`")] = None
    stream: Annotated[bool | None, Used("lines of JSON; true by default")] = None
    insecure: Annotated[Any, Hint("downloads are always verified", (False,))] = None
    username: Annotated[Any, Hint("HF_TOKEN of the server's environment is used", ("",))] = None
    password: Annotated[Any, Hint("HF_TOKEN of the server's environment is used", ("",))] = None
