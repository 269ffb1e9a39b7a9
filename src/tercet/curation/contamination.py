"""Which documents may hold test texts, told fast; `tercet.data.decontaminate` then looks at those.

Most documents share no word 5-gram, or too few, with any test text. That is seen on hashes, for a whole
part of the corpus at once. What this lets through is a superset of what the Decontaminator touches.
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
_BITS = 20  # of a hash: a table of a megabyte, which stays in the cache


def read_test_texts(path: str | Path) -> list[str]:
    """The test texts of a benchmark file: a ``.txt`` has one a line, a table one a row.

    Raises:
        UserError: the file can't be read, or its rows have none of the fields text, prompt, question,
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
                there = ", ".join(map(str, row)) or "none"
                raise UserError(
                    f"{path}, row {number}: no test text; the field must be one of {', '.join(_TEXT_FIELDS)}; "
                    f"there are: {there}"
                )
            texts.append(row[field])
    if not texts:
        raise UserError(f"{path} holds no test text")
    return texts


class Suspects:
    """Says which documents a Decontaminator of the same texts has to look at.

    Args:
        texts: the test texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        words, bounds = word_hashes(list(texts))
        needed: dict[int, dict[int, int]] = {}
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            n = min(N, end - start)
            if not n:
                continue
            found = set(gram_hashes(words[start:end], np.array([0, end - start]), n)[0].tolist())
            # A near-copy holds a share of the test's n-grams, the copy of a shorter one all.
            share = SHARE if end - start >= NEAR_MINIMUM_WORDS else 1.0
            least = math.ceil(share * len(found))
            known = needed.setdefault(n, {})
            for gram in found:
                known[gram] = min(least, known.get(gram, least))
        self._tables = {n: _Table(known) for n, known in needed.items()}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts may hold a test text, shape (texts,)."""
        words, bounds = word_hashes(texts)
        found = np.zeros(len(texts), dtype=bool)
        for n, table in self._tables.items():
            grams, starts = gram_hashes(words, bounds, n)
            places, needed = table.hits(grams)
            owners = np.searchsorted(starts, places, side="right") - 1
            counts = np.bincount(owners, minlength=len(texts))
            least = np.full(len(texts), np.iinfo(np.int64).max)
            np.minimum.at(least, owners, needed)
            found |= counts >= least
        return found


class _Table:
    """The test texts' n-grams, and of how many of them a document must hold one more for a match."""

    def __init__(self, needed: Mapping[int, int]) -> None:
        self._grams = np.array(sorted(needed), dtype=np.uint64)
        self._needed = np.array([needed[gram] for gram in sorted(needed)], dtype=np.int64)
        self._maybe = np.zeros(1 << _BITS, dtype=bool)
        self._maybe[self._grams >> np.uint64(64 - _BITS)] = True

    def hits(self, grams: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places of ``grams`` that are known, and for each how many its texts need at least."""
        places = np.flatnonzero(self._maybe[grams >> np.uint64(64 - _BITS)])
        where = np.searchsorted(self._grams, grams[places])
        where[where == len(self._grams)] = 0
        same = self._grams[where] == grams[places]
        return places[same], self._needed[where[same]]
