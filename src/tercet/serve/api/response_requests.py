"""Requests to OpenAI's Responses API, read as a conversation and settings.

This server stores no responses, so everything that needs a stored response is refused. Only the items of
answers are kept for a while, because clients send references to them (`tercet.serve.api.kept_items`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar
from tercet.engine.request import Sampling
from tercet.serve.api.field_table import Body, Hint, Ignored, OpenBody, Refused, Used, WhereKnown
from tercet.serve.api.fields import (
    NO_CACHE_SETTINGS,
    NO_TIERS,
    NO_USERS,
    NOT_STORED,
    ModelName,
    ParallelCalls,
    TokenLimit,
    ToolChoice,
    Tools,
    User,
    sampling_values,
)
from tercet.serve.api.response_format import checked_schema
from tercet.serve.errors import invalid_value, missing_parameter, unsupported
from tercet.serve.models import Served

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
_NO_STORE = "this server stores no {}; send {}"


class TextFormat(Body):
    """The form of the answer's text."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"], Used("`text`, `json_object` or `json_schema`")
    ] = "text"
    name: Annotated[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None, Used("of a schema")] = (
        None
    )
    description: Annotated[Any, Hint("models do not read it")] = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema"), Used("the JSON Schema")] = None
    strict: Annotated[Any, Hint("every schema is enforced", (True, False))] = None


class TextConfig(OpenBody):
    """``text``."""

    format: Annotated[TextFormat | None, Used("enforced token by token")] = None
    verbosity: Annotated[
        Any, Hint("no model of this server has this setting; describe the length in the prompt", ("medium",))
    ] = None


class Reasoning(OpenBody):
    """``reasoning``."""

    effort: Annotated[
        str | None, WhereKnown("a switch of the chat template: `enable_thinking` or `reasoning_effort`")
    ] = None
    summary: Annotated[Any, Hint("models of this server write no summaries of their reasoning")] = None
    generate_summary: Annotated[Any, Hint("it is deprecated; see summary")] = None


class StreamOptions(OpenBody):
    """``stream_options``."""

    include_obfuscation: Annotated[Any, Hint("this server does not pad streams", (False,))] = None


class InputRequest(Body):
    """The body of ``POST /v1/responses/input_tokens``: what the model reads."""

    model: ModelName = None
    input: Annotated[
        str | Annotated[list[dict[str, Any]], Field(min_length=1)], Used("a text, or a list of items")
    ]
    instructions: Annotated[str | None, Used("a system message before the input")] = None
    text: Annotated[TextConfig | None, Used("the form of the answer")] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: ParallelCalls = None
    reasoning: Annotated[Reasoning | None, Used("settings of models that reason")] = None
    truncation: Annotated[
        Any, Hint("this server never shortens an input; one that is too long is refused", ("disabled",))
    ] = None
    personality: Annotated[Any, Hint("models of this server have one personality")] = None
    previous_response_id: Annotated[
        Any, Refused(_NO_STORE.format("responses", "the whole conversation as input"))
    ] = None
    conversation: Annotated[
        Any, Refused(_NO_STORE.format("conversations", "the whole conversation as input"))
    ] = None

    @property
    def format(self) -> TextFormat:
        """``text.format``, or plain text."""
        return (self.text and self.text.format) or TextFormat()

    @property
    def effort(self) -> str | None:
        """``reasoning.effort``."""
        return self.reasoning.effort if self.reasoning is not None else None

    async def form(self) -> Grammar | None:
        """Return the grammar of the answer's text. APIError 400 for a schema that cannot be enforced."""
        form = self.format
        if form.type == "text":
            return None
        if form.type == "json_object":
            return await checked_schema({"type": "object"}, "text.format")
        for name, value in (("name", form.name), ("schema", form.schema_)):
            if value is None:
                raise missing_parameter(f"text.format.{name}")
        return await checked_schema(form.schema_ or {}, "text.format.schema")


class ResponseRequest(InputRequest):
    """The body of ``POST /v1/responses``."""

    stream: Annotated[bool | None, Used("send the answer while it is written")] = None
    stream_options: Annotated[StreamOptions | None, Used("see its fields")] = None
    max_output_tokens: Annotated[TokenLimit, Used("-1 or none: the answer may fill the context")] = None
    temperature: Annotated[
        Annotated[float, Field(ge=0, le=2)] | None, Used("0 to 2; 0 selects the most probable token")
    ] = None
    top_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Used("0 to 1")] = None
    include: Annotated[
        list[str] | None,
        Used(f"`{LOGPROBS}`; other values name contents that this server never produces, and are ignored"),
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, Used(f"0 to 20, with `{LOGPROBS}` in `include`")
    ] = None
    metadata: Annotated[
        Annotated[dict[str, str], Field(max_length=16)] | None, Used("returned with the response")
    ] = None
    max_tool_calls: Annotated[
        Annotated[int, Field(ge=1)] | None, Used("of built-in tools, of which there are none")
    ] = None
    # Hints
    store: Annotated[Any, NOT_STORED] = None
    user: User = None
    safety_identifier: User = None
    client_metadata: Annotated[Any, NOT_STORED] = None
    prompt_cache_key: Annotated[Any, NO_CACHE_SETTINGS] = None
    prompt_cache_retention: Annotated[Any, NO_CACHE_SETTINGS] = None
    prompt_cache_options: Annotated[Any, NO_CACHE_SETTINGS] = None
    service_tier: Annotated[Any, NO_TIERS] = None
    context_management: Annotated[
        Any, Hint("this server does not compact conversations; one that is too long is refused", ([],))
    ] = None
    background_options: Annotated[Any, Hint("this server answers at once")] = None
    access_programs: Annotated[Any, NO_USERS] = None
    image: Annotated[Any, Hint("models of this server read text")] = None
    # Refused
    prompt: Annotated[Any, Refused(_NO_STORE.format("prompts", "instructions and input"))] = None
    background: Annotated[
        Any, Refused("this server stores no responses, so none can be fetched later; use stream", (False,))
    ] = None
    moderation: Annotated[Any, Refused("this server has no moderation")] = None

    def review(self, ignored: Ignored, where: str = "") -> None:
        """Apply the classes of the fields, and of the values of ``include``."""
        super().review(ignored, where)
        for number, name in enumerate(self.include or []):
            if name != LOGPROBS:
                ignored.add(f"{where}include[{number}]", "this server never produces it")
        if self.top_logprobs and not self.wants_logprobs:
            raise invalid_value("top_logprobs", f"needs {LOGPROBS} in include")

    def sampling(self, served: Served, max_tokens: int) -> Sampling:
        """Return the engine's settings."""
        return Sampling(
            max_tokens=max_tokens,
            **sampling_values(served, temperature=self.temperature, top_p=self.top_p),
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
        )

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer includes the log-probability of each token."""
        return LOGPROBS in (self.include or [])


def check_logprobs(body: InputRequest, has_tools: bool) -> None:
    """Raise APIError 400 for log-probabilities together with tools."""
    if has_tools and isinstance(body, ResponseRequest) and body.wants_logprobs:
        raise unsupported(
            "include", f"{LOGPROBS} cannot be combined with tools, because tool calls are not text"
        )
