"""Earlier calls and their results in a conversation, as a model's chat template needs them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.generic_tools import generic_tools, has_tools, split_calls
from tercet.data.tool_format import GENERIC, ToolFormat, tool_format
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import invalid_value


def template_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    described: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Convert a conversation from OpenAI's shape to the one that the chat template needs.

    Arguments become objects where the template needs objects, calls without content get an empty content,
    results get the name of their function, and identifiers become nine letters and digits where the template
    is one of Mistral's, which require that. A message with several calls becomes several messages where the template
    takes one call. Where the template has no format for tools, functions, calls and results become text.

    Args:
        messages: the conversation.
        tokenizer: holds the chat template.
        described: `ToolPlan.described`.

    Raises:
        APIError: 400; malformed calls.
    """
    form = tool_format(tokenizer)
    converted: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # function names by the id of the call
    for number, original in enumerate(messages):
        message, where = dict(original), f"messages[{number}]"
        if (calls := message.get("tool_calls")) is not None:
            message["tool_calls"] = _template_calls(calls, form or GENERIC, names, f"{where}.tool_calls")
            message["content"] = message.get("content") or ""
        if isinstance(call_id := message.get("tool_call_id"), str):
            message["tool_call_id"] = _identifier(call_id, form or GENERIC)
            if call_id in names:
                message = {"name": names[call_id], **message}
        converted.append(message)
    if form is None and has_tools(converted, described):
        return generic_tools(tokenizer, converted, described)
    return converted if form is None or form.several else split_calls(converted)


def _template_calls(
    calls: object, form: ToolFormat, names: dict[str, str], where: str
) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not calls:
        raise invalid_value(where, "must be a list with at least one call")
    converted = []
    for number, call in enumerate(calls):
        place = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise invalid_value(place, "must be a call of type function")
        name, text, call_id = function.get("name"), function.get("arguments"), call.get("id")
        if not isinstance(name, str) or not isinstance(text, str) or not isinstance(call_id, str):
            raise invalid_value(place, "must have an id, function.name and function.arguments, all strings")
        names[call_id] = name
        arguments: Any = _parsed(text, f"{place}.function.arguments") if form.objects else text
        converted.append(
            {
                "id": _identifier(call_id, form),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return converted


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as problem:
        raise invalid_value(where, f"is not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise invalid_value(where, "must be a JSON object")
    return value


def _identifier(text: str, form: ToolFormat) -> str:
    if form.style not in ("mistral", "named") or re.fullmatch(r"[A-Za-z0-9]{9}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]
