"""Find copies of documents: exact ones by a hash, near ones by MinHash and locality-sensitive hashing.

A document is the set of its word 5-grams. Its MinHash signature (Broder 1997) has 14 bands of 8
values; two documents count as near-duplicates if any band agrees, which at a Jaccard similarity ``s`` of
their sets happens with probability 1 - (1 - s^8)^14: 5% at 0.5, 56% at 0.7, 77% at 0.75, 92% at
0.8, half at 0.69. These are FineWeb's numbers (Penedo et al. 2024, arXiv 2406.17557, section 3.4), chosen
there for a threshold of 0.75. Near-duplicates of near-duplicates form one cluster; the first document of
a cluster, in the order of reading, stays.

Memory holds no document and no signature: the hashes of all bands are on disk, part after part, and are read
band by band.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tercet.curation.hashing import Hashes, gram_hashes, mixed, word_hashes
from tercet.curation.settings import BANDS, ROWS

NGRAM = 5
_SORTED_AT_ONCE = 4_000_000  # hashes: 32 MB, and as much for their order
_WHITE_SPACE = b" \t\n\r\v\f"

Indices = NDArray[np.signedinteger]


@dataclass(frozen=True)
class MinHash:
    """The parameters of near-duplicate detection.

    Attributes:
        bands: Bands of a signature; more bands find more near-copies.
        rows: Values in a band; more rows are stricter.
        ngram: Words in a shingle.
        seed: Of the random permutations.
    """

    bands: int = BANDS
    rows: int = ROWS
    ngram: int = NGRAM
    seed: int = 0

    @property
    def threshold(self) -> float:
        """The similarity at which a pair is found with probability one half."""
        return float((1 - 0.5 ** (1 / self.bands)) ** (1 / self.rows))

    def probability(self, similarity: float) -> float:
        """Return the probability that two documents of this Jaccard similarity share a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def exact_keys(texts: Sequence[str]) -> Hashes:
    """Hash each text without its white space to 128 bits, shape (2, texts)."""
    digests = b"".join(_digest(text) for text in texts)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2).T.astype(np.uint64)


def _digest(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass").translate(None, _WHITE_SPACE)
    return hashlib.blake2b(data, digest_size=16).digest()


def band_keys(texts: Sequence[str], minhash: MinHash) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash each band of each text to 64 bits.

    A text of fewer words than a shingle is one shingle. A text without words has the hash 0 in every band,
    and is no near-duplicate of any other.

    Returns:
        The hashes, shape (bands, texts), and the number of words of each text.
    """
    from rensa import RMinHash

    words, bounds = word_hashes(texts)
    shingles, starts = _shingles(words, bounds, minhash.ngram)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, starts.astype(np.uint64), minhash.bands * minhash.rows, minhash.seed
    )
    rows = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), minhash.bands, minhash.rows)
    keys = np.zeros((minhash.bands, len(texts)), dtype=np.uint64)
    for place in range(minhash.rows):
        keys = mixed(keys ^ rows[:, :, place].T)
    keys[:, np.diff(starts) == 0] = 0
    return keys, np.diff(bounds)


def _shingles(words: Hashes, bounds: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash the n-grams of each text; a text of fewer than ``n`` words is one n-gram."""
    grams, starts = gram_hashes(words, bounds, n)
    counts = np.diff(bounds)
    short = np.flatnonzero((counts > 0) & (counts < n))
    if not len(short):
        return grams, starts
    whole = []
    for index in short:
        own = words[bounds[index] : bounds[index + 1]]
        whole.append(gram_hashes(own, np.array([0, len(own)]), len(own))[0][0])
    grams = np.insert(grams, starts[short], np.array(whole, dtype=np.uint64))
    lengths = np.diff(starts)
    lengths[short] = 1
    return grams, np.concatenate([[0], np.cumsum(lengths)])


class Columns(Protocol):
    """The hashes of all documents, by column."""

    def parts(self, name: str) -> Iterator[Hashes]:
        """Yield the hashes of the column ``name``, one part of the documents after the other."""
        ...


@dataclass(frozen=True)
class Duplicates:
    """The clusters of copies among all documents.

    Attributes:
        first: For each document the index of the document that stays in its place, or its own index if it
            stays; shape (documents,).
        exact: Whether the document is an exact copy, shape (documents,).
    """

    first: Indices
    exact: NDArray[np.bool_]

    @property
    def stays(self) -> NDArray[np.bool_]:
        """Whether each document stays, shape (documents,)."""
        return np.asarray(self.first == np.arange(len(self.first), dtype=self.first.dtype))


def exact_duplicates(columns: Columns, count: int) -> Duplicates:
    """Find the documents whose 128-bit keys (columns ``exact0`` and ``exact1``) occurred before."""
    first = _numbers(count)
    exact = np.zeros(count, dtype=np.bool_)
    for low, places in _in_pieces(columns, "exact0", count):
        high = _gathered(columns, "exact1", places)
        order = np.lexsort((places, high, low))
        low, high, places = low[order], high[order], places[order]
        heads = _heads((low[1:] == low[:-1]) & (high[1:] == high[:-1]), len(places))
        first[places] = places[heads]
        exact[places] = heads != np.arange(len(heads))
    return Duplicates(first, exact)


def near_duplicates(columns: Columns, exact: Duplicates, minhash: MinHash) -> Duplicates:
    """Join the documents that are no exact copies into clusters, by the columns ``band0``, ``band1`` and so on."""
    count = len(exact.first)
    parents = _numbers(count)
    for band in range(minhash.bands):
        for keys, places in _in_pieces(columns, f"band{band}", count):
            usable = ~exact.exact[places] & (keys != 0)
            keys, places = keys[usable], places[usable]
            order = np.lexsort((places, keys))
            keys, places = keys[order], places[order]
            heads = _heads(keys[1:] == keys[:-1], len(places))
            joined = heads != np.arange(len(heads))
            _union(parents, places[joined], places[heads[joined]])
    while _shortened(parents):
        pass
    # An exact copy belongs to the cluster of its original.
    return Duplicates(_looked_up(parents, exact.first), exact.exact)


def _numbers(count: int) -> Indices:
    """Return 0 to ``count`` - 1, in 32 bits if they fit: 400 MB for a hundred million short documents."""
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)


def _in_pieces(columns: Columns, name: str, count: int) -> Iterator[tuple[Hashes, Indices]]:
    """Yield the column's hashes and their documents in small pieces, divided by the value of the hash.

    Equal hashes are in one piece.
    """
    pieces = max(1, -(-count // _SORTED_AT_ONCE))
    for piece in range(pieces):
        hashes: list[Hashes] = []
        places: list[Indices] = []
        start = 0
        for part in columns.parts(name):
            # Any bits would do: the hashes are uniform.
            chosen = np.flatnonzero((part >> np.uint64(32)) % np.uint64(pieces) == piece)
            hashes.append(part[chosen])
            places.append(np.asarray(chosen + start, dtype=np.int64))
            start += len(part)
        if hashes:
            yield np.concatenate(hashes), np.concatenate(places)


def _gathered(columns: Columns, name: str, places: Indices) -> Hashes:
    """Return the column's hashes at ``places``, which ascend."""
    hashes = np.empty(len(places), dtype=np.uint64)
    start = done = 0
    for part in columns.parts(name):
        end = int(np.searchsorted(places, start + len(part)))
        hashes[done:end] = part[places[done:end] - start]
        start, done = start + len(part), end
    return hashes


def _heads(same: NDArray[np.bool_], count: int) -> Indices:
    """Return, for each of ``count`` sorted values, the index at which its run of equal values begins.

    Args:
        same: For each value but the first, whether it equals the previous value.
        count: The number of values.
    """
    begins = np.ones(count, dtype=np.bool_)
    begins[1:] = ~same
    heads: Indices = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    return heads


def _union(parents: Indices, left: Indices, right: Indices) -> None:
    """Join each pair. The lowest index of a cluster is its root, and no parent is above its child."""
    new = np.flatnonzero(parents[left] != parents[right])
    for a, b in zip(left[new].tolist(), right[new].tolist(), strict=True):
        first, second = _root(parents, a), _root(parents, b)
        if first != second:
            parents[max(first, second)] = min(first, second)


def _root(parents: Indices, node: int) -> int:
    while parents[node] != node:
        parents[node] = node = int(parents[parents[node]])
    return node


def _shortened(parents: Indices) -> bool:
    """Replace each parent by its own parent, and return whether that changed anything."""
    grand = _looked_up(parents, parents)
    changed = not np.array_equal(grand, parents)
    parents[:] = grand
    return changed


def _looked_up(table: Indices, places: Indices) -> Indices:
    """Return ``table[places]``, computed in pieces, because numpy makes 64-bit copies of the indices."""
    values = np.empty_like(places)
    for start in range(0, len(places), _SORTED_AT_ONCE):
        values[start : start + _SORTED_AT_ONCE] = table[places[start : start + _SORTED_AT_ONCE]]
    return values
