"""Patterns of strings and of property names: as llguidance reads them, their texts, and all texts but some."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

MOST_TEXTS = 64  # the most texts of a pattern that are listed


class _Unlistable(Exception):
    """The texts of a pattern are too many, or its syntax is none of those that are listed."""


@lru_cache(256)
def matches(pattern: str, text: str) -> bool:
    """Return whether a JSON Schema's ``pattern`` matches somewhere in a text."""
    from tercet.engine.schema_check import is_valid

    return is_valid({"pattern": pattern}, text, True)


@lru_cache(256)
def all_texts(pattern: str) -> tuple[str, ...] | None:
    """Return the texts that an anchored ``pattern`` matches; None for more than MOST_TEXTS, or any other pattern."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    try:
        from re import _parser as parser  # type: ignore[attr-defined]  # there is no public parser of expressions

        texts = list(_listed(parser.parse(pattern[1:-1])))
    except (re.error, _Unlistable, OverflowError, RecursionError):
        return None
    texts = list(dict.fromkeys(texts))
    # A "^" or "$" inside of an alternative binds to that alternative only: the validator decides.
    if len(texts) > MOST_TEXTS or not all(matches(pattern, text) for text in texts):
        return None
    if re.search(r"\|", pattern) and not re.fullmatch(r"\^\((?:\?:)?[^()]*\)\$", pattern):
        return None
    return tuple(texts)


def _listed(parsed: Iterable[tuple[object, object]]) -> list[str]:
    """Return the texts of a parsed expression in the order in which it names them."""
    results = [""]
    for operation, value in parsed:
        pieces = _pieces(str(operation), value)
        results = [before + piece for before, piece in itertools.product(results, pieces)]
        if len(results) > MOST_TEXTS:
            raise _Unlistable
    return results


def _pieces(operation: str, value: Any) -> list[str]:
    """Return the texts of one operation of Python's parser of regular expressions."""
    if operation == "LITERAL":
        return [chr(value)]
    if operation == "IN":
        letters: list[str] = []
        for kind, part in value:
            if str(kind) == "LITERAL":
                letters.append(chr(part))
            elif str(kind) == "RANGE" and part[1] - part[0] < MOST_TEXTS:
                letters += map(chr, range(part[0], part[1] + 1))
            else:
                raise _Unlistable
        return letters
    if operation == "BRANCH":
        return [text for branch in value[1] for text in _listed(branch)]
    if operation == "SUBPATTERN":
        return _listed(value[-1])
    if operation == "MAX_REPEAT":
        least, most, inner = value
        if most > MOST_TEXTS:
            raise _Unlistable
        texts: list[str] = []
        for count in range(least, most + 1):
            texts += _listed(list(inner) * count)
        return texts
    raise _Unlistable


def held(pattern: str) -> str:
    r"""Return a ``pattern`` of a JSON string that llguidance holds; it may allow less.

    In llguidance 1.9.1 a class of characters that has all control characters allows every escape sequence,
    ``\"`` and ``\\`` too. So control characters are taken from classes that exclude one of these two.
    """
    return _ESCAPE_OR_CLASS.sub(_without_controls, pattern)


_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)


def _without_controls(match: re.Match[str]) -> str:
    text = match[0]
    if not text.startswith("[^"):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if all(re.fullmatch(text, character) for character in '"\\'):
                return text
    except re.error:
        pass  # Rust's syntax: exclude them to be safe
    return rf"{text[:-1]}\x00-\x1f]"


def other_than(texts: Collection[str]) -> str:
    """Return a regular expression, anchored and in Rust's syntax, of every text but these."""
    return held(f"^(?:{_other(sorted(texts))})$")


def _other(texts: list[str]) -> str:
    """Return the expression of every text but these, which are sorted."""
    if texts == [""]:
        return r"(?s:.+)"
    parts = [] if "" in texts else [""]
    heads = dict.fromkeys(text[0] for text in texts if text)
    for head in heads:
        parts.append(_character(head) + _other([text[1:] for text in texts if text[:1] == head]))
    parts.append(f"[^{''.join(map(_character, heads))}](?s:.*)")
    return f"(?:{'|'.join(parts)})"


def _character(character: str) -> str:
    return character if character.isalnum() and character.isascii() else rf"\x{{{ord(character):x}}}"
