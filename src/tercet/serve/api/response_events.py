"""Answers in the shape of OpenAI's Responses API: items, and the events that build them.

The order is OpenAI's (https://platform.openai.com/docs/api-reference/responses-streaming): created,
in_progress; for each item added, its parts and deltas, done; completed, incomplete or failed. The
object at the end of a stream is the answer to a request without a stream.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from typing import Any

from tercet.engine.request import Usage
from tercet.serve.tools.answer import CallDelta, Piece

Json = dict[str, Any]


class ResponseEvents:
    """Numbered events of one response; ``response`` is the object so far.

    start: the response's fields other than output, status and usage.
    """

    def __init__(self, start: Json) -> None:
        self.response: Json = start | {"status": "in_progress", "output": []}
        self._number = 0
        self._item: Json | None = None  # the unfinished item
        self._logprobs: list[Json] = []  # of the item's text, not sent yet

    def begin(self) -> list[Json]:
        """Return the events before the first piece."""
        return [
            self._event("response.created", response=self._snapshot()),
            self._event("response.in_progress", response=self._snapshot()),
        ]

    def push(self, pieces: Sequence[Piece], logprobs: Sequence[Json] = ()) -> list[Json]:
        """Return the events for the next text and calls; ``logprobs`` belong to the tokens of the text."""
        self._logprobs += logprobs
        events: list[Json] = []
        for piece in pieces:
            if isinstance(piece, str):
                events += self._text(piece)
            elif piece.name is not None:
                events += [*self._close("completed"), *self._open_call(piece)]
                events += self._arguments(piece.arguments)
            else:
                events += self._arguments(piece.arguments)
        return events

    def end(self, usage: Usage, *, cut_off: bool, completed_at: int) -> list[Json]:
        """Return the events after the last piece; ``cut_off``: by max_output_tokens or by the context."""
        events: list[Json] = []
        if not self.response["output"]:
            events += self._open_message()
        events += self._close("incomplete" if cut_off else "completed")
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if cut_off:
            self.response |= {
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
            }
        else:
            self.response |= {"status": "completed", "completed_at": completed_at}
        return [*events, self._event(f"response.{self.response['status']}", response=self._snapshot())]

    def fail(self, message: str, code: str = "server_error") -> list[Json]:
        """Return the events of a response that fails."""
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        return [self._event("response.failed", response=self._snapshot())]

    # Items

    def _text(self, text: str) -> list[Json]:
        events: list[Json] = []
        if self._item is None or self._item["type"] != "message":
            events = [*self._close("completed"), *self._open_message()]
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        logprobs, self._logprobs = self._logprobs, []
        part["logprobs"] += logprobs
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        return [*events, self._placed(delta)]

    def _arguments(self, text: str) -> list[Json]:
        if not text:
            return []
        assert self._item is not None
        self._item["arguments"] += text
        return [self._placed(self._event("response.function_call_arguments.delta", delta=text))]

    def _open_message(self) -> list[Json]:
        item: Json = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        events = [self._open(item)]
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        events.append(
            self._placed(
                self._event("response.content_part.added", content_index=0, part=copy.deepcopy(part))
            )
        )
        return events

    def _open_call(self, piece: CallDelta) -> list[Json]:
        item = {
            "id": f"fc_{secrets.token_hex(16)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": piece.id,
            "name": piece.name,
            "arguments": "",
        }
        return [self._open(item)]

    def _open(self, item: Json) -> Json:
        self._item = item
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        return self._event("response.output_item.added", output_index=index, item=copy.deepcopy(item))

    def _close(self, status: str) -> list[Json]:
        """Return the events that end the unfinished item."""
        item, self._item = self._item, None
        if item is None:
            return []
        item["status"] = status
        events = []
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._logprobs
            self._logprobs = []
            events += [
                self._event(
                    "response.output_text.done",
                    content_index=0,
                    text=part["text"],
                    logprobs=list(part["logprobs"]),
                ),
                self._event("response.content_part.done", content_index=0, part=copy.deepcopy(part)),
            ]
        else:
            events.append(
                self._event(
                    "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
                )
            )
        index = len(self.response["output"]) - 1
        for event in events:
            event |= {"item_id": item["id"], "output_index": index}
        return [
            *events,
            self._event("response.output_item.done", output_index=index, item=copy.deepcopy(item)),
        ]

    # Events

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _placed(self, event: Json) -> Json:
        """Return an event with the id and index of the unfinished item."""
        assert self._item is not None
        index = len(self.response["output"]) - 1
        return event | {"item_id": self._item["id"], "output_index": index}

    def _snapshot(self) -> Json:
        return self.response | {"output": [copy.deepcopy(item) for item in self.response["output"]]}
