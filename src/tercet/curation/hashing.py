"""Hash words and word n-grams to 64 bits, for many documents at once.

The words are those of `tercet.data.decontaminate.words` (case folded, without punctuation, each character of
an unspaced script a word), so that counts here can be checked there. The hash of a word is a polynomial in
its characters modulo 2^64, mixed. A few numpy operations over the characters of a batch compute all hashes,
about a hundred times faster than sets of Python strings.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tercet.curation.characters import HASH_BASE, TABLE_SIZE, UNSPACED_RANGES

Hashes = NDArray[np.uint64]

_CHUNK = 1 << 20  # characters of one operation: 8 MB an array
_LETTER, _UNSPACED = 1, 2  # classes of characters; 0 separates words


def mixed(values: Hashes) -> Hashes:
    """Mix the bits of 64-bit numbers with a bijection: the finaliser of SplitMix64."""
    return _mix(values.copy())


def _mix(values: Hashes) -> Hashes:
    """Mix in place and in pieces, without a second array of a large document's words."""
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
    table = np.zeros(TABLE_SIZE + 1, dtype=np.uint8)
    table[:TABLE_SIZE] = np.fromiter(
        map(str.isalnum, map(chr, range(TABLE_SIZE))), dtype=np.uint8, count=TABLE_SIZE
    )
    for first, last in UNSPACED_RANGES:
        table[first : last + 1] = _UNSPACED
    return table


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Return the powers of ``HASH_BASE`` for each place in a chunk, and their inverses modulo 2^64."""
    inverse = pow(HASH_BASE, -1, 1 << 64)
    ones = np.ones(_CHUNK + 1, dtype=np.uint64)
    up, down = ones.copy(), ones
    up[1:], down[1:] = np.uint64(HASH_BASE), np.uint64(inverse)
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def folded(text: str) -> str:
    """Normalise a text for the comparison of words: NFKC, case folded, without apostrophes."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "")
    else:
        text = text.lower()
    return text.replace("'", "")


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash the words of all texts.

    Returns:
        The hashes, text after text, shape (words,), and the bounds, shape (texts + 1,): text i has the words
        from bounds[i] to bounds[i + 1].
    """
    parts: list[Hashes] = []
    counts = np.zeros(len(texts) + 1, dtype=np.int64)
    for first, pieces in _chunks(texts):
        hashes, places = _hash_words("\n".join(pieces))
        ends = np.cumsum([len(piece) + 1 for piece in pieces])
        bounds = np.searchsorted(places, ends)
        counts[first + 1 : first + 1 + len(pieces)] += np.diff(bounds, prepend=0)
        parts.append(hashes)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64), np.cumsum(counts)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield normalised texts in groups of at most `_CHUNK` characters, each with the index of its first text.

    A longer text is yielded in several pieces, cut between words if a chunk has a space.
    """
    group: list[str] = []
    size = first = 0
    for index, raw in enumerate(texts):
        text = folded(raw)
        if group and size + len(text) + 1 > _CHUNK:
            yield first, group
            group, size = [], 0
        if not group:
            first = index
        if len(text) <= _CHUNK - 1:
            group.append(text)
            size += len(text) + 1
            continue
        start = 0
        while start < len(text):
            end = min(len(text), start + _CHUNK - 1)
            if end < len(text):
                end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end
            yield index, [text[start:end]]
            start = end
    if group:
        yield first, group


def _hash_words(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """Return the hash of each word of a chunk, and the place of its first character."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _classes()[np.minimum(points, TABLE_SIZE)]
    inside = kinds > 0
    alone = kinds == _UNSPACED
    # Whether a character continues the word of the previous one.
    joins = np.zeros(len(points) + 1, dtype=bool)
    joins[1:-1] = (kinds[1:] == _LETTER) & (kinds[:-1] == _LETTER)
    starts = np.flatnonzero(inside & (alone | ~joins[:-1]))
    ends = np.flatnonzero(inside & (alone | ~joins[1:])) + 1
    up, down = _powers()
    sums = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum(points * up[: len(points)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * down[starts]), starts


def gram_hashes(words: Hashes, bounds: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash the word n-grams of every text; a text with fewer than ``n`` words has none.

    Returns:
        The hashes, text after text, and the bounds of each text, as `word_hashes` gives them.
    """
    counts = np.maximum(np.diff(bounds) - n + 1, 0)
    if len(words) < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(len(bounds), dtype=np.int64)
    runs = _runs(words, n)
    # Only the n-grams whose words all belong to one text.
    whole = np.ones(len(runs), dtype=bool)
    for back in range(1, n):
        borders = bounds[1:-1] - back
        whole[borders[(borders >= 0) & (borders < len(whole))]] = False
    return runs if whole.all() else runs[whole], np.concatenate([[0], np.cumsum(counts)])


def _runs(words: Hashes, n: int) -> Hashes:
    """Hash the ``n`` words from each place on, in their order."""
    length = len(words) - n + 1
    total = words[:length].copy()
    for place in range(1, n):
        total *= np.uint64(HASH_BASE)
        total += words[place : place + length]
    return _mix(total)
