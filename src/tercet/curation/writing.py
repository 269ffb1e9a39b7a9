"""The last stages: divide each part's documents among the shards, without copies and test texts; write the shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tercet.curation import mixture, shards
from tercet.curation.contamination import Suspects
from tercet.curation.hashing import word_hashes
from tercet.curation.tally import EXAMPLES, Tally, example, excerpt
from tercet.curation.work import Work
from tercet.data.decontaminate import Counts, Decontaminator
from tercet.data.document import Document
from tercet.files import read_json, write_json


@dataclass(frozen=True)
class Scatter:
    """A part to divide among the shards.

    Attributes:
        part: Its name.
        shards: The number of shards.
        factors: How often each document is written, by source.
        stays: Whether each document of the part stays.
        exact: Whether each document is an exact copy.
        duplicates: The number of copies of each document that are dropped.
        shown: The documents in the report: their index among all documents, by their place in the part.
    """

    part: str
    shards: int
    factors: Mapping[str, float]
    stays: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    duplicates: NDArray[np.int64]
    shown: Mapping[int, int]


def scatter_pieces(work: Work) -> Iterator[Scatter]:
    """Yield the parts that are not scattered yet, in order."""
    plan = read_json(work.path("plan.json"))
    first = np.load(work.path("duplicates") / "first.npy")
    exact = np.load(work.path("duplicates") / "exact.npy")
    copies = np.bincount(first, minlength=len(first)) - 1 if len(first) else np.zeros(0, dtype=np.int64)
    stays = first == np.arange(len(first))
    shown = {place for pair in plan["copies"] for place in pair}
    shown.update(place for cluster in plan["clusters"] for place in cluster["members"])
    starts = plan["starts"]
    for part, start, end in zip(work.parts(), starts[:-1], starts[1:], strict=True):
        if work.path(f"{part}.scattered.json").is_file():
            continue
        shown_here = {place - start: place for place in shown if start <= place < end}
        piece = slice(start, end)
        yield Scatter(
            part,
            plan["shards"],
            plan["factors"],
            stays[piece],
            exact[piece],
            np.maximum(copies[piece], 0),
            shown_here,
        )


def scatter_part(work: Work, piece: Scatter) -> int:
    """Drop copies, remove test texts, apply the weights, divide among the shards; return the bytes that were written."""
    tally, seed = Tally(), work.settings.seed
    source_path = work.path(f"{piece.part}.arrow")
    table = shards.read_part(source_path)
    shown = {
        str(number): {"id": table["id"][place].as_py(), "text": excerpt(table["text"][place].as_py())}
        for place, number in piece.shown.items()
    }
    _drop_copies(tally, table, piece)
    table = table.append_column("duplicates", pa.array(piece.duplicates)).filter(pa.array(piece.stays))
    table, decontamination = _without_tests(work, tally, table)
    copies = _copies(tally, table, piece.factors, seed)
    tables, keys = [], []
    for copy in range(int(copies.max(initial=0))):
        chosen = table.filter(pa.array(copies > copy))
        tables.append(chosen.append_column("copy", pa.array(np.full(len(chosen), copy))))
        keys.append(mixture.order_keys(chosen["id"].to_pylist(), copy, seed))
        for row in chosen.group_by("source").aggregate([("bytes", "count"), ("bytes", "sum")]).to_pylist():
            tally.add_written(row["source"], row["bytes_count"], row["bytes_sum"])
    written = pa.concat_tables(tables).select(shards.SHARD.names) if tables else shards.SHARD.empty_table()
    order = np.concatenate(keys) if keys else np.zeros(0, dtype=np.uint64)
    shards.write_scattered(work.path(f"{piece.part}.scattered"), written, order, piece.shards)
    write_json(
        work.path(f"{piece.part}.scattered.json"),
        {"tally": tally.to_json(), "shown": shown, "decontamination": decontamination},
    )
    source_path.unlink(missing_ok=True)  # the scattered part holds its text now
    return sum(amount.bytes for amount in tally.written.values())


def _drop_copies(tally: Tally, table: pa.Table, piece: Scatter) -> None:
    dropped = np.flatnonzero(~piece.stays)
    sources = table["source"].take(pa.array(dropped)).to_pylist()
    sizes = table["bytes"].take(pa.array(dropped)).to_pylist()
    for place, source, size in zip(dropped.tolist(), sources, sizes, strict=True):
        reason = "exact duplicate" if piece.exact[place] else "near-duplicate"
        tally.drop("duplicates", reason, source, size)


def _without_tests(work: Work, tally: Tally, table: pa.Table) -> tuple[pa.Table, dict[str, Any] | None]:
    """Remove passages that match a test text, and return the remaining documents with an account for the report."""
    removed = np.zeros(len(table), dtype=np.int64)
    if work.settings.tests is None:
        return table.append_column("passages_removed", pa.array(removed)), None
    suspects, decontaminator = _decontamination(work.path("tests.json"), work.settings.tests)
    decontaminator.counts = Counts()
    texts, stays = table["text"].to_pylist(), np.ones(len(table), dtype=bool)
    for place in np.flatnonzero(suspects(texts)).tolist():
        row = table.slice(place, 1).to_pylist()[0]
        document, passages = decontaminator.clean(Document(texts[place], row["source"], row["id"]))
        removed[place] = len(passages)
        if document is None:
            stays[place] = False
            shown = example(row["id"], texts[place], passages[0].reason)
            tally.drop("decontamination", "nothing but test texts", row["source"], row["bytes"], shown)
        else:
            texts[place] = document.text
    if removed.any():
        table = table.set_column(0, "text", pa.array(texts, pa.string()))
        sizes = [len(text.encode("utf-8")) for text in texts]
        table = table.set_column(table.column_names.index("bytes"), "bytes", pa.array(sizes))
        words = np.diff(word_hashes(texts)[1])
        table = table.set_column(table.column_names.index("words"), "words", pa.array(words))
    table = table.append_column("passages_removed", pa.array(removed)).filter(pa.array(stays))
    counts = decontaminator.counts
    account = {
        "documents_touched": counts.documents_touched,
        "documents_dropped": counts.documents_dropped,
        "passages_removed": counts.passages_removed,
        "characters_removed": counts.characters_removed,
        "tests_matched": sorted(counts.tests_matched),
        "examples": [
            {
                "id": removal.document,
                "text": excerpt(removal.passage),
                "detail": f"{removal.reason}: {excerpt(removal.test_text)}",
            }
            for removal in counts.examples[:EXAMPLES]
        ],
    }
    return table, account


@lru_cache(maxsize=1)
def _decontamination(path: Path, fingerprint: str) -> tuple[Suspects, Decontaminator]:
    del fingerprint  # part of the cache's key: another run may use the same path for other texts
    texts = [text for texts in read_json(path).values() for text in texts]
    return Suspects(texts), Decontaminator(texts)


def _copies(tally: Tally, table: pa.Table, factors: Mapping[str, float], seed: int) -> NDArray[np.int64]:
    """Return how often each document is written."""
    sources = np.array(table["source"].to_pylist(), dtype=object)
    ids = table["id"].to_pylist()
    result = np.ones(len(sources), dtype=np.int64)
    for source in dict.fromkeys(sources.tolist()):
        if factors[source] != 1:
            places = np.flatnonzero(sources == source)
            result[places] = mixture.copies(factors[source], [ids[place] for place in places], seed)
    for place in np.flatnonzero(result == 0).tolist():
        row = table.slice(place, 1).to_pylist()[0]
        shown = example(row["id"], row["text"], f"weight {factors[row['source']]:g}")
        tally.drop("mixture", "left out by its weight", row["source"], row["bytes"], shown)
    return result


def write_shard(work: Work, directory: Path, count: int, shard: int) -> None:
    """Write shard ``shard`` of ``count``, unless it exists."""
    path = directory / shard_name(shard, count)
    if not path.is_file():
        shards.write_shard(path, [work.path(f"{part}.scattered") for part in work.parts()], shard)


def shard_name(shard: int, count: int) -> str:
    """Return the name of a shard, in the form of the Hub's data sets."""
    return f"train-{shard:05d}-of-{count:05d}.parquet"
