"""Turns in an order that a chat template cannot show, arranged so that it can.

Agents send several user messages in a row, and system messages in the middle of a conversation. Many
templates take them as they are. Some refuse them ("roles must alternate"), and some leave every system
message out but the first; for these the system messages move to the front, and consecutive turns are joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.conversation import Message

SEPARATOR = "\n\n"  # between turns that are joined
_SYSTEM = ("system", "developer")


def arrange(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with one system message, at its front, and consecutive turns of a role joined.

    Results of tools and calls are never joined, and messages with other fields neither.
    """
    system = [message for message in messages if message.get("role") in _SYSTEM]
    others = [message for message in messages if message.get("role") not in _SYSTEM]
    arranged: list[Message] = []
    for message in [*system, *others]:
        last = arranged[-1] if arranged else None
        if last is not None and _joinable(last, message):
            arranged[-1] = {**last, "content": _joined(last["content"], message["content"])}
        else:
            arranged.append(message)
    return arranged


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, list):
        return [*first, *second]
    return SEPARATOR.join(text for text in (first, second) if text)


def _joinable(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    roles = {
        "system" if message.get("role") in _SYSTEM else message.get("role") for message in (first, second)
    }
    if len(roles) > 1 or "tool" in roles:
        return False
    kinds = {type(message.get("content")) for message in (first, second)}
    plain = all(message.keys() <= {"role", "content"} for message in (first, second))
    return plain and kinds in ({str}, {list})


def late_system_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of system messages that are not the first message."""
    return [
        message["content"].strip()
        for message in messages[1:]
        if message.get("role") in _SYSTEM and isinstance(message.get("content"), str)
    ]
