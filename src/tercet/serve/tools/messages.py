"""Earlier calls and their results in a conversation, as a model's chat template needs them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import UNSUPPORTED, APIError, invalid_value
from tercet.serve.tools.formats import ToolFormat, tool_format


def template_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A conversation in OpenAI's shape as the chat template wants it.

    Arguments become objects where it wants these, calls without content get an empty one, results the name
    of their function, and identifiers the nine letters and digits that Mistral's templates insist on.

    Raises:
        APIError: 400; calls that are no calls, or a template that would leave them out.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions, by the id of the call
    for number, message in enumerate(messages):
        one, where = dict(message), f"messages[{number}]"
        calls = one.get("tool_calls")
        if calls is not None or one.get("role") == "tool":
            form = tool_format(tokenizer)
            if form is None:
                raise APIError(
                    400,
                    f"{where} holds a tool call or its result, which this model's chat template can't show",
                    param=where,
                    code=UNSUPPORTED,
                )
            if calls is not None:
                one["tool_calls"] = _template_calls(calls, form, names, f"{where}.tool_calls")
                one["content"] = one.get("content") or ""
            if isinstance(answered := one.get("tool_call_id"), str):
                one["tool_call_id"] = _identifier(answered, form)
                if answered in names:
                    one = {"name": names[answered], **one}
        found.append(one)
    return found


def _template_calls(
    calls: object, form: ToolFormat, names: dict[str, str], where: str
) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not calls:
        raise invalid_value(where, "must be a list with at least one call")
    if len(calls) > 1 and not form.several:
        raise invalid_value(where, "has several calls, and this model's chat template takes one a message")
    found = []
    for number, call in enumerate(calls):
        place = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise invalid_value(place, "must be a call of type function")
        name, text, called = function.get("name"), function.get("arguments"), call.get("id")
        if not isinstance(name, str) or not isinstance(text, str) or not isinstance(called, str):
            raise invalid_value(place, "must have an id, function.name and function.arguments, all strings")
        names[called] = name
        arguments: Any = _parsed(text, f"{place}.function.arguments") if form.objects else text
        found.append(
            {
                "id": _identifier(called, form),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return found


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
