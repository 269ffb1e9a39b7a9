"""What the store holds: messages and their addresses, how answers came about, conversations, comparisons."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

TITLE_LENGTH = 60


@dataclass(frozen=True)
class Message:
    """One message. ``id`` is its address; ``parent`` the address of the message before it, or None.

    model, settings: who answered and how it was asked; None and {} for what a person wrote.
    finish: how an answer ended: "stop", "length", "stopped" (by the user), "interrupted", "error".
    """

    id: str
    parent: str | None
    role: str
    content: str
    model: str | None
    settings: Json
    finish: str | None
    created: float


@dataclass
class Details:
    """How an answer came about.

    prompt: ids of the tokens the model read; empty where the model is somewhere else.
    tokens: for each token of the answer its id, text, bytes (hexadecimal), logprob, ``top`` (id, text,
        logprob each) and the entropy of its place (nats); ``picked`` where the user chose it.
    """

    prompt: list[int] = field(default_factory=list)
    tokens: list[Json] = field(default_factory=list)
    usage: Json = field(default_factory=dict)
    seconds: float | None = None
    first_seconds: float | None = None  # until the first token
    error: str | None = None

    def summary(self) -> Json:
        """What is shown below an answer, in few numbers.

        surprise: bits, the mean of -log2 p over its tokens. entropy: bits, the mean of the surprise that
        was to be expected at its places.
        """
        found: Json = {"seconds": self.seconds, "first_seconds": self.first_seconds, "error": self.error}
        found |= {"usage": self.usage, "prompt": len(self.prompt), "tokens": len(self.tokens)}
        if self.tokens:
            bits = len(self.tokens) * math.log(2)
            found["surprise"] = -sum(token["logprob"] for token in self.tokens) / bits
            found["entropy"] = sum(token["entropy"] for token in self.tokens) / bits
        return found


@dataclass(frozen=True)
class Conversation:
    """A conversation without its messages."""

    id: str
    title: str
    kind: str
    settings: Json
    leaf: str | None
    created: float
    updated: float


@dataclass(frozen=True)
class Comparison:
    """Two answers to one message; ``vote`` is one of VOTES, or None."""

    id: str
    conversation: str
    parent: str
    left: str | None
    right: str | None
    blind: bool
    vote: str | None


def address(
    parent: str | None,
    role: str,
    content: str,
    model: str | None = None,
    settings: Json | None = None,
    finish: str | None = None,
    tokens: Sequence[int] = (),
) -> str:
    """The address of a message: 32 hexadecimal digits."""
    said = [parent, role, content, model, settings or {}, finish, list(tokens)]
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def dump(value: Any) -> str:
    """JSON that is equal exactly when the values are."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def pack(value: Any) -> bytes:
    """A JSON value, compressed: tokens with their alternatives shrink to a fifth."""
    return zlib.compress(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii"), 3)


def unpack(data: bytes) -> Any:
    """What `pack` was given."""
    return json.loads(zlib.decompress(data))


def message_of(row: sqlite3.Row) -> Message:
    """The message of a row of its table."""
    return Message(
        row["hash"], row["parent"], row["role"], row["content"], row["model"], json.loads(row["settings"]),
        row["finish"], row["created"],
    )  # fmt: skip


def conversation_of(row: sqlite3.Row) -> Conversation:
    """The conversation of a row of its table."""
    return Conversation(
        row["id"], row["title"], row["kind"], json.loads(row["settings"]), row["leaf"], row["created"],
        row["updated"],
    )  # fmt: skip


def title_of(content: str) -> str:
    """The first line of a message, cut at a word."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), "")
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[:TITLE_LENGTH].rsplit(" ", 1)[0]
    return (cut if len(cut) > TITLE_LENGTH // 2 else line[:TITLE_LENGTH]) + "…"


def passage_around(content: str, word: str) -> str:
    """A passage of a line or so around a word."""
    at = max(content.casefold().find(word.casefold()), 0)
    begin, end = max(at - 40, 0), min(at + len(word) + 60, len(content))
    passage = " ".join(content[begin:end].split())
    return ("…" if begin else "") + passage + ("…" if end < len(content) else "")
