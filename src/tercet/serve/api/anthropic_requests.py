"""Requests to Anthropic's Messages API, read as a conversation of chat completions and settings.

Blocks of text, calls and results are read; images, documents, thinking and Anthropic's own tools are refused.
Marks for Anthropic's prompt cache change no answer and are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar
from tercet.engine.request import Sampling
from tercet.serve.api.chat_messages import PART_SEPARATOR
from tercet.serve.api.fields import Body, sampling_values, string_field
from tercet.serve.api.response_format import checked_schema
from tercet.serve.errors import invalid_value, missing_parameter
from tercet.serve.models import Served
from tercet.serve.tools.request import ToolRequest, check_distinct, check_named, make_function

Json = dict[str, Any]
_TOOL_KEYS = (
    "type",
    "name",
    "description",
    "input_schema",
    "strict",
    "cache_control",
    "eager_input_streaming",
)


class InputMessage(Body):
    """One turn; ``content`` is a text or a list of blocks."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class ToolChoice(Body):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JSONFormat(Body):
    """``output_config.format``."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """``output_config``: a form for the answer; models of this server have no levels of effort."""

    format: JSONFormat | None = None
    effort: None = None


class Thinking(Body):
    """``thinking``: models of this server have no switch for it, so only "disabled" is accepted."""

    type: Literal["disabled"]


class Metadata(Body):
    """``metadata``: the user of the client."""

    user_id: str | None = None


class CountRequest(Body):
    """The body of ``POST /v1/messages/count_tokens``."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    cache_control: dict[str, Any] | None = None

    def conversation(self) -> list[Json]:
        """Return the messages in the shape of chat completions."""
        messages: list[Json] = []
        if self.system:
            messages.append({"role": "system", "content": _texts(self.system, "system")})
        for number, message in enumerate(self.messages):
            for turn in _turns(message, f"messages.{number}"):
                _join(turn, messages)
        if messages[-1]["role"] == "assistant":
            # Generating after it would be another answer, not the rest of this one.
            raise invalid_value(
                f"messages.{len(self.messages) - 1}.role",
                "is assistant; this server does not continue a prefilled answer, so the last message must be the "
                "user's",
            )
        return messages

    def tool_request(self) -> ToolRequest:
        """Return the tools and how the model may call them."""
        functions = []
        for number, tool in enumerate(self.tools or []):
            where = f"tools.{number}"
            if tool.get("type") not in (None, "custom"):
                raise invalid_value(
                    f"{where}.type", f"is {tool['type']!r:.60}; only tools of type custom are supported"
                )
            for key in tool:
                if key not in _TOOL_KEYS and tool[key]:
                    raise invalid_value(f"{where}.{key}", "is not supported")
            schema = tool.get("input_schema")
            if schema is None:
                raise missing_parameter(f"{where}.input_schema")
            functions.append(
                make_function(
                    tool.get("name"),
                    tool.get("description"),
                    schema,
                    tool.get("strict"),
                    where,
                    "input_schema",
                )
            )
        check_distinct(functions)
        choice = self.tool_choice
        if choice is None:
            return ToolRequest(tuple(functions))
        parallel = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            only = check_named(choice.name, functions, "tool_choice.name")
            return ToolRequest(tuple(functions), "required", only, parallel)
        if choice.name is not None:
            raise invalid_value("tool_choice.name", "belongs to type tool")
        if choice.type == "any":
            if not functions:
                raise invalid_value("tool_choice.type", "is any, but there are no tools")
            return ToolRequest(tuple(functions), "required", None, parallel)
        return ToolRequest(tuple(functions), choice.type, None, parallel)

    async def form(self) -> Grammar | None:
        """Return the grammar of the answer's text. APIError 400 for a schema that cannot be enforced."""
        form = self.output_config and self.output_config.format
        if not form:
            return None
        return await checked_schema(form.schema_, "output_config.format.schema")


class MessageRequest(CountRequest):
    """The body of ``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def sampling(self, served: Served, max_tokens: int) -> Sampling:
        """Return the engine's settings."""
        return Sampling(
            max_tokens=max_tokens,
            stop=tuple(self.stop_sequences or ()),
            **sampling_values(served, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k),
        )


def _turns(message: InputMessage, where: str) -> list[Json]:
    """Return one turn as messages: its results come first, each as a message of its own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Json] = []
    calls: list[Json] = []
    texts: list[str] = []
    for number, block in enumerate(message.content):
        place = f"{where}.content.{number}"
        kind = block.get("type")
        if kind == "text":
            texts.append(string_field(block, "text", place))
        elif kind == "tool_use" and message.role == "assistant":
            calls.append(_call(block, place))
        elif kind == "tool_result" and message.role == "user":
            results.append(_result(block, place))
        else:
            raise invalid_value(
                f"{place}.type",
                f"is {kind!r:.60}; blocks of the {message.role} must be text or "
                f"{'tool_use' if message.role == 'assistant' else 'tool_result'}",
            )
    content = PART_SEPARATOR.join(texts)
    if calls:
        return [{"role": "assistant", "content": content or None, "tool_calls": calls}]
    return [*results, *([{"role": message.role, "content": content}] if texts or not results else [])]


def _call(block: Mapping[str, Any], where: str) -> Json:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid_value(f"{where}.input", "must be an object")
    function = {
        "name": string_field(block, "name", where),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": string_field(block, "id", where), "type": "function", "function": function}


def _result(block: Mapping[str, Any], where: str) -> Json:
    content = block.get("content")
    text = "" if content is None else _texts(content, f"{where}.content")
    if block.get("is_error"):  # chat templates have no field for it
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": string_field(block, "tool_use_id", where), "content": text}


def _texts(content: object, where: str) -> str:
    """Return a string, or the text of blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise invalid_value(where, "must be a string or a list of blocks")
    texts = []
    for number, block in enumerate(content):
        place = f"{where}.{number}"
        if not isinstance(block, dict):
            raise invalid_value(place, "must be an object")
        if block.get("type") != "text":
            raise invalid_value(
                f"{place}.type", f"is {block.get('type')!r:.60}; models of this server read text only"
            )
        texts.append(string_field(block, "text", place))
    return PART_SEPARATOR.join(texts)


def _join(message: Json, messages: list[Json]) -> None:
    """Append a message; consecutive turns of one role are one turn, as Anthropic documents."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] in ("tool", "system"):
        messages.append(message)
        return
    parts = [part for part in (last["content"], message["content"]) if part]
    last["content"] = (
        PART_SEPARATOR.join(parts) or None if message["role"] == "assistant" else PART_SEPARATOR.join(parts)
    )
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
