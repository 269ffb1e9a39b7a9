"""Conversations as chat completions take them, checked, and as chat templates want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tercet.serve.api.fields import Body
from tercet.serve.errors import invalid_value, missing_parameter, unknown_parameter, unsupported
from tercet.serve.models import Served

# Between the text parts of one message, as vLLM and llama.cpp put it.
PART_SEPARATOR = "\n"


class Part(Body):
    """A piece of a message's content. Only text is served; others are told by their type."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Body):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # not OpenAI's: what templates of reasoning models put back
    annotations: list[dict[str, Any]] | None = None  # of an earlier answer; nothing a model would read
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None


def template_form(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with their contents as strings. APIError 400 names the place of what is wrong."""
    return [_message(one, f"messages[{number}]") for number, one in enumerate(messages)]


def _message(one: Message, where: str) -> dict[str, Any]:
    if one.audio is not None:
        raise unsupported(f"{where}.audio", "the models here read and write text")
    if one.function_call is not None:
        raise unsupported(f"{where}.function_call", "it is deprecated; use tool_calls")
    for name, role in (("tool_calls", "assistant"), ("refusal", "assistant"), ("tool_call_id", "tool")):
        if getattr(one, name) is not None and one.role != role:
            raise invalid_value(f"{where}.{name}", f"is for messages of role {role}")
    if one.reasoning_content is not None and one.role != "assistant":
        raise invalid_value(f"{where}.reasoning_content", "is for messages of role assistant")
    if one.role == "tool" and one.tool_call_id is None:
        raise missing_parameter(f"{where}.tool_call_id")
    content = _text(one.content, f"{where}.content", one.role)
    if content is None:
        content = one.refusal  # what the assistant said instead
    if content is None and one.tool_calls is None:
        raise missing_parameter(f"{where}.content")
    found: dict[str, Any] = {"role": one.role, "content": content}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if (value := getattr(one, name)) is not None:
            found[name] = value
    return found


def _text(content: str | list[Part] | None, where: str, role: str) -> str | None:
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        known = part.type == "text" or (part.type == "refusal" and role == "assistant")
        if not known:
            raise unsupported(place, f"the models here read text, not {part.type:.40}")
        for name in part.model_extra or {}:
            raise unknown_parameter(f"{place}.{name}")
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise missing_parameter(f"{place}.{part.type}")
        texts.append(text)
    return PART_SEPARATOR.join(texts)


def check_names(
    served: Served, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """APIError 400 where a message has a ``name`` that the chat template would leave out."""
    named = [number for number, one in enumerate(messages) if "name" in one and one["role"] != "tool"]
    if not named:
        return
    plain = [
        {key: value for key, value in one.items() if key != "name" or one["role"] == "tool"}
        for one in messages
    ]
    if served.prompt_tokens(messages, tools) == served.prompt_tokens(plain, tools):
        where = f"messages[{named[0]}].name"
        raise unsupported(where, "this model's chat template does not show names; put it into the content")
