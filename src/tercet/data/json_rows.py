"""The rows of a JSON file: of JSON Lines, of an array, or of JSON values one after the other.

The content decides, not the file's name: C4 and Dolma, for example, name their JSON Lines ``.json.gz``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from tercet.data.byte_streams import Fault

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRow(NamedTuple):
    """A value of a file, which need not be an object.

    Attributes:
        value: the decoded JSON.
        number: the line of the value in JSON Lines, otherwise its place among the rows; from 1.
        where: the place in messages.
        offset: the byte of the file at which the line begins; None outside JSON Lines.
    """

    value: Any
    number: int
    where: str
    offset: int | None = None


class _Line(NamedTuple):
    number: int
    offset: int
    text: str


def json_rows(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[JsonRow | Fault]:
    """Yield the rows of a file, and a Fault for each line of JSON Lines that is not JSON.

    JSON Lines are streamed. An array, or values of several lines each, are held in memory as a whole.

    Args:
        name: the file's name in messages.
        lines: the lines of the file, each with its byte offset.

    Raises:
        Fault: an array, or a value of several lines, is not valid JSON.
    """
    numbered = (_Line(number, *line) for number, line in enumerate(lines, start=1))
    filled = (line for line in numbered if line.text.strip())
    first = next(filled, None)
    if first is None:
        return
    second = next(filled, None)
    rest = filled if second is None else chain([second], filled)
    begins = first.text.lstrip()[0]
    try:
        value = _DECODER.decode(first.text)
        if begins == "[" and second is None:
            yield from _array(name, value)
            return
    except (json.JSONDecodeError, RecursionError):
        # A first line that is a broken object precedes whole ones; the first line of an indented one does not.
        if begins == "[" or (begins == "{" and not _is_object(second)):
            yield from _values(name, first, rest)
            return
    for line in chain([first], rest):
        where = f"{name}:{line.number}"
        try:
            yield JsonRow(_DECODER.decode(line.text), line.number, where, line.offset)
        except json.JSONDecodeError as problem:
            yield Fault("not valid JSON", f"{where} is not valid JSON: {problem.msg}")
        except RecursionError:
            yield Fault("not valid JSON", f"{where} is not valid JSON: it is nested too deeply")


def _is_object(line: _Line | None) -> bool:
    try:
        return line is not None and isinstance(_DECODER.decode(line.text), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _array(name: str, rows: Iterable[Any]) -> Iterator[JsonRow]:
    return (JsonRow(row, number, f"{name}, row {number}") for number, row in enumerate(rows, start=1))


def _values(name: str, first: _Line, rest: Iterable[_Line]) -> Iterator[JsonRow]:
    """Yield the rows of a single array, or of values that are written one after the other."""
    text = "".join(line.text for line in chain([first], rest))
    values = []
    position = 0
    try:
        while (position := _after_space(text, position)) < len(text):
            value, position = _DECODER.raw_decode(text, position)
            values.append(value)
    except json.JSONDecodeError as problem:
        where = f"{name}:{first.number + problem.lineno - 1}:{problem.colno}"
        raise Fault("not valid JSON", f"{where} is not valid JSON: {problem.msg}") from problem
    except RecursionError as problem:
        message = f"{name}:{first.number} is not valid JSON: it is nested too deeply"
        raise Fault("not valid JSON", message) from problem
    yield from _array(name, values[0] if len(values) == 1 and isinstance(values[0], list) else values)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty text
    return match.end()
