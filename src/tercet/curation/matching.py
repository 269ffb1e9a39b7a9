"""The second stage: find the documents that are copies, and plan the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.curation import dedup, mixture, shards
from tercet.curation.dedup import Duplicates
from tercet.curation.tally import EXAMPLES
from tercet.curation.work import Work
from tercet.files import atomic_directory, write_json

CLUSTERS = 10  # of duplicates in the report
_MEMBERS = 4  # of a cluster in the report, besides the first


def find_duplicates(work: Work) -> None:
    """Write the clusters of copies (``duplicates``) and the plan of the shards (``plan.json``)."""
    if work.path("plan.json").is_file():
        return
    parts = work.parts()
    files = shards.HashFiles([work.path(f"{part}.npy") for part in parts], work.hash_names())
    lengths = files.lengths()
    duplicates = dedup.exact_duplicates(files, sum(lengths))
    if work.settings.minhash:
        duplicates = dedup.near_duplicates(files, duplicates, work.settings.minhash)
    sizes = _sizes_of_sources(work, parts, lengths, duplicates)
    factors = mixture.factors(dict(work.settings.weights), sizes)
    expected = sum(factors[source] * size for source, size in sizes.items())
    clusters = largest_clusters(duplicates)
    exact = np.flatnonzero(duplicates.exact)[:EXAMPLES]
    near = np.flatnonzero(~duplicates.stays & ~duplicates.exact)[:EXAMPLES]
    with atomic_directory(work.path("duplicates")) as temporary:
        np.save(temporary / "first.npy", duplicates.first)
        np.save(temporary / "exact.npy", duplicates.exact)
    write_json(
        work.path("plan.json"),
        {
            "shards": max(1, round(expected / work.settings.shard_bytes)),
            "factors": factors,
            "starts": [0, *np.cumsum(lengths).tolist()],
            "clusters": clusters,
            "copies": [[int(place), int(duplicates.first[place])] for place in [*exact, *near]],
        },
    )


def _sizes_of_sources(
    work: Work, parts: Sequence[str], lengths: Sequence[int], duplicates: Duplicates
) -> dict[str, int]:
    """Return the bytes of the documents that stay, by source."""
    sizes: Counter[str] = Counter()
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        table = shards.read_part(work.path(f"{part}.arrow"), ["source", "bytes"])
        table = table.filter(pa.array(duplicates.stays[start : start + length]))
        for row in table.group_by("source").aggregate([("bytes", "sum")]).to_pylist():
            sizes[row["source"]] += row["bytes_sum"]
        start += length
    return dict(sizes)


def largest_clusters(duplicates: Duplicates) -> list[dict[str, Any]]:
    """Return the clusters with most copies: their sizes, and the indices of the first document and of a few others."""
    sizes = (
        np.bincount(duplicates.first, minlength=len(duplicates.first))
        if len(duplicates.first)
        else np.zeros(0, int)
    )
    order = np.argsort(-sizes, kind="stable")[:CLUSTERS]
    return [
        {
            "documents": int(sizes[head]),
            "exact": int(np.count_nonzero((duplicates.first == head) & duplicates.exact)),
            "members": np.flatnonzero(duplicates.first == head)[: _MEMBERS + 1].tolist(),
        }
        for head in order
        if sizes[head] > 1
    ]
