"""The files of a curation: intermediate parts, and shards of parquet as the result.

A part is a few megabytes of documents in the order of reading, with a file of the hashes by which copies are
found. A scattered part holds the documents that stay, divided by their shard, so that a shard is assembled
without reading whole parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tercet.curation.hashing import Hashes
from tercet.files import replaced_when_complete

PART = pa.schema(
    [
        ("text", pa.string()),
        ("source", pa.string()),
        ("id", pa.string()),
        ("offset", pa.int64()),
        ("licence", pa.string()),
        ("bytes", pa.int64()),
        ("words", pa.int64()),
        ("masked", pa.int64()),
    ]
)
# The further columns of a shard: removed copies of the document, passages removed from it because they match a
# test text, and its index among the copies that a weight makes.
SHARD = pa.schema([*PART, ("duplicates", pa.int64()), ("passages_removed", pa.int64()), ("copy", pa.int64())])
_KEY = pa.field("key", pa.uint64())
_SCATTERED = pa.schema([*SHARD, _KEY])
_ROW_GROUP = 16_000_000  # bytes of text
_COMPRESSED = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))


def write_part(path: Path, table: pa.Table) -> None:
    """Write the documents of a part, with the columns of ``PART``."""
    _write(path, table.schema, [table])


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the documents of a part, or only the columns ``columns``."""
    fields = None if columns is None else [PART.get_field_index(name) for name in columns]
    with (
        pa.OSFile(str(path)) as stream,
        pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=fields)) as reader,
    ):
        return reader.read_all()


def write_hashes(path: Path, hashes: Hashes) -> None:
    """Write the hashes of a part's documents, shape (columns, documents)."""
    with replaced_when_complete(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(hashes), allow_pickle=False)


class HashFiles:
    """The hashes of all parts, as `tercet.curation.dedup.Columns`."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        """Open the files of hashes, whose rows are called ``names``."""
        self._paths = paths
        self._rows = {name: row for row, name in enumerate(names)}

    def parts(self, name: str) -> Iterator[Hashes]:
        """Yield the hashes called ``name``, part after part."""
        for path in self._paths:
            yield np.array(np.load(path, mmap_mode="r", allow_pickle=False)[self._rows[name]])

    def lengths(self) -> list[int]:
        """Return the number of documents of each part."""
        return [np.load(path, mmap_mode="r", allow_pickle=False).shape[1] for path in self._paths]


def write_scattered(path: Path, table: pa.Table, keys: Hashes, shards: int) -> None:
    """Write documents (columns of ``SHARD``) divided by their keys: each shard takes an equal range of keys."""
    order = np.argsort(keys, kind="stable")
    table = table.append_column(_KEY, pa.array(keys)).take(pa.array(order))
    ends = np.searchsorted(shard_of(keys[order], shards), np.arange(shards + 1))
    pieces = [
        table.slice(start, end - start)
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
    _write(path, _SCATTERED, pieces)


def shard_of(keys: Hashes, shards: int) -> NDArray[np.int64]:
    """Return the shard of each key: the index of its range of 64-bit numbers."""
    return ((keys >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)).astype(np.int64)


def write_shard(path: Path, scattered: Sequence[Path], shard: int) -> None:
    """Assemble one shard from all scattered parts: parquet, sorted by key."""
    pieces = []
    for part in scattered:
        with pa.OSFile(str(part)) as stream, pa.ipc.open_file(stream) as reader:
            pieces.append(reader.get_batch(shard))
    table = pa.Table.from_batches(pieces, schema=_SCATTERED)
    order = np.argsort(table.column("key").to_numpy(), kind="stable")
    size = int(np.sum(table.column("bytes").to_numpy()))
    rows = max(1, len(order) * _ROW_GROUP // max(size, 1))
    table = table.drop_columns(["key"])
    with (
        replaced_when_complete(path) as temporary,
        pq.ParquetWriter(
            temporary,
            SHARD,
            compression="zstd",
            use_dictionary=["source", "licence"],
            # The smallest and the largest text would put two whole texts into the footer of every row group.
            write_statistics=[name for name in SHARD.names if name != "text"],
        ) as writer,
    ):
        # One row group at a time, so that only a part of the table is in memory twice.
        for start in range(0, len(order), rows):
            writer.write_table(table.take(pa.array(order[start : start + rows])))


def _write(path: Path, schema: pa.Schema, tables: Sequence[pa.Table]) -> None:
    """Write one record batch for each table, also for an empty table."""
    with (
        replaced_when_complete(path) as temporary,
        pa.OSFile(str(temporary), "wb") as stream,
        pa.ipc.new_file(stream, schema, options=_COMPRESSED) as writer,
    ):
        for table in tables:
            batches: list[Any] = table.combine_chunks().to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=schema))
