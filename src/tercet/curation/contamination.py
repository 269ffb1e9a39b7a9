"""Find the documents that may hold test texts, so that `tercet.data.decontaminate` examines only those.

Most documents share no word n-gram, or too few, with any test text. Hashes show that fast, for a whole part
of the corpus at once. The documents selected here are a superset of those that the Decontaminator changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.curation.hashing import Hashes, gram_hashes, word_hashes
from tercet.data.decontaminate import NEAR_MINIMUM_WORDS, SHARE, N
from tercet.data.rows import read_rows
from tercet.errors import UserError
from tercet.files import read_text

_TEXT_FIELDS = ("text", "prompt", "question", "input", "sentence")
_BITS = 20  # of a hash: a table of a megabyte, which fits into the processor's cache


def read_test_texts(path: str | Path) -> list[str]:
    """Read the test texts of a benchmark file: one a line from ``.txt`` and ``.md``, one a row from a table.

    Raises:
        UserError: The file can't be read, or its rows have none of the fields text, prompt, question,
            input and sentence.
    """
    path = Path(path)
    if path.suffix.lower() in (".txt", ".md"):
        texts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    else:
        texts = []
        for number, row in enumerate(read_rows(path), start=1):
            field = next((name for name in _TEXT_FIELDS if isinstance(row.get(name), str)), None)
            if field is None:
                fields = ", ".join(map(str, row)) or "none"
                raise UserError(
                    f"{path}, row {number}: no test text; the field must be one of {', '.join(_TEXT_FIELDS)}; "
                    f"there are: {fields}"
                )
            texts.append(row[field])
    if not texts:
        raise UserError(f"{path} holds no test text")
    return texts


class Suspects:
    """A filter for the documents that a Decontaminator of the same test texts must examine."""

    def __init__(self, texts: Iterable[str]) -> None:
        words, bounds = word_hashes(list(texts))
        needed: dict[int, dict[int, int]] = {}
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            n = min(N, end - start)
            if not n:
                continue
            grams = set(gram_hashes(words[start:end], np.array([0, end - start]), n)[0].tolist())
            # A near-copy holds a share of the test's n-grams; a copy of a short test holds all of them.
            share = SHARE if end - start >= NEAR_MINIMUM_WORDS else 1.0
            minimum = math.ceil(share * len(grams))
            minima = needed.setdefault(n, {})
            for gram in grams:
                minima[gram] = min(minimum, minima.get(gram, minimum))
        self._tables = {n: _Table(minima) for n, minima in needed.items()}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each text whether it may hold a test text, shape (texts,)."""
        words, bounds = word_hashes(texts)
        suspect = np.zeros(len(texts), dtype=bool)
        for n, table in self._tables.items():
            grams, starts = gram_hashes(words, bounds, n)
            places, needed = table.hits(grams)
            owners = np.searchsorted(starts, places, side="right") - 1
            counts = np.bincount(owners, minlength=len(texts))
            minimum = np.full(len(texts), np.iinfo(np.int64).max)
            np.minimum.at(minimum, owners, needed)
            suspect |= counts >= minimum
        return suspect


class _Table:
    """The n-grams of the test texts, each with the fewest n-grams that one of its tests needs for a match."""

    def __init__(self, needed: Mapping[int, int]) -> None:
        self._grams = np.array(sorted(needed), dtype=np.uint64)
        self._needed = np.array([needed[gram] for gram in sorted(needed)], dtype=np.int64)
        self._maybe = np.zeros(1 << _BITS, dtype=bool)
        self._maybe[self._grams >> np.uint64(64 - _BITS)] = True

    def hits(self, grams: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places of ``grams`` that are in the table, and the n-grams needed for a match of each."""
        places = np.flatnonzero(self._maybe[grams >> np.uint64(64 - _BITS)])
        entries = np.searchsorted(self._grams, grams[places])
        entries[entries == len(self._grams)] = 0
        same = self._grams[entries] == grams[places]
        return places[same], self._needed[entries[same]]
