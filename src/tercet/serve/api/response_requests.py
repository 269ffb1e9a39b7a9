"""Requests to OpenAI's Responses API, read as a conversation and settings.

This server stores no responses, so everything that needs a stored response is refused, as is every
unsupported field that would change the answer. Fields about billing, caches and abuse change no answer and
are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar
from tercet.engine.request import Sampling
from tercet.serve.api.chat_messages import PART_SEPARATOR
from tercet.serve.api.fields import Body, sampling_values, string_field
from tercet.serve.api.response_format import checked_schema
from tercet.serve.errors import invalid_value, missing_parameter, unsupported
from tercet.serve.models import Served

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
# This server never produces the contents that these would include.
_VACUOUS = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
)
# Fields that need features that this server lacks, and what to do instead.
_REFUSED = {
    "previous_response_id": "this server stores no responses; send the whole conversation as input",
    "conversation": "this server stores no conversations; send the whole conversation as input",
    "prompt": "this server stores no prompts; send instructions and input",
    "background": "this server stores no responses, so none can be fetched later; use stream",
    "context_management": "this server does not compact conversations; shorten input",
    "moderation": "this server has no moderation",
}


class TextFormat(Body):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Body):
    """``text``."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """``reasoning``: models of this server have no switch for it, so only none is accepted."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Body):
    """``stream_options``."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Body):
    """The body of ``POST /v1/responses``."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of built-in tools, of which there are none
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: Reasoning | None = None
    store: Literal[False] | None = None
    # No effect on the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Refused when set.
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise APIError 400 for fields that are not supported."""
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise unsupported(name, reason)
        for number, name in enumerate(self.include or []):
            if name != LOGPROBS and name not in _VACUOUS:
                raise invalid_value(f"include[{number}]", f"is {name!r:.60}, which is not a value of include")
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise invalid_value("top_logprobs", f"needs {LOGPROBS} in include")
        if self.wants_logprobs and self.tools:
            raise unsupported(
                "include", f"{LOGPROBS} cannot be combined with tools, because tool calls are not text"
            )

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

    @property
    def format(self) -> TextFormat:
        """``text.format``, or plain text."""
        return (self.text and self.text.format) or TextFormat()

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

    def messages(self) -> list[Json]:
        """Return the conversation as messages of chat completions."""
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*opening, {"role": "user", "content": self.input}]
        messages: list[Json] = []
        for number, item in enumerate(self.input):
            _add(item, f"input[{number}]", messages)
        return [*opening, *messages]


def _add(item: Mapping[str, Any], where: str, messages: list[Json]) -> None:
    """Append an item of the input to ``messages``; calls become part of the assistant's message."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind is None:
        raise missing_parameter(f"{where}.type")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid_value(
                f"{where}.role", f"is {role!r:.60}; it must be user, assistant, system or developer"
            )
        messages.append({"role": role, "content": _text(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        name, call_id, arguments = (
            string_field(item, key, where) for key in ("name", "call_id", "arguments")
        )
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{where}.output")
        messages.append(
            {"role": "tool", "tool_call_id": string_field(item, "call_id", where), "content": text}
        )
    else:
        raise invalid_value(
            f"{where}.type",
            f"is {kind!r:.60}; it must be message, function_call or function_call_output",
            "unsupported_value",
        )


def _text(content: object, where: str) -> str:
    """Return a string, or the text of typed parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_value(where, "must be a string or a list of parts")
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        if not isinstance(part, dict):
            raise invalid_value(place, "must be an object")
        kind = part.get("type")
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise invalid_value(
                f"{place}.type", f"is {kind!r:.60}; models of this server read text only", "unsupported_value"
            )
        texts.append(string_field(part, "refusal" if kind == "refusal" else "text", place))
    return PART_SEPARATOR.join(texts)
