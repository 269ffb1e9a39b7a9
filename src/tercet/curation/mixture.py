"""Decide how often each document is written, and in which order.

A weight is a factor (``2``: every document twice; ``0.25``: each with a chance of a quarter; ``1``: as it
is) or a share of the text that is written (``30%``). The draw of a document is a hash of the seed and its
id: the same in every run, on every machine, with any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tercet.curation.hashing import Hashes
from tercet.curation.weights import Weight
from tercet.errors import UserError


def factors(weights: Mapping[str, Weight], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return how often each document of each source is written.

    Sources with a factor (1 without a weight) decide the size of the corpus, and sources with shares are
    scaled to fit. If all have shares, they are scaled so that no document is written more than once.

    Args:
        weights: By source.
        sizes: Bytes of text by source.

    Raises:
        UserError: A weight's source is missing or empty, or the shares leave nothing for the rest.
    """
    for source in weights:
        if not sizes.get(source):
            sources = ", ".join(sorted(name for name, size in sizes.items() if size)) or "none"
            raise UserError(
                f"`weights` names {source!r}, of which no text is left; the sources are {sources}"
            )
    shares = {source: weight.value for source, weight in weights.items() if weight.share}
    result = dict.fromkeys(sizes, 1.0)
    result |= {source: weight.value for source, weight in weights.items() if not weight.share}
    fixed = sum(result[source] * size for source, size in sizes.items() if source not in shares)
    share_sum = sum(shares.values())
    if not shares:
        return result
    if fixed and share_sum > 1 - 1e-9:
        raise UserError(
            f"`weights`: the shares add up to {100 * share_sum:.0f}% and leave nothing for the rest"
        )
    if not fixed and abs(share_sum - 1) > 1e-6:
        raise UserError(
            f"`weights`: all sources have shares and they add up to {100 * share_sum:.0f}%, not 100%"
        )
    if fixed:
        total = fixed / (1 - share_sum)
    else:
        total = min(sizes[source] / share for source, share in shares.items())
    return result | {source: share * total / sizes[source] for source, share in shares.items()}


def copies(factor: float, ids: Sequence[str], seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return how often each document is written: the factor rounded down, or one more with the remaining probability."""
    whole = math.floor(factor)
    if factor == whole:
        return np.full(len(ids), whole, dtype=np.int64)
    draws = _hashed(f"draw {seed}", ids).astype(np.float64) / 2.0**64
    return whole + (draws < factor - whole).astype(np.int64)


def order_keys(ids: Sequence[str], copy: int, seed: int) -> Hashes:
    """Return the keys by which the shuffled corpus is sorted: uniform over 64 bits."""
    return _hashed(f"order {seed} {copy}", ids)


def _hashed(salt: str, ids: Iterable[str]) -> Hashes:
    # BLAKE2b takes a key of at most 64 bytes; the salt is shorter.
    key = salt.encode()
    digests = (
        hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for id in ids
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
