"""Answers in the shape of Anthropic's Messages API: blocks, and the events that build them.

The order is Anthropic's (https://docs.anthropic.com/en/api/messages-streaming): message_start; for each
block its start, deltas and stop; message_delta with the reason and usage; message_stop.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Sequence
from typing import Any

from tercet.engine.request import Completion, Usage
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.answer import Piece

Json = dict[str, Any]


class MessageEvents:
    """Events of one message, which also build the object of an answer without a stream."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._message: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens, 0)),
        }
        self._open = False  # whether the last block is unfinished

    @property
    def message(self) -> Json:
        """The whole message, once it has ended; a call that was cut off has the input {}."""
        blocks = [
            block | {"input": _object(block["input"])} if block["type"] == "tool_use" else block
            for block in self._message["content"]
        ]
        return self._message | {"content": blocks}

    def begin(self) -> list[Json]:
        """Return the events before the first piece."""
        return [{"type": "message_start", "message": copy.deepcopy(self._message)}]

    def push(self, pieces: Sequence[Piece]) -> list[Json]:
        """Return the events for the next text and calls."""
        events: list[Json] = []
        blocks = self._message["content"]
        for piece in pieces:
            if isinstance(piece, str):
                if not self._open or blocks[-1]["type"] != "text":
                    events += [*self._close(), self._start({"type": "text", "text": ""})]
                blocks[-1]["text"] += piece
                events.append(self._delta({"type": "text_delta", "text": piece}))
                continue
            if piece.name is not None:
                block: Json = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                events += [*self._close(), self._start(block)]
                blocks[-1]["input"] = ""
            if piece.arguments:
                blocks[-1]["input"] += piece.arguments
                events.append(self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))
        return events

    def end(self, completion: Completion, stop_sequence: str | None) -> list[Json]:
        """Return the events after the last piece."""
        called = any(block["type"] == "tool_use" for block in self._message["content"])
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif stop_sequence is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if called else "end_turn"
        end = {"stop_reason": reason, "stop_sequence": stop_sequence}
        self._message |= end | {"usage": _usage(completion.usage)}
        return [
            *self._close(),
            {"type": "message_delta", "delta": end, "usage": _usage(completion.usage)},
            {"type": "message_stop"},
        ]

    def _start(self, block: Json) -> Json:
        self._message["content"].append(block)
        self._open = True
        return {
            "type": "content_block_start",
            "index": len(self._message["content"]) - 1,
            "content_block": dict(block),
        }

    def _delta(self, delta: Json) -> Json:
        return {
            "type": "content_block_delta",
            "index": len(self._message["content"]) - 1,
            "delta": delta,
        }

    def _close(self) -> list[Json]:
        if not self._open:
            return []
        self._open = False
        return [{"type": "content_block_stop", "index": len(self._message["content"]) - 1}]


def stopped_by(completion: Completion, stops: Sequence[str], tokenizer: Tokenizer) -> str | None:
    """Return the stop string that ended an answer; None where something else ended it."""
    if completion.finish_reason != "stop" or not stops:
        return None
    bytes_of = TokenBytes(tokenizer)
    written = b"".join(map(bytes_of, completion.tokens)).decode(errors="replace")
    # The text ends before the stop string that was complete first.
    rest = written[len(completion.text) :]
    return min((stop for stop in stops if rest.startswith(stop)), key=len, default=None)


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
