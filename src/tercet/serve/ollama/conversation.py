"""The messages and tools of Ollama's API, read as those of chat completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.prompt_tokens import PromptEnding
from tercet.serve.api.field_table import Ignored
from tercet.serve.api.offered_tools import offered_tools
from tercet.serve.errors import invalid_value
from tercet.serve.ollama.requests import InputMessage
from tercet.serve.tools.request import ToolRequest, read_tools

Json = dict[str, Any]


def conversation(messages: Sequence[InputMessage], shows_reasoning: bool, ignored: Ignored) -> list[Json]:
    """Return the messages in the shape of chat completions.

    Calls without an identifier get one. A result belongs to the call that it names by identifier, else to the
    first call of its function that has no result yet, else to the first call that has none.

    Args:
        messages: as the request has them; a missing content is an empty one.
        shows_reasoning: whether the chat template shows the reasoning of earlier answers.
        ignored: receives what has no effect.

    Raises:
        APIError: 400; a message has fields of another role.
    """
    waiting: list[tuple[str, str]] = []  # calls without a result: identifier and function
    converted: list[Json] = []
    count = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        turn: Json = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            if message.role != "assistant":
                raise invalid_value(f"{where}.tool_calls", "is for messages of role assistant")
            turn["content"] = message.content or None
            turn["tool_calls"] = []
            for call in message.tool_calls:
                identifier = call.id or f"call_{count}"
                count += 1
                waiting.append((identifier, call.function.name))
                arguments = json.dumps(call.function.arguments or {}, ensure_ascii=False)
                function = {"name": call.function.name, "arguments": arguments}
                turn["tool_calls"].append({"id": identifier, "type": "function", "function": function})
        if message.role == "tool":
            turn |= _answered(message, waiting)
        elif message.tool_name:
            raise invalid_value(f"{where}.tool_name", "is for messages of role tool")
        if message.thinking:
            if message.role == "assistant" and shows_reasoning:
                turn["reasoning_content"] = message.thinking
            else:
                ignored.add(f"{where}.thinking", "this model's chat template does not show earlier reasoning")
        converted.append(turn)
    return converted


def _answered(result: InputMessage, waiting: list[tuple[str, str]]) -> Json:
    """Return the fields that say which call a result answers, and remove it from those that wait."""
    place = next(
        (
            number
            for number, (identifier, name) in enumerate(waiting)
            if identifier == result.tool_call_id
            or (not result.tool_call_id and result.tool_name in (None, "", name))
        ),
        None,
    )
    fields: Json = {"name": result.tool_name} if result.tool_name else {}
    if place is None:
        return fields | ({"tool_call_id": result.tool_call_id} if result.tool_call_id else {})
    identifier, _ = waiting.pop(place)
    return fields | {"tool_call_id": identifier}


def ending_of(messages: Sequence[Mapping[str, Any]]) -> PromptEnding:
    """Return how the prompt ends: Ollama continues a last message of the assistant."""
    last = messages[-1]
    continued = last["role"] == "assistant" and not last.get("tool_calls")
    return PromptEnding(
        continue_final_message=continued,
        add_generation_prompt=True if last["role"] == "assistant" and not continued else None,
    )


def tool_request(tools: list[Any] | None, ignored: Ignored) -> ToolRequest:
    """Return the functions that the model may call. APIError 400 with the place of a mistake."""
    typed = [{"type": "function", **tool} if isinstance(tool, dict) else tool for tool in tools or []]
    offered, _ = offered_tools([_without_nulls(tool) for tool in typed], None, ignored)
    return read_tools(offered)


def _without_nulls(value: Any) -> Any:
    """Return a tool without the keys that hold null: Ollama's clients send those that nobody has set."""
    if isinstance(value, dict):
        return {
            key: entry if key in ("default", "const") else _without_nulls(entry)
            for key, entry in value.items()
            if entry is not None or key in ("default", "const")
        }
    # An enum may hold null.
    return (
        [entry if entry is None else _without_nulls(entry) for entry in value]
        if isinstance(value, list)
        else value
    )
