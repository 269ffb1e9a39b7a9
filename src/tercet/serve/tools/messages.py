"""The messages of a request: calls as the protocol has them, and everything else as all conversations are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.conversation import ConversationError, Message, read_messages
from tercet.serve.errors import invalid_value


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the messages of a request as `tercet.data.conversation` has them.

    Raises:
        APIError: 400, with the place of a mistake.
    """
    for number, message in enumerate(messages):
        if message.get("tool_calls") is not None:
            _check_calls(message["tool_calls"], f"messages[{number}].tool_calls")
    try:
        return read_messages(messages)
    except ConversationError as problem:
        raise invalid_value(problem.place, problem.problem) from problem


def _check_calls(calls: object, where: str) -> None:
    """Raise APIError 400 for calls without the fields that the protocols require."""
    if not isinstance(calls, list) or not calls:
        raise invalid_value(where, "must be a list with at least one call")
    for number, call in enumerate(calls):
        place = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise invalid_value(place, "must be a call of type function")
        if not all(
            isinstance(text, str)
            for text in (call.get("id"), function.get("name"), function.get("arguments"))
        ):
            raise invalid_value(place, "must have an id, function.name and function.arguments, all strings")
