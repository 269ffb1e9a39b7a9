"""Writing files so that a kill, a full disk or a second process never leaves half of one."""

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
    # A rename is durable only once the directory that holds the name has reached the disk.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``: readers see the old file or the new one, never a part.

    Raises:
        UserError: the directory can't be written to or the disk is full; the old file stays.
    """
    path = Path(path)
    with replaced_when_complete(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary file's path to write to; on success it takes the place of ``path`` in one step.

    Raises:
        UserError: the disk refuses; what was at ``path`` stays.
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
    """Delete temporary files and directories that a killed process left below ``directory``."""
    for path in [*directory.rglob(".*.tmp"), *directory.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it takes the place of ``path`` by renaming.

    If the block raises, ``path`` is as it was. A directory can't be replaced in one step: a kill
    between two renames leaves none at ``path``, never half of one, so what is kept here must be
    something that the same command makes again. Raises UserError when the disk refuses.
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
    """The file's text. UserError when it is missing, a directory, or not UTF-8."""
    path = Path(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 text (byte {problem.start}); convert it first") from problem
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem


def read_json(path: str | Path) -> Any:
    """The file's JSON value. UserError, with line and column, when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as problem:
        where = f"{path}:{problem.lineno}:{problem.colno}"
        raise UserError(f"{where} is not valid JSON: {problem.msg}") from problem


def dump_json(value: Any) -> str:
    """Indented JSON that refuses NaN and infinity, which JSON has no words for."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, written atomically."""
    write_atomic(path, dump_json(value))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped. UserError names the file and line."""
    return parse_jsonl(path, read_text(path))


def parse_jsonl(path: str | Path, text: str) -> list[dict[str, Any]]:
    """The rows of ``text``, which came from ``path``; as `read_jsonl`."""
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
    """One JSON object a line, written atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextlib.contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Hold ``directory`` for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: another process is writing there.
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
                f"another tercet process is writing to {directory}; wait for it or choose another --out"
            ) from problem
        yield


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that are equal exactly when the JSON forms of two values are."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def cache_directory() -> Path:
    """Return the directory of what can be computed again: ``$XDG_CACHE_HOME/tercet``, or ``~/.cache/tercet``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tercet"


def directory_size(directory: Path) -> int:
    """Return the bytes of all files in a directory and below it."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
