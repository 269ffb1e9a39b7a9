"""Answers into content and tool calls, whole or while they are written.

A parser never fails: what looks like a call and is none stays content. Pieces of a call come with the
deltas of a stream: its id and name once, then its arguments as they are written.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tercet.engine.request import Delta
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.formats import ToolFormat, special_markers


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


class ToolParser:
    """One answer on its way. Feed it every delta with `push`, then call `finish`.

    form: None where there are no calls, and all is content.
    names: the functions that there are; a call of another one is content.
    whole: a call comes when it is complete and right, so that a malformed one is content to its last
        character. Otherwise its arguments come as they are written, and where they go wrong, it ends.
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
        self._marked = None if form is None or tokenizer is None else _MarkedText(tokenizer)
        # start: nothing but blanks so far, and a call may follow without a trigger; list: before "[";
        # between: after a call; plain: no more calls can come.
        self._state: Literal["start", "text", "list", "call", "between", "plain"]
        self._state = "plain" if form is None else "text" if form.trigger else "start"
        self._buffer = ""  # what is not decided yet
        self._raw = ""  # in the states list and call: what else is content if it is none
        self._call: _Call = _JsonCall(self._names)
        self._sent = 0  # characters of its arguments
        self._begun = 0  # calls

    def push(self, delta: Delta) -> list[Piece]:
        """What is certain now."""
        self._buffer += delta.text if self._marked is None else self._marked.push(delta)
        return self._advance()

    def finish(self) -> list[Piece]:
        """The rest, when the answer has ended. A call that was cut off in its arguments is one."""
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
        tag, found = "<|python_tag|>", self._buffer.lstrip()
        if found.startswith(tag):
            self._raw, found = self._buffer[: -len(found)], found.removeprefix(tag)
            self._buffer = found
            self._open(self._raw)
        elif found.startswith("{"):
            self._open("")
        elif found and not tag.startswith(found):
            self._state = "plain"
        return []

    def _in_plain(self) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return _content(text)

    def _in_text(self) -> list[Piece]:
        trigger = self._form.trigger
        before, found, after = self._buffer.partition(trigger)
        if found:
            self._buffer = after
            self._open(before[len(before.rstrip()) :] + trigger)
            if self._form.style == "mistral":
                self._state = "list"
        else:
            # It may begin with the last characters; blanks before it are none of the content.
            before, self._buffer = _certain(before, trigger)
        return _content(before.rstrip() if found else before)

    def _open(self, raw: str) -> None:
        """From here on a call is expected; ``raw`` was written before it."""
        self._state, self._raw, self._sent = "call", raw, 0
        self._call = (_NamedCall if self._form.style == "named" else _JsonCall)(self._names)

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
        if call.state == "done" and self._whole and not _is_object(call.arguments):
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
        """The state of content."""
        return "text" if self._form.trigger else "plain"

    def _no_call(self) -> list[Piece]:
        """What was written so far is content; what comes after the trigger may hold another one."""
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
        found = self._buffer.lstrip()
        if not found:
            return []
        if self._form.style == "hermes":
            close = "</tool_call>"
            if found != close and close.startswith(found):
                return []
            self._buffer, self._state = found.removeprefix(close), "text"
        elif self._form.style == "mistral" and found.startswith(","):
            self._buffer = found[1:]
            self._open(",")
        elif self._form.style == "mistral":
            self._buffer, self._state = found.removeprefix("]"), "text"
        elif self._form.style == "bare" and self._form.several and found.startswith(";"):
            self._buffer = found[1:]
            self._open(";")
        else:
            self._buffer, self._state = found, self._outside
        return []


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


# One call

_OPENING = r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
# Up to the arguments, in the order that all templates ask for.
_JSON_HEAD = re.compile(
    _OPENING + r'"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME = re.compile(_OPENING + r'"name"\s*:\s*"(?P<name>[^"\\]*)"')
_FIRST_KEY = re.compile(r'\s*\{\s*"(?P<key>[^"\\]*)"')
_KEYS = ("name", "arguments", "parameters", "type", "id")
_NAMED_HEAD = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\]\s*(?=\{)")
_NAMED_BEGUN = re.compile(r"\s*[\w-]*\s*(?:\[CALL_ID\]\s*\w*\s*)?")


class _Call:
    """The text of one call as it comes.

    name: None until it is certain; then ``arguments`` grows. end: where the call does, in ``text``.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names, self.text = names, ""
        self.name: str | None = None
        self.arguments = ""
        self.state: Literal["open", "done", "failed"] = "open"
        self.end = 0
        self._from = 0  # of the arguments
        self._inner = _Brackets()

    def feed(self, text: str) -> None:
        self.text += text
        try:
            self._read()
        except _Malformed:
            self.state, self.end = "failed", self._from + len(self.arguments)

    def _read(self) -> None:
        raise NotImplementedError

    def _grow(self) -> int | None:
        """Go on in the arguments; where they end, if they do."""
        end = self._inner.scan(self.text)
        self.arguments = self.text[self._from : len(self.text) if end is None else end]
        return end

    def _begin(self, head: re.Match[str]) -> None:
        self._known(head["name"])
        self.name, self._from = head["name"], head.end()
        self._inner = _Brackets(head.end())

    def _known(self, name: object) -> None:
        if not isinstance(name, str) or name not in self.names:
            raise _Malformed


class _JsonCall(_Call):
    """``{"name": "f", "arguments": {…}}``; the keys may come in any order."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self._outer = _Brackets()

    def _read(self) -> None:
        if self.text.strip() and not self.text.lstrip().startswith("{"):
            raise _Malformed
        if self.name is None:
            if first := _FIRST_KEY.match(self.text):
                if first["key"] not in _KEYS:
                    raise _Malformed
                if name := _NAME.match(self.text):
                    self._known(name["name"])
            if head := _JSON_HEAD.match(self.text):
                self._begin(head)
        if self.name is not None:
            self._grow()
        end = self._outer.scan(self.text)
        if end is None:
            return
        if self.name is None:
            self._whole(self.text[:end])
        self.state, self.end = "done", end

    def _whole(self, text: str) -> None:
        """A call in another order than usual, or whose arguments are a string of JSON."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise _Malformed from problem
        self._known(call.get("name"))
        arguments = call.get("arguments", call.get("parameters"))
        if not isinstance(arguments, str):
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        if not _is_object(arguments):
            raise _Malformed
        self.name, self.arguments = call["name"], arguments


class _NamedCall(_Call):
    """``f[ARGS]{…}``, behind the trigger."""

    def _read(self) -> None:
        if self.name is None:
            head = _NAMED_HEAD.match(self.text)
            if head is None:
                begun = _NAMED_BEGUN.match(self.text)
                rest = self.text[begun.end() if begun else 0 :].rstrip()
                if not any(marker.startswith(rest) for marker in ("[CALL_ID]", "[ARGS]")):
                    raise _Malformed
                return
            self._begin(head)
        end = self._grow()
        if end is not None:
            self.state, self.end = "done", end


class _Malformed(Exception):
    """This is no call."""


class _Brackets:
    """Where a JSON object ends that begins at ``place``; blanks may come before it."""

    _SIGNS = re.compile(r'["\\{}\[\]]|[\x00-\x1f]')

    def __init__(self, place: int = 0) -> None:
        self.place = place  # scanned up to there
        self._open: list[str] = []
        self._in_string = False
        self._end: int | None = None

    def scan(self, text: str) -> int | None:
        """The end, once it is in ``text``, which has grown. Raises _Malformed."""
        while self._end is None and (sign := self._SIGNS.search(text, self.place)):
            self.place = sign.end()
            found = sign[0]
            if self._in_string:
                if found == "\\":
                    if self.place == len(text):  # what is escaped has not come
                        self.place -= 1
                        return None
                    self.place += 1
                elif found == '"':
                    self._in_string = False
                elif found < " ":
                    raise _Malformed
            elif found == '"':
                self._in_string = True
            elif found in "{[":
                self._open.append("}" if found == "{" else "]")
            elif found in "}]":
                if not self._open or self._open.pop() != found:
                    raise _Malformed
                if not self._open:
                    self._end = self.place
            elif found == "\\":
                raise _Malformed
        if self._end is None:
            self.place = max(self.place, len(text))
        return self._end


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _content(text: str) -> list[Piece]:
    return [text] if text else []


def _certain(text: str, trigger: str) -> tuple[str, str]:
    """``text`` up to where blanks and the beginning of ``trigger`` may be its end, and the rest."""
    for length in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-length:]):
            break
    else:
        length = 0
    certain = text[: len(text) - length].rstrip()
    return certain, text[len(certain) :]


# Special tokens


class _MarkedText:
    """Puts markers that are special tokens, which add nothing to a text, back into it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._markers = special_markers(tokenizer)
        self._bytes_of = TokenBytes(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._given = 0  # characters of the text: in the tokens so far, given so far
        self._due: deque[tuple[int, str]] = deque()  # markers, and after how many characters they come

    def push(self, delta: Delta) -> str:
        """The delta's text with its markers."""
        if not self._markers:
            return delta.text
        for token in delta.tokens:
            if token in self._markers:
                self._due.append((self._read, self._markers[token]))
            else:
                self._read += len(self._decoder.decode(self._bytes_of(token)))
        text, parts = delta.text, list[str]()
        # Text may come later than its tokens, where it could begin a stop string.
        while self._due and self._due[0][0] <= self._given + len(text):
            place, marker = self._due.popleft()
            parts += [text[: place - self._given], marker]
            text, self._given = text[place - self._given :], place
        self._given += len(text)
        return "".join([*parts, text])
