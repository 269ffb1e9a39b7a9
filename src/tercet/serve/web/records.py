"""The records of the store: messages and their addresses, details of answers, conversations, comparisons."""

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
    """A message.

    Attributes:
        id: its address.
        parent: the address of the message before it; None for the first one.
        model: the model that wrote it; None for a message of the user.
        settings: the settings of the model; empty for a message of the user.
        finish: how an answer ended: "stop", "length", "stopped" (by the user), "interrupted" or "error".
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
    """The details of an answer.

    Attributes:
        prompt: ids of the tokens that the model read; empty for a hosted model.
        tokens: for each token of the answer its id, text, bytes (hexadecimal), logprob, ``top`` (id, text and
            logprob of each alternative) and the entropy of its distribution (nats); ``picked`` if the user chose it.
        usage: counted tokens.
        seconds: from the start to the end of the answer.
        first_seconds: from the start to the first token.
        error: why the answer failed, in one line.
    """

    prompt: list[int] = field(default_factory=list)
    tokens: list[Json] = field(default_factory=list)
    usage: Json = field(default_factory=dict)
    seconds: float | None = None
    first_seconds: float | None = None
    error: str | None = None

    def summary(self) -> Json:
        """Return the numbers that the page shows below an answer.

        ``surprise`` is the mean of -log2 p over its tokens, and ``entropy`` the mean of the expected surprise,
        both in bits.
        """
        summary: Json = {"seconds": self.seconds, "first_seconds": self.first_seconds, "error": self.error}
        summary |= {"usage": self.usage, "prompt": len(self.prompt), "tokens": len(self.tokens)}
        if self.tokens:
            bits = len(self.tokens) * math.log(2)
            summary["surprise"] = -sum(token["logprob"] for token in self.tokens) / bits
            summary["entropy"] = sum(token["entropy"] for token in self.tokens) / bits
        return summary


@dataclass(frozen=True)
class Conversation:
    """A conversation, without its messages."""

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
    """Return the address of a message: 32 hexadecimal digits."""
    content_of = [parent, role, content, model, settings or {}, finish, list(tokens)]
    text = json.dumps(content_of, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def dump(value: Any) -> str:
    """Return canonical JSON: equal values give equal texts."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def pack(value: Any) -> bytes:
    """Compress a JSON value; tokens with their alternatives shrink to a fifth."""
    return zlib.compress(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii"), 3)


def unpack(data: bytes) -> Any:
    """Return the value that `pack` compressed."""
    return json.loads(zlib.decompress(data))


def message_of(row: sqlite3.Row) -> Message:
    """Return the message of a table row."""
    return Message(
        row["hash"], row["parent"], row["role"], row["content"], row["model"], json.loads(row["settings"]),
        row["finish"], row["created"],
    )  # fmt: skip


def conversation_of(row: sqlite3.Row) -> Conversation:
    """Return the conversation of a table row."""
    return Conversation(
        row["id"], row["title"], row["kind"], json.loads(row["settings"]), row["leaf"], row["created"],
        row["updated"],
    )  # fmt: skip


def title_of(content: str) -> str:
    """Return the first line of a message, cut at a word boundary."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), "")
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[:TITLE_LENGTH].rsplit(" ", 1)[0]
    return (cut if len(cut) > TITLE_LENGTH // 2 else line[:TITLE_LENGTH]) + "…"


def passage_around(content: str, word: str) -> str:
    """Return the passage of about a line around a word."""
    position = max(content.casefold().find(word.casefold()), 0)
    begin, end = max(position - 40, 0), min(position + len(word) + 60, len(content))
    passage = " ".join(content[begin:end].split())
    return ("…" if begin else "") + passage + ("…" if end < len(content) else "")
