"""Read and write files so that a kill, a full disk or a second process never leaves an incomplete file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tercet.errors import UserError


def _sync_directory(directory: Path) -> None:
    # A rename is durable only after the directory entry has reached the disk.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``; readers see the complete old file or the complete new one.

    Raises:
        UserError: the directory can't be written to or the disk is full; the old file remains.
    """
    path = Path(path)
    with replaced_when_complete(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write; on success it replaces ``path`` in a single step.

    Raises:
        UserError: writing fails; the old file at ``path`` remains.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files and directories of a killed process below ``directory``."""
    for path in [*directory.rglob(".*.tmp"), *directory.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it replaces ``path`` by renaming.

    If the block raises, ``path`` is unchanged. A directory can't be replaced in a single step: a kill
    between the two renames leaves none at ``path``, but never an incomplete one. So use this only for
    results that the same command makes again.

    Raises:
        UserError: writing fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    replaced = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        _sync_directory(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


def read_text(path: str | Path) -> str:
    """Return the file's text; raise UserError if it is missing, a directory, or not UTF-8."""
    path = Path(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 text (byte {problem.start}); convert it first") from problem
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem


def read_json(path: str | Path) -> Any:
    """Return the file's JSON value; raise UserError, with line and column, if it is not valid JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as problem:
        where = f"{path}:{problem.lineno}:{problem.colno}"
        raise UserError(f"{where} is not valid JSON: {problem.msg}") from problem


def dump_json(value: Any) -> str:
    """Return ``value`` as indented JSON; raise ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, dump_json(value))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one per line, without blank lines; errors name file and line."""
    return parse_jsonl(path, read_text(path))


def parse_jsonl(path: str | Path, text: str) -> list[dict[str, Any]]:
    """Return the rows of ``text``, which was read from ``path``, as `read_jsonl` does."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(f"{path}:{number} is not valid JSON: {problem.msg}") from problem
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is a {type(row).__name__}; each line must be a JSON object")
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object per line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextlib.contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Lock ``directory`` for this process; the lock ends with the block or the process.

    Raises:
        UserError: another process holds the lock.
    """
    import fcntl

    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("w")
    except OSError as problem:
        raise UserError(f"cannot write to {directory}: {problem.strerror or problem}") from problem
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise UserError(
                f"another tercet process is writing to {directory}; wait for it or choose another `out`"
            ) from problem
        yield


def fingerprint(value: Any) -> str:
    """Return a hash of the value's JSON form as 16 hexadecimal digits; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def cache_directory() -> Path:
    """Return the cache directory: ``$XDG_CACHE_HOME/tercet``, or ``~/.cache/tercet``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tercet"


def directory_size(directory: Path) -> int:
    """Return the bytes of all files in a directory and below it."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
