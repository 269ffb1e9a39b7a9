"""The second stage: which documents are copies, and from that how many shards there will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.curation import dedup, mixture, shards
from tercet.curation.dedup import Duplicates
from tercet.curation.work import Work
from tercet.files import atomic_directory, write_json

CLUSTERS = 10  # of duplicates, that the report shows
_MEMBERS = 4  # of a cluster, beside the first, whose ids are shown


def find_duplicates(work: Work) -> None:
    """Write which documents are copies (``duplicates``) and how many shards there will be (``plan.json``)."""
    if work.path("plan.json").is_file():
        return
    parts = work.parts()
    files = shards.HashFiles([work.path(f"{part}.npy") for part in parts], work.hash_names())
    lengths = files.lengths()
    found = dedup.exact_duplicates(files, sum(lengths))
    if work.settings.minhash:
        found = dedup.near_duplicates(files, found, work.settings.minhash)
    sizes = _sizes_of_sources(work, parts, lengths, found)
    factors = mixture.factors(dict(work.settings.weights), sizes)
    expected = sum(factors[source] * size for source, size in sizes.items())
    clusters = largest_clusters(found)
    copies = [*np.flatnonzero(found.exact)[:3], *np.flatnonzero(~found.kept & ~found.exact)[:3]]
    with atomic_directory(work.path("duplicates")) as temporary:
        np.save(temporary / "first.npy", found.first)
        np.save(temporary / "exact.npy", found.exact)
    write_json(
        work.path("plan.json"),
        {
            "shards": max(1, round(expected / work.settings.shard_bytes)),
            "factors": factors,
            "starts": [0, *np.cumsum(lengths).tolist()],
            "clusters": clusters,
            "copies": [[int(place), int(found.first[place])] for place in copies],
        },
    )


def _sizes_of_sources(
    work: Work, parts: Sequence[str], lengths: Sequence[int], found: Duplicates
) -> dict[str, int]:
    """The bytes of what is no copy, by source."""
    sizes: Counter[str] = Counter()
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        table = shards.read_part(work.path(f"{part}.arrow"), ["source", "bytes"])
        table = table.filter(pa.array(found.kept[start : start + length]))
        for row in table.group_by("source").aggregate([("bytes", "sum")]).to_pylist():
            sizes[row["source"]] += row["bytes_sum"]
        start += length
    return dict(sizes)


def largest_clusters(found: Duplicates) -> list[dict[str, Any]]:
    """The clusters with most copies: how many documents, the first one's number, some members' numbers."""
    sizes = np.bincount(found.first, minlength=len(found.first)) if len(found.first) else np.zeros(0, int)
    order = np.argsort(-sizes, kind="stable")[:CLUSTERS]
    return [
        {
            "documents": int(sizes[head]),
            "exact": int(np.count_nonzero((found.first == head) & found.exact)),
            "members": np.flatnonzero(found.first == head)[: _MEMBERS + 1].tolist(),
        }
        for head in order
        if sizes[head] > 1
    ]
