"""Answers with tool calls: whole, and the pieces that a stream delivers."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is JSON as the model wrote it (cut off where the answer was)."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of the call ``index``. ``id`` and ``name`` are in its first piece and in no other."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Piece = str | CallDelta  # a string is content


@dataclass(frozen=True)
class Answer:
    """A whole answer. ``content`` is None where there is nothing but calls."""

    content: str | None
    calls: list[ToolCall]


def new_call_id() -> str:
    """An identifier for a call."""
    return f"call_{secrets.token_hex(12)}"


def gather(pieces: Collection[Piece]) -> Answer:
    """The whole that the pieces of one answer make."""
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
