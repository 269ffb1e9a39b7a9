"""Files as streams of bytes, decompressed by suffix: gzip, zstandard, members of zip archives."""

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
    """A defect of a file or a row. In a directory the file or row is skipped and counted under ``reason``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Origin:
    """A file that can be opened, or a member of an archive.

    Attributes:
        name: the name in messages and document ids: the path, or ``archive.zip/member``.
        raw: opens the bytes as they are stored.
    """

    name: str
    raw: Callable[[], AbstractContextManager[IO[bytes]]]

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without that of a compression: ``.txt`` of ``a.TXT.gz``."""
        return PurePosixPath(unpacked_name(self.name)).suffix

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the decompressed bytes.

        Raises:
            Fault: the file can't be read or is incomplete; also raised by reads within the block.
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
            reason = problem.strerror or str(problem)
            raise Fault("cannot be read", f"cannot read {self.name}: {reason}") from problem


def file_origin(path: Path) -> Origin:
    """Return the origin of a file on disk."""
    return Origin(path.as_posix(), lambda: path.open("rb"))


def unpacked_name(name: str) -> str:
    """Return the name in lower case without ``.gz`` or ``.zst``."""
    name = name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return name


@contextlib.contextmanager
def zip_members(archive: Origin) -> Iterator[list[Origin | Fault]]:
    """Open a zip archive as the list of its files, sorted by name, with a Fault for each encrypted file.

    Raises:
        Fault: the file is no zip archive or can't be read.
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
        """A raw stream that distinguishes a broken file from a broken disk: pyarrow raises OSError for both."""

        def __init__(self) -> None:
            self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            try:
                data = self._stream.read(len(buffer))
            except OSError as problem:
                reason = str(problem).splitlines()[0]
                raise Fault(
                    "not a whole zstandard file", f"{name} is not a whole zstandard file: {reason}"
                ) from problem
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Reader(), buffer_size=1 << 18)
