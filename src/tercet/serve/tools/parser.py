"""Split answers into content and tool calls, whole or while they are written.

A parser never fails: text that looks like a call and is none stays content. The pieces of a call come with
the deltas of a stream: its id and name once, then its arguments as they are written.

Reasoning is content, or pieces of its own, and nothing in it is a call, even where it does not end. It begins
outside of calls, with a marker of `tercet.data.reasoning` that does not stand between quotation marks, or with the
answer where the prompt has opened it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal

from tercet.data.reasoning import REASONING, REASONING_MARKERS
from tercet.data.tool_format import ToolFormat, special_markers
from tercet.engine.request import Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.answer import CallDelta, Piece, Thought, new_call_id
from tercet.serve.tools.call_text import CallText, JsonCall, NamedCall, is_object
from tercet.serve.tools.marked_text import MarkedText

_TAG = "<|python_tag|>"
_QUOTES = "`'\""


class ToolParser:
    """Parses one answer. Pass it every delta with `push`, then call `finish`.

    Args:
        form: the format of calls; None: there are none, and all text is content.
        names: the functions that exist; a call of another name is content.
        tokenizer: of the model; None without tools.
        reasoning: the marker that ends reasoning which the prompt has opened; None: it has opened none.
        skip: text at the beginning of the answer that is left out.
        exact: JSON that names a function and has no arguments is no call.
        whole: return a call only once it is complete and valid, so that a malformed call is content to its
            last character. Otherwise return its arguments as they are written; a mistake in them ends it.
        thoughts: return reasoning as pieces of its own, without markers and the spaces around them.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        names: Collection[str],
        tokenizer: Tokenizer | None,
        *,
        reasoning: str | None = None,
        skip: str = "",
        exact: bool = False,
        whole: bool = False,
        thoughts: bool = False,
    ) -> None:
        self._form, self._names, self._whole = form or ToolFormat("bare"), frozenset(names), whole
        self._thoughts = thoughts
        marked = tokenizer is not None and (form is not None or thoughts)
        self._marked = MarkedText(tokenizer) if tokenizer is not None and marked else None
        # opening: only spaces so far, and no calls can come; start: only spaces and reasoning so far, and a call
        # may follow without a trigger; thought: in reasoning; list: before "["; between: after a call; plain: no
        # more calls can come.
        self._behind: Literal["start", "text", "plain"]
        self._behind = "plain" if form is None else "text" if form.trigger else "start"
        self._state: Literal["opening", "start", "text", "thought", "list", "call", "between", "plain"]
        self._state = "opening" if form is None and thoughts else self._behind
        if (form is not None or thoughts) and reasoning is not None:
            self._state = "thought"
        self._end = reasoning or ""  # of the reasoning; ``_behind`` is the state after it
        self._marks = (*filter(None, [self._form.trigger]), *REASONING)
        special = special_markers(tokenizer) if tokenizer is not None and marked else {}
        # They add nothing to the text of an answer without tools either.
        self._hidden = set(special.values()).intersection(REASONING_MARKERS)
        self._skip = skip  # the rest of it
        self._last = ""  # the last character of the content
        self._bare = thoughts and reasoning is not None  # spaces are left out until the next text
        self._exact = exact
        self._buffer = ""  # text that is not classified yet
        self._raw = ""  # in the states list and call: text before it, content if it is no call
        self._call: CallText = JsonCall(self._names, exact)
        self._sent = 0  # characters of its arguments that were returned
        self._begun = 0  # calls that have begun

    def push(self, delta: Delta) -> list[Piece]:
        """Return the pieces that are certain now."""
        self._buffer += delta.text if self._marked is None else self._marked.push(delta)
        if self._skip:
            begun = min(len(self._skip), len(self._buffer))
            expected = self._skip.startswith(self._buffer[:begun])
            self._buffer = self._buffer[begun if expected else 0 :]
            self._skip = self._skip[begun:] if expected else ""
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
            show = self._thought if self._state == "thought" else self._content
            pieces = show(rest if rest.strip() or not self._begun else "")
        self._buffer, self._state = "", "plain"
        return pieces

    def _advance(self) -> list[Piece]:
        step = {
            "opening": self._at_opening,
            "start": self._at_start,
            "text": self._in_text,
            "thought": self._in_thought,
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

    def _at_opening(self) -> list[Piece]:
        text = self._buffer.lstrip()
        if (pieces := self._reasoning_at(text)) is not None:
            return pieces
        if text and not any(marker.startswith(text) for marker in REASONING):
            self._state = "plain"
        return []

    def _reasoning_at(self, text: str) -> list[Piece] | None:
        """Begin reasoning where ``text``, the buffer without spaces before it, begins with its marker."""
        begin = next((marker for marker in REASONING if text.startswith(marker)), None)
        if begin is None:
            return None
        blank = self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text.removeprefix(begin)
        return self._think(blank, begin)

    def _at_start(self) -> list[Piece]:
        text = self._buffer.lstrip()
        blank = self._buffer[: len(self._buffer) - len(text)]
        if (pieces := self._reasoning_at(text)) is not None:
            return pieces
        if text.startswith(_TAG):
            self._buffer = text.removeprefix(_TAG)
            self._open(blank)
        elif text.startswith("{"):
            self._open("")
        elif text and not any(marker.startswith(text) for marker in (_TAG, *REASONING)):
            self._state = "plain"
        return []

    def _in_plain(self) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return self._content(text)

    def _in_text(self) -> list[Piece]:
        match = re.search("|".join(map(re.escape, self._marks)), self._buffer)
        if match is None:
            # A marker may begin with the last characters; spaces before a trigger are not content.
            certain, self._buffer = _certain(self._buffer, self._marks)
            return self._content(certain)
        before, marker, after = self._buffer[: match.start()], match[0], self._buffer[match.end() :]
        if marker == self._form.trigger:
            self._buffer = after
            self._open(before[len(before.rstrip()) :] + marker)
            if self._form.style == "mistral":
                self._state = "list"
            return self._content(before.rstrip())
        quote = (before or self._last)[-1:]
        if quote and quote in _QUOTES and marker not in self._hidden:
            if not after:  # the next character decides
                self._buffer = marker
                return self._content(before)
            if after[0] == quote:
                self._buffer = after
                return self._content(before + marker)
        self._buffer = after
        return self._think(before, marker)

    def _think(self, before: str, begin: str) -> list[Piece]:
        """Expect reasoning from here on, which ``begin`` has begun; return the content up to there."""
        self._state, self._end = "thought", REASONING[begin]
        if not self._thoughts:
            return self._content(before + begin)
        self._bare = True
        return self._content(before) if before.strip() else []

    def _in_thought(self) -> list[Piece]:
        before, match, after = self._buffer.partition(self._end)
        if match:
            self._buffer, self._state = after, self._behind
            if not self._thoughts:
                return self._content(before + match)
            pieces = self._thought(before.rstrip())
            self._bare = True
            return pieces
        length = _begun(self._buffer, [self._end])
        certain, self._buffer = self._buffer[: len(before) - length], self._buffer[len(before) - length :]
        if self._thoughts:  # spaces before the end of reasoning are left out
            kept = certain.rstrip()
            certain, self._buffer = kept, certain[len(kept) :] + self._buffer
        return self._thought(certain)

    def _thought(self, text: str) -> list[Piece]:
        """Return text of the reasoning."""
        if not self._thoughts:
            return self._content(text)
        if self._bare:
            text = text.lstrip()
        self._bare = self._bare and not text
        return [Thought(text)] if text else []

    def _open(self, raw: str) -> None:
        """Expect a call from here on; ``raw`` was written before it."""
        self._state, self._raw, self._sent = "call", raw, 0
        named = self._form.style == "named"
        self._call = NamedCall(self._names) if named else JsonCall(self._names, self._exact)

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
        return self._content(raw)

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
        elif self._form.style == "lines" and text.startswith("{"):
            self._buffer = text
            self._open("\n")
        elif self._form.style == "bare" and self._form.several and text.startswith(";"):
            self._buffer = text[1:]
            self._open(";")
        else:
            self._buffer, self._state = text, self._outside
        return []

    def _content(self, text: str) -> list[Piece]:
        for marker in self._hidden:
            text = text.replace(marker, "")
        if self._bare:
            text = text.lstrip()
        self._bare = self._bare and not text
        self._last = text[-1:] or self._last
        return [text] if text else []


def _begun(text: str, markers: Sequence[str]) -> int:
    """Return how many of the last characters of ``text`` may begin a marker."""
    longest = max(map(len, markers), default=1) - 1
    lengths = range(min(len(text), longest), 0, -1)
    return next((n for n in lengths if any(marker.startswith(text[-n:]) for marker in markers)), 0)


def _certain(text: str, markers: Sequence[str]) -> tuple[str, str]:
    """Split ``text`` before its last characters that may be spaces and the beginning of a marker."""
    certain = text[: len(text) - _begun(text, markers)].rstrip()
    return certain, text[len(certain) :]
