"""The text of one tool call while the model writes it."""

from __future__ import annotations

import json
import re
from typing import Literal

_OPENING = r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
# Up to the arguments, in the order that all templates prescribe.
_JSON_HEAD = re.compile(
    _OPENING + r'"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME = re.compile(_OPENING + r'"name"\s*:\s*"(?P<name>[^"\\]*)"')
_FIRST_KEY = re.compile(r'\s*\{\s*"(?P<key>[^"\\]*)"')
_KEYS = ("name", "arguments", "parameters", "type", "id")
_NAMED_HEAD = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\]\s*(?=\{)")
_NAMED_BEGUN = re.compile(r"\s*[\w-]*\s*(?:\[CALL_ID\]\s*\w*\s*)?")


class CallText:
    """The text of one call as it comes.

    text: everything since the call was expected to begin.
    name: None until it is certain; from then on ``arguments`` grows.
    state: "failed" once the text cannot be a call.
    end: where the call ends in ``text``.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names, self.text = names, ""
        self.name: str | None = None
        self.arguments = ""
        self.state: Literal["open", "done", "failed"] = "open"
        self.end = 0
        self._from = 0  # where the arguments begin
        self._inner = _Brackets()

    def feed(self, text: str) -> None:
        """Append the next text and read as much of the call as there is."""
        self.text += text
        try:
            self._read()
        except _Malformed:
            self.state, self.end = "failed", self._from + len(self.arguments)

    def _read(self) -> None:
        raise NotImplementedError

    def _grow(self) -> int | None:
        """Extend the arguments; return where they end, or None while they are open."""
        end = self._inner.scan(self.text)
        self.arguments = self.text[self._from : len(self.text) if end is None else end]
        return end

    def _begin(self, head: re.Match[str]) -> None:
        self._check_name(head["name"])
        self.name, self._from = head["name"], head.end()
        self._inner = _Brackets(head.end())

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or name not in self.names:
            raise _Malformed


class JsonCall(CallText):
    """``{"name": "f", "arguments": {…}}``; the keys may come in any order."""

    def __init__(self, names: frozenset[str], exact: bool = False) -> None:
        super().__init__(names)
        self._exact = exact  # there must be arguments
        self._outer = _Brackets()

    def _read(self) -> None:
        if self.text.strip() and not self.text.lstrip().startswith("{"):
            raise _Malformed
        if self.name is None:
            if first := _FIRST_KEY.match(self.text):
                if first["key"] not in _KEYS:
                    raise _Malformed
                if name := _NAME.match(self.text):
                    self._check_name(name["name"])
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
        """Read a complete call whose keys come in another order, or whose arguments are a string of JSON."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise _Malformed from problem
        self._check_name(call.get("name"))
        arguments = call.get("arguments", call.get("parameters"))
        if arguments is None and self._exact:
            raise _Malformed
        if not isinstance(arguments, str):
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        if not is_object(arguments):
            raise _Malformed
        self.name, self.arguments = call["name"], arguments


class NamedCall(CallText):
    """``f[ARGS]{…}``, after the trigger."""

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
    """The text is not a call."""


class _Brackets:
    """Finds the end of a JSON object that begins at ``place``, possibly after spaces."""

    _SIGNS = re.compile(r'["\\{}\[\]]|[\x00-\x1f]')

    def __init__(self, place: int = 0) -> None:
        self.place = place  # the text is scanned up to here
        self._open: list[str] = []
        self._in_string = False
        self._end: int | None = None

    def scan(self, text: str) -> int | None:
        """Scan the rest of ``text``, which has grown; return the object's end, or None. Raises _Malformed."""
        while self._end is None and (sign := self._SIGNS.search(text, self.place)):
            self.place = sign.end()
            letter = sign[0]
            if self._in_string:
                if letter == "\\":
                    if self.place == len(text):  # the escaped character has not come
                        self.place -= 1
                        return None
                    self.place += 1
                elif letter == '"':
                    self._in_string = False
                elif letter < " ":
                    raise _Malformed
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._open.append("}" if letter == "{" else "]")
            elif letter in "}]":
                if not self._open or self._open.pop() != letter:
                    raise _Malformed
                if not self._open:
                    self._end = self.place
            elif letter == "\\":
                raise _Malformed
        if self._end is None:
            self.place = max(self.place, len(text))
        return self._end


def is_object(text: str) -> bool:
    """Return whether ``text`` is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
