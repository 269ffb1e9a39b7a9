"""Files as streams of bytes, decompressed: gzip, zstandard, bzip2, xz, members of zip archives.

The first bytes decide how a file is packed, not its name: downloads are often renamed, or unpacked on the way.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tercet.errors import UserError

PACKED = (".gz", ".zst", ".bz2", ".xz")
_ZSTANDARD, _SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"  # a frame; bytes 1 to 3 of a skippable one


class Fault(UserError):
    """A defect of a file or a row. In a directory the file or row is skipped and counted under ``reason``.

    ``size`` is the number of bytes on disk of a whole file that is skipped; 0 where the caller knows it.
    """

    def __init__(self, reason: str, message: str, size: int = 0) -> None:
        super().__init__(message)
        self.reason, self.size = reason, size


@dataclass(frozen=True)
class Origin:
    """A file that can be opened, or a member of an archive.

    Attributes:
        name: the name in messages and document ids: the path, or ``archive.zip/member``.
        raw: opens the bytes as they are stored.
        size: the number of these bytes.
    """

    name: str
    raw: Callable[[], AbstractContextManager[IO[bytes]]]
    size: int = 0

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
        packing = ""
        try:
            with self.raw() as stream:
                packing = packing_of(cast(io.BufferedReader, stream).peek(10))
                yield _unpacked(stream, packing, self.name)
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as problem:
            kind = f"{packing} file" if packing else "zip member"
            raise Fault(f"not a whole {kind}", f"{self.name} is not a whole {kind}: {problem}") from problem
        except (zipfile.BadZipFile, NotImplementedError) as problem:
            raise Fault("not a whole zip member", f"{self.name} can't be unpacked: {problem}") from problem
        except OSError as problem:
            reason = problem.strerror or str(problem)
            if packing == "bzip2" and problem.errno is None:  # its error for broken data
                message = f"{self.name} is not a whole bzip2 file: {reason}"
                raise Fault("not a whole bzip2 file", message) from problem
            raise Fault("cannot be read", f"cannot read {self.name}: {reason}") from problem


def file_origin(path: Path) -> Origin:
    """Return the origin of a file on disk."""
    return Origin(path.as_posix(), lambda: path.open("rb"), path.stat().st_size)


def packing_of(head: bytes) -> str:
    """Return the name of the compression that the first ten bytes of a file show; "" for none."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(_ZSTANDARD) or (head[1:4] == _SKIPPABLE and head[0] >> 4 == 5):
        return "zstandard"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":  # the digits of pi that begin a block
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else ""


def _unpacked(stream: IO[bytes], packing: str, name: str) -> IO[bytes]:
    if packing == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if packing == "zstandard":
        return _unzstd(stream, name)
    if packing == "bzip2":
        return bz2.BZ2File(stream)
    return lzma.LZMAFile(stream) if packing == "xz" else stream


def unpacked_name(name: str) -> str:
    """Return the name in lower case without the suffix of a compression."""
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
        return Fault("behind a password", f"{name} is behind a password", info.compress_size)

    def raw() -> AbstractContextManager[IO[bytes]]:
        return archive.open(info)

    return Origin(name, raw, info.compress_size)


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
