"""The tools of a request that a model is offered: functions. Every other tool would run on the server."""

from __future__ import annotations

from typing import Any

from tercet.serve.api.field_table import Ignored
from tercet.serve.errors import invalid_value

_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
NOT_OFFERED = "this server offers function tools only"


def offered_tools(
    tools: list[Any] | None, choice: Any, ignored: Ignored, *, flat: bool = False
) -> tuple[list[Any] | None, Any]:
    """Return the function tools and the choice between them, for `read_tools`.

    Args:
        tools: the request's ``tools``. Those of another type are left out; None takes their place in the list,
            so that errors name the request's own places.
        choice: the request's ``tool_choice``; an ``allowed_tools`` keeps its functions only.
        ignored: receives the tools that are left out, and unknown keys of functions.
        flat: whether tools have the shape of responses, or of chat completions.

    Raises:
        APIError: 400; the server is strict.
    """
    if tools is None:
        return None, choice
    return [
        _offered(tool, f"tools[{number}]", ignored, flat) for number, tool in enumerate(tools)
    ], _offered_choice(choice, ignored, flat)


def _offered(tool: Any, where: str, ignored: Ignored, flat: bool) -> Any:
    if not isinstance(tool, dict):
        raise invalid_value(where, "must be an object")
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "function":
        ignored.add(f"{where}", NOT_OFFERED)
        return None
    outer = ("type", *_FUNCTION_KEYS) if flat else ("type", "function")
    ignored.add_unknown(tool, outer, where)
    tool = {name: value for name, value in tool.items() if name in outer}
    if not flat and isinstance(function := tool.get("function"), dict):
        ignored.add_unknown(function, _FUNCTION_KEYS, f"{where}.function")
        tool["function"] = {name: value for name, value in function.items() if name in _FUNCTION_KEYS}
    return tool


def _offered_choice(choice: Any, ignored: Ignored, flat: bool) -> Any:
    """Return a choice without the tools that are not offered."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice
    where = "tool_choice" if flat else "tool_choice.allowed_tools"
    inner = choice if flat else choice.get("allowed_tools")
    entries = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(entries, list):
        return choice
    functions = []
    for number, entry in enumerate(entries):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind != "function":
            ignored.add(f"{where}.tools[{number}]", NOT_OFFERED)
        else:
            functions.append(entry)
    allowed = inner | {"tools": functions}
    return allowed if flat else choice | {"allowed_tools": allowed}
