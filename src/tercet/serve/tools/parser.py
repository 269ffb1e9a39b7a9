"""Split answers into content and tool calls, whole or while they are written.

A parser never fails: text that looks like a call and is none stays content. The pieces of a call come with
the deltas of a stream: its id and name once, then its arguments as they are written.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from tercet.data.tool_format import ToolFormat
from tercet.engine.request import Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.answer import CallDelta, Piece, new_call_id
from tercet.serve.tools.call_text import CallText, JsonCall, NamedCall, is_object
from tercet.serve.tools.marked_text import MarkedText


class ToolParser:
    """Parses one answer. Pass it every delta with `push`, then call `finish`.

    Args:
        form: the format of calls; None: there are none, and all text is content.
        names: the functions that exist; a call of another name is content.
        tokenizer: of the model; None without tools.
        whole: return a call only once it is complete and valid, so that a malformed call is content to its
            last character. Otherwise return its arguments as they are written; a mistake in them ends it.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        names: Collection[str],
        tokenizer: Tokenizer | None,
        *,
        whole: bool = False,
    ) -> None:
        self._form, self._names, self._whole = form or ToolFormat("bare"), frozenset(names), whole
        self._marked = None if form is None or tokenizer is None else MarkedText(tokenizer)
        # start: only spaces so far, and a call may follow without a trigger; list: before "[";
        # between: after a call; plain: no more calls can come.
        self._state: Literal["start", "text", "list", "call", "between", "plain"]
        self._state = "plain" if form is None else "text" if form.trigger else "start"
        self._buffer = ""  # text that is not classified yet
        self._raw = ""  # in the states list and call: text before it, content if it is no call
        self._call: CallText = JsonCall(self._names)
        self._sent = 0  # characters of its arguments that were returned
        self._begun = 0  # calls that have begun

    def push(self, delta: Delta) -> list[Piece]:
        """Return the pieces that are certain now."""
        self._buffer += delta.text if self._marked is None else self._marked.push(delta)
        return self._advance()

    def finish(self) -> list[Piece]:
        """Return the rest, when the answer has ended. A call whose arguments were cut off counts as a call."""
        if self._state == "call" and self._call.name is not None:
            pieces = self._call_pieces()
        elif self._state == "between":
            pieces = []
        else:
            held = self._call.text if self._state == "call" else ""
            rest = self._raw + held + self._buffer
            pieces = _content(rest if rest.strip() or not self._begun else "")
        self._buffer, self._state = "", "plain"
        return pieces

    def _advance(self) -> list[Piece]:
        step = {
            "start": self._at_start,
            "text": self._in_text,
            "list": self._at_list,
            "call": self._in_call,
            "between": self._between_calls,
            "plain": self._in_plain,
        }
        pieces: list[Piece] = []
        while self._buffer:
            before = self._state, len(self._buffer)
            pieces += step[self._state]()
            if (self._state, len(self._buffer)) == before:
                break
        return pieces

    def _at_start(self) -> list[Piece]:
        tag, text = "<|python_tag|>", self._buffer.lstrip()
        if text.startswith(tag):
            self._raw, text = self._buffer[: -len(text)], text.removeprefix(tag)
            self._buffer = text
            self._open(self._raw)
        elif text.startswith("{"):
            self._open("")
        elif text and not tag.startswith(text):
            self._state = "plain"
        return []

    def _in_plain(self) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return _content(text)

    def _in_text(self) -> list[Piece]:
        trigger = self._form.trigger
        before, match, after = self._buffer.partition(trigger)
        if match:
            self._buffer = after
            self._open(before[len(before.rstrip()) :] + trigger)
            if self._form.style == "mistral":
                self._state = "list"
        else:
            # A trigger may begin with the last characters; spaces before it are not content.
            before, self._buffer = _certain(before, trigger)
        return _content(before.rstrip() if match else before)

    def _open(self, raw: str) -> None:
        """Expect a call from here on; ``raw`` was written before it."""
        self._state, self._raw, self._sent = "call", raw, 0
        self._call = (NamedCall if self._form.style == "named" else JsonCall)(self._names)

    def _at_list(self) -> list[Piece]:
        blank = len(self._buffer) - len(self._buffer.lstrip())
        if blank < len(self._buffer) and self._buffer[blank] == "[":
            self._raw += self._buffer[: blank + 1]
            self._buffer, self._state = self._buffer[blank + 1 :], "call"
        elif blank < len(self._buffer):
            return self._no_call()
        return []

    def _in_call(self) -> list[Piece]:
        call = self._call
        call.feed(self._buffer)
        self._buffer = ""
        if call.state == "done" and self._whole and not is_object(call.arguments):
            call.state = "failed"
        if call.state == "failed" and not self._sent:
            self._buffer = call.text
            return self._no_call()
        pieces = [] if self._whole and call.state == "open" else self._call_pieces()
        if call.state != "open":
            self._buffer, self._raw = call.text[call.end :], ""
            self._state = "between" if call.state == "done" else self._outside
        return pieces

    @property
    def _outside(self) -> Literal["text", "plain"]:
        """The state outside of calls."""
        return "text" if self._form.trigger else "plain"

    def _no_call(self) -> list[Piece]:
        """Treat the text so far as content; the text after the trigger may contain another call."""
        raw, self._raw, self._state = self._raw, "", self._outside
        return _content(raw)

    def _call_pieces(self) -> list[Piece]:
        call = self._call
        if call.name is None or self._sent == len(call.arguments):
            return []
        pieces: list[Piece] = []
        if not self._sent:
            pieces.append(CallDelta(self._begun, new_call_id(), call.name, ""))
            self._begun += 1
        pieces.append(CallDelta(self._begun - 1, None, None, call.arguments[self._sent :]))
        self._sent = len(call.arguments)
        return pieces

    def _between_calls(self) -> list[Piece]:
        text = self._buffer.lstrip()
        if not text:
            return []
        if self._form.style == "hermes":
            close = "</tool_call>"
            if text != close and close.startswith(text):
                return []
            self._buffer, self._state = text.removeprefix(close), "text"
        elif self._form.style == "mistral" and text.startswith(","):
            self._buffer = text[1:]
            self._open(",")
        elif self._form.style == "mistral":
            self._buffer, self._state = text.removeprefix("]"), "text"
        elif self._form.style == "bare" and self._form.several and text.startswith(";"):
            self._buffer = text[1:]
            self._open(";")
        else:
            self._buffer, self._state = text, self._outside
        return []


def _content(text: str) -> list[Piece]:
    return [text] if text else []


def _certain(text: str, trigger: str) -> tuple[str, str]:
    """Split ``text`` before its last characters that may be spaces and the beginning of ``trigger``."""
    for length in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-length:]):
            break
    else:
        length = 0
    certain = text[: len(text) - length].rstrip()
    return certain, text[len(certain) :]
