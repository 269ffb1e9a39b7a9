"""Texts on disk, with the little of each that is needed in memory to split and shuffle them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class Spool:
    """Texts that are written once and read in any order; memory holds about 40 bytes a text.

    Leaving the ``with`` block deletes the file.

    Attributes:
        lengths: The length of each text, in characters.
        sources: The index in ``names`` of each text's source.
        names: The names of the sources.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._ends = array("q", [0])
        self._digests = bytearray()
        self.lengths = array("q")
        self.sources = array("q")
        self.names: list[str] = []
        self._source_indices: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def append(self, text: str, source: str) -> None:
        """Write a text of ``source`` behind the others."""
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._digests += hashlib.sha256(data).digest()[:16]
        self.lengths.append(len(text))
        if source not in self._source_indices:
            self._source_indices[source] = len(self.names)
            self.names.append(source)
        self.sources.append(self._source_indices[source])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> str:
        self._file.flush()
        begin, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - begin, begin).decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @property
    def total_bytes(self) -> int:
        """The size of all texts, in bytes of UTF-8."""
        return self._ends[-1]

    def digest(self, index: int) -> bytes:
        """Return 16 bytes that depend on the text ``index`` alone."""
        return bytes(self._digests[16 * index : 16 * index + 16])
