"""The text of one tool call while the model writes it."""

from __future__ import annotations

import json
import re
from typing import Literal

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


class CallText:
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


class JsonCall(CallText):
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
        if not is_object(arguments):
            raise _Malformed
        self.name, self.arguments = call["name"], arguments


class NamedCall(CallText):
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


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
