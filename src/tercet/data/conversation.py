"""Conversations: lists of ``{"role": ..., "content": ...}``, checked before a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tercet.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "developer", "tool")


def check_text(text: object, name: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can encode.

    Bytes on a command line that are not UTF-8 reach Python as lone surrogates, which no tokenizer and no
    server accepts.

    Raises:
        UserError: it is no such string; the message calls it ``name``.
    """
    if not isinstance(text, str):
        raise UserError(f"{name} is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UserError(
            f"{name} is not valid Unicode text (character {problem.start}); send it as UTF-8"
        ) from problem
    return text


def check_messages(messages: object, name: str = "messages") -> list[Message]:
    """Return the conversation as a new list of its messages.

    Raises:
        UserError: it is no list of messages; the error names the message and the field that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserError(
            f'{name} must be a list such as [{{"role": "user", "content": "hi"}}], not {messages!r:.60}'
        )
    if not messages:
        raise UserError(f"{name} is empty; a conversation has at least one message")
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise UserError(
                f"{where} is a {type(message).__name__}; it must be an object with role and content"
            )
        missing = [field for field in ("role", "content") if field not in message]
        if missing:
            raise UserError(f"{where} has no {' and no '.join(missing)}")
        if message["role"] not in ROLES:
            raise UserError(f"{where} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
        check_text(message["content"], f"{where} content")
    return [dict(message) for message in messages]


def conversation(prompt: str, system: str | None = None) -> list[Message]:
    """Return a conversation of one user message, preceded by the system message if there is one."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]
