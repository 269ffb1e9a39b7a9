"""Texts on disk, with what must be known of each to divide and shuffle them in memory."""

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

    Attributes:
        lengths: in characters. sources: numbers of `names`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._ends = array("q", [0])
        self._digests = bytearray()
        self.lengths = array("q")
        self.sources = array("q")
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The file goes."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def append(self, text: str, source: str) -> None:
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._digests += hashlib.sha256(data).digest()[:16]
        self.lengths.append(len(text))
        if source not in self._numbers:
            self._numbers[source] = len(self.names)
            self.names.append(source)
        self.sources.append(self._numbers[source])

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
        return self._ends[-1]

    def size(self, index: int) -> int:
        """Of a text, in bytes."""
        return self._ends[index + 1] - self._ends[index]

    def digest(self, index: int) -> bytes:
        """16 bytes that follow from the text alone."""
        return bytes(self._digests[16 * index : 16 * index + 16])
