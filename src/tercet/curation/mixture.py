"""How much of each source goes into the corpus, and in which order the documents stand.

A weight is a factor (``2``: every document twice; ``0.25``: each with a chance of a quarter; ``1``: as it
is) or a share of the text that is written (``30%``). What a document gets follows from a hash of the
seed and its id alone: the same in every run, on every machine, with any number of processes.
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
    """How often each document of each source is to be written.

    Sources with a factor (1 without a weight) set the size of the corpus and those with shares are made
    to fit. Where all have shares, they are scaled so that no document is written more than once.

    Args:
        sizes: bytes of text of each source that there are to choose from.

    Raises:
        UserError: a weight's source is not there or is empty, or the shares leave nothing for the rest.
    """
    for source in weights:
        if not sizes.get(source):
            there = ", ".join(sorted(name for name, size in sizes.items() if size)) or "none"
            raise UserError(f"--weight {source}: no text of this source is left; the sources are {there}")
    shares = {source: weight.value for source, weight in weights.items() if weight.share}
    result = dict.fromkeys(sizes, 1.0)
    result |= {source: weight.value for source, weight in weights.items() if not weight.share}
    fixed = sum(result[source] * size for source, size in sizes.items() if source not in shares)
    together = sum(shares.values())
    if not shares:
        return result
    if fixed and together > 1 - 1e-9:
        raise UserError(
            f"--weight: the shares add up to {100 * together:.0f}% and leave nothing for the rest"
        )
    if not fixed and abs(together - 1) > 1e-6:
        raise UserError(
            f"--weight: all sources have shares and they add up to {100 * together:.0f}%, not 100%"
        )
    if fixed:
        total = fixed / (1 - together)
    else:
        total = min(sizes[source] / share for source, share in shares.items())
    return result | {source: share * total / sizes[source] for source, share in shares.items()}


def copies(factor: float, ids: Sequence[str], seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often each document is written: the factor rounded down, or one more with the chance left over."""
    whole = math.floor(factor)
    if factor == whole:
        return np.full(len(ids), whole, dtype=np.int64)
    draws = _hashed(f"draw {seed}", ids).astype(np.float64) / 2.0**64
    return whole + (draws < factor - whole).astype(np.int64)


def order_keys(ids: Sequence[str], copy: int, seed: int) -> Hashes:
    """Where each document stands in the shuffled corpus: sorted by these numbers, uniform over 64 bits."""
    return _hashed(f"order {seed} {copy}", ids)


def _hashed(salt: str, ids: Iterable[str]) -> Hashes:
    # 64 bytes at most are keyed: the salt is short.
    key = salt.encode()
    digests = (
        hashlib.blake2b(one.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for one in ids
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
