"""Files as streams of bytes, unpacked by the end of their names: gzip, zstandard, members of zip archives."""

from __future__ import annotations

import contextlib
import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tercet.errors import UserError

PACKED = (".gz", ".zst")


class Fault(UserError):
    """What is wrong with a file or a row. In a directory it is skipped and counted under ``reason``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Origin:
    """A file that can be opened, or a member of an archive.

    Attributes:
        name: as messages and document ids give it: the path, or ``archive.zip/member``.
        raw: opens its bytes as they are stored.
    """

    name: str
    raw: Callable[[], AbstractContextManager[IO[bytes]]]

    @property
    def suffix(self) -> str:
        """The kind of file, in small letters, below what it is packed with: ``.txt`` of ``a.TXT.gz``."""
        return PurePosixPath(unpacked_name(self.name)).suffix

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked.

        Raises:
            Fault: it can't be read, or is not whole. Within the block too.
        """
        packing = PurePosixPath(self.name.lower()).suffix
        try:
            with self.raw() as stream:
                if packing == ".gz":
                    yield cast(IO[bytes], gzip.GzipFile(fileobj=stream))
                elif packing == ".zst":
                    yield _unzstd(stream, self.name)
                else:
                    yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
            kind = "gzip file" if packing == ".gz" else "zip member"
            raise Fault(f"not a whole {kind}", f"{self.name} is not a whole {kind}: {problem}") from problem
        except (zipfile.BadZipFile, NotImplementedError) as problem:
            raise Fault("not a whole zip member", f"{self.name} can't be unpacked: {problem}") from problem
        except OSError as problem:
            said = problem.strerror or str(problem)
            raise Fault("cannot be read", f"cannot read {self.name}: {said}") from problem


def file_origin(path: Path) -> Origin:
    return Origin(path.as_posix(), lambda: path.open("rb"))


def unpacked_name(name: str) -> str:
    """The name in small letters without ``.gz`` or ``.zst``."""
    name = name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return name


@contextlib.contextmanager
def zip_members(archive: Origin) -> Iterator[list[Origin | Fault]]:
    """The files in a zip archive in the order of their names; a Fault in the place of one behind a password.

    Raises:
        Fault: it is no zip archive, or can't be read.
    """
    with archive.opened() as stream:
        try:
            opened = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, io.UnsupportedOperation) as problem:
            raise Fault(
                "not a whole zip archive", f"{archive.name} is not a whole zip archive: {problem}"
            ) from problem
        with opened:
            yield [
                _member(opened, archive, info)
                for info in sorted(opened.infolist(), key=lambda info: info.filename)
                if not info.is_dir()
            ]


def _member(archive: zipfile.ZipFile, origin: Origin, info: zipfile.ZipInfo) -> Origin | Fault:
    name = f"{origin.name}/{info.filename}"
    if info.flag_bits & 1:
        return Fault("behind a password", f"{name} is behind a password")

    def raw() -> AbstractContextManager[IO[bytes]]:
        return archive.open(info)

    return Origin(name, raw)


def _unzstd(stream: IO[bytes], name: str) -> IO[bytes]:
    import pyarrow as pa

    class Reader(io.RawIOBase):
        """pyarrow's errors are OSErrors without a number; a broken file is told from a broken disk here."""

        def __init__(self) -> None:
            self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            try:
                data = self._stream.read(len(buffer))
            except OSError as problem:
                said = str(problem).splitlines()[0]
                raise Fault(
                    "not a whole zstandard file", f"{name} is not a whole zstandard file: {said}"
                ) from problem
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Reader(), buffer_size=1 << 18)
