"""Words and word n-grams as 64-bit numbers, computed for many documents at once.

The words are those of `tercet.data.decontaminate.words` (case folded, punctuation left out, each
character of an unspaced script a word), so that what is counted here can be checked there. A word's
number is a polynomial in its characters modulo 2^64, mixed; all of a batch comes out of a few numpy
passes over its characters, some hundred times faster than Python strings in sets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_CHUNK = 1 << 20  # characters worked on at once: 8 MB an array
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
_LETTER, _UNSPACED = 1, 2  # classes of characters; 0 stands between words
_TABLE = 0x33480  # above the last ideographs no character is part of a word
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
)  # fmt: skip


def mixed(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers that spreads every bit over all (the finaliser of SplitMix64)."""
    return _mix(values.copy())


def _mix(values: Hashes) -> Hashes:
    """`mixed` in place, some at a time: no second array of a large document's words."""
    flat = values.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        part ^= part >> np.uint64(30)
        part *= np.uint64(0xBF58476D1CE4E5B9)
        part ^= part >> np.uint64(27)
        part *= np.uint64(0x94D049BB133111EB)
        part ^= part >> np.uint64(31)
    return values


@cache
def _classes() -> NDArray[np.uint8]:
    table = np.zeros(_TABLE + 1, dtype=np.uint8)
    table[:_TABLE] = np.fromiter(map(str.isalnum, map(chr, range(_TABLE))), dtype=np.uint8, count=_TABLE)
    for first, last in _UNSPACED_RANGES:
        table[first : last + 1] = _UNSPACED
    return table


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """``_BASE`` to the power of each place in a chunk, and the inverses modulo 2^64."""
    inverse = pow(_BASE, -1, 1 << 64)
    ones = np.ones(_CHUNK + 1, dtype=np.uint64)
    up, down = ones.copy(), ones
    up[1:], down[1:] = np.uint64(_BASE), np.uint64(inverse)
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def folded(text: str) -> str:
    """The text as its words are compared: NFKC, case folded, without apostrophes."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "")
    else:
        text = text.lower()
    return text.replace("'", "")


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """The words of all texts one after the other, and where each text's begin.

    Returns:
        The hashes, shape (words,), and the bounds, shape (texts + 1,): text i has the words from
        bounds[i] to bounds[i + 1].
    """
    found: list[Hashes] = []
    counts = np.zeros(len(texts) + 1, dtype=np.int64)
    for first, pieces in _chunks(texts):
        hashes, places = _hash_words("\n".join(pieces))
        ends = np.cumsum([len(piece) + 1 for piece in pieces])
        until = np.searchsorted(places, ends)
        counts[first + 1 : first + 1 + len(pieces)] += np.diff(until, prepend=0)
        found.append(hashes)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64), np.cumsum(counts)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Texts in groups of at most a chunk's characters, with the number of the first.

    A longer text comes in several pieces, cut between words where there is a space in reach.
    """
    held: list[str] = []
    size = first = 0
    for index, raw in enumerate(texts):
        text = folded(raw)
        if held and size + len(text) + 1 > _CHUNK:
            yield first, held
            held, size = [], 0
        if not held:
            first = index
        if len(text) <= _CHUNK - 1:
            held.append(text)
            size += len(text) + 1
            continue
        start = 0
        while start < len(text):
            end = min(len(text), start + _CHUNK - 1)
            if end < len(text):
                end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end
            yield index, [text[start:end]]
            start = end
    if held:
        yield first, held


def _hash_words(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of each word of a chunk, and its first character's place."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _classes()[np.minimum(points, _TABLE)]
    inside = kinds > 0
    alone = kinds == _UNSPACED
    joins = np.zeros(len(points) + 1, dtype=bool)  # whether a character goes on with the word before it
    joins[1:-1] = (kinds[1:] == _LETTER) & (kinds[:-1] == _LETTER)
    starts = np.flatnonzero(inside & (alone | ~joins[:-1]))
    ends = np.flatnonzero(inside & (alone | ~joins[1:])) + 1
    up, down = _powers()
    sums = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum(points * up[: len(points)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * down[starts]), starts


def gram_hashes(words: Hashes, bounds: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The word n-grams of every text, in order, and where each text's begin.

    A text with fewer than ``n`` words has none.
    """
    counts = np.maximum(np.diff(bounds) - n + 1, 0)
    if len(words) < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(len(bounds), dtype=np.int64)
    runs = _runs(words, n)
    # Places where a gram begins whose words all belong to one text.
    whole = np.ones(len(runs), dtype=bool)
    for back in range(1, n):
        borders = bounds[1:-1] - back
        whole[borders[(borders >= 0) & (borders < len(whole))]] = False
    return runs if whole.all() else runs[whole], np.concatenate([[0], np.cumsum(counts)])


def _runs(words: Hashes, n: int) -> Hashes:
    """The hash of the ``n`` words from each place on: order counts."""
    length = len(words) - n + 1
    total = words[:length].copy()
    for place in range(1, n):
        total *= np.uint64(_BASE)
        total += words[place : place + length]
    return _mix(total)
