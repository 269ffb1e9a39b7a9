"""Answers with tool calls: whole, and the pieces that a stream delivers."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is JSON as the model wrote it (incomplete where the answer was cut off)."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of the call ``index``. Only its first piece has ``id`` and ``name``."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class Thought(str):
    """A piece of the model's reasoning, without its markers. Parsers return it only where a caller asks for it."""


Piece = str | CallDelta  # a string is content, or a Thought


@dataclass(frozen=True)
class Answer:
    """A whole answer. ``content`` is None where it consists of calls only."""

    content: str | None
    calls: list[ToolCall]


def new_call_id() -> str:
    """Return a new identifier for a call."""
    return f"call_{secrets.token_hex(12)}"


def gather(pieces: Collection[Piece]) -> Answer:
    """Join the pieces of one answer."""
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, str):
            continue
        if piece.id is not None:
            calls.append(ToolCall(piece.id, piece.name or "", piece.arguments))
        else:
            last = calls[piece.index]
            calls[piece.index] = ToolCall(last.id, last.name, last.arguments + piece.arguments)
    return Answer(content if content or not calls else None, calls)
