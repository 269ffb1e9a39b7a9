"""Read text documents from files, directories, the Hub and the built-in corpus as a stream.

Memory holds a single document at a time (a single file for ``.json``, ``.html`` and compressed parquet). A
defect of a file that the user named is an error. In a directory, an archive or a data set of the Hub a
defective file or row is reported, counted and skipped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.data import python_docs
from tercet.data.byte_streams import PACKED, Fault, Origin, file_origin, unpacked_name, zip_members
from tercet.data.document import Document
from tercet.data.document_files import READERS
from tercet.data.python_docs import BUILTIN
from tercet.data.rows import nearest_file
from tercet.errors import UserError
from tercet.files import fingerprint
from tercet.progress import say

HUB = "hub:"
REPORTED_FAULTS = 3  # of each kind are reported; later ones are only counted
_ARCHIVE = ".zip"
UNPACKED = 2.8  # size of a text divided by its compressed size


@dataclass(frozen=True)
class _Source:
    """A source and its files; none for the built-in corpus."""

    name: str
    files: tuple[Path, ...]
    single: bool  # a file that the user named, whose defects are errors


def read_documents(sources: Iterable[str], skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Yield the documents of all sources in a fixed order (directories by sorted path).

    Args:
        sources: files (``.txt .md .html .htm .jsonl .json .csv .tsv .parquet``, each also ``.gz`` or
            ``.zst``, and ``.zip`` archives of them), directories of them, ``hub:ORG/NAME[@REVISION][#FILES]``
            (a data set of the Hugging Face Hub; FILES is a pattern such as ``data/train-*``), or
            ``builtin:python-docs``. A ``.txt`` or ``.md`` file is a document, divided at lines that are
            ``<|endoftext|>`` and, beyond 16 million characters, at the next blank line. An ``.html`` file
            is a document without its navigation and scripts. In other files each row is a document, in
            the first existing field of ``text``, ``content``, ``messages`` and ``conversations``.
        skipped: counts skipped files and rows by reason (``empty``: without text).

    Raises:
        UserError: before reading, if a path is missing or of an unknown kind; while reading, if a file
            in ``sources`` is broken, binary, not UTF-8 or without text field, or a source has no text.
    """
    skipped = Counter() if skipped is None else skipped
    return _documents([_expanded(source) for source in _checked(sources)], skipped)


def source_fingerprint(sources: Iterable[str]) -> str:
    """Return a fingerprint that changes with the sources' content, without reading it.

    It covers the path, size and modification time of files, and for the built-in corpus the versions of
    Python and of every installed package.
    """
    identities: list[Any] = []
    for source in _checked(sources):
        if source == BUILTIN:
            identities.append(python_docs.corpus_fingerprint())
            continue
        for path in _expanded(source).files:
            state = path.stat()
            identities.append([path.as_posix(), state.st_size, state.st_mtime_ns])
    return fingerprint(identities)


def source_bytes(sources: Iterable[str]) -> int | None:
    """Estimate the bytes of text from the files' sizes; None if the size is unknown before reading."""
    total = 0.0
    for source in _checked(sources):
        if source == BUILTIN:
            return None
        for path in _expanded(source).files:
            packed = path.suffix.lower() in (*PACKED, _ARCHIVE, ".parquet")
            total += path.stat().st_size * (UNPACKED if packed else 1)
    return int(total)


def _checked(sources: Iterable[str]) -> list[str]:
    sources = [sources] if isinstance(sources, str) else [str(source) for source in sources]
    if not sources:
        raise UserError(f"no data given; name a file, a directory or {BUILTIN}")
    return sources


def _expanded(source: str) -> _Source:
    """Return a source with its files, after a check that they exist and are of a known kind."""
    if source == BUILTIN:
        return _Source(source, (), single=False)
    if source.startswith("builtin:"):
        raise UserError(f"there is no corpus {source}; the built-in corpus is {BUILTIN}")
    if source.startswith(HUB):
        return _Source(source, _hub_files(source), single=False)
    path = Path(source)
    if path.is_dir():
        return _Source(source, _files_below(path), single=False)
    if not path.exists():
        raise UserError(f"there is no file or directory {source}{nearest_file(path)}")
    if not _is_known(path.name):
        raise UserError(f"{source}: can't read documents from this kind of file; known: {_known()}")
    return _Source(source, (path,), single=True)


def _hub_files(source: str) -> tuple[Path, ...]:
    from tercet.model.hub import fetch_dataset

    named, _, pattern = source.removeprefix(HUB).partition("#")
    name, _, revision = named.partition("@")
    patterns = (
        (pattern,)
        if pattern
        else tuple(f"*{kind}{packing}" for kind in (*READERS, _ARCHIVE) for packing in ("", *PACKED))
    )
    fetched = fetch_dataset(name, revision or None, patterns)
    documents = tuple(path for path in fetched if _is_known(path.name))
    if not documents:
        raise UserError(f"{source} has no documents; known kinds of file: {_known()}")
    return documents


def _files_below(root: Path) -> tuple[Path, ...]:
    paths: list[Path] = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        paths += [Path(directory, name) for name in files if not name.startswith(".")]
    paths = sorted(path for path in paths if _is_known(path.name))
    if not paths:
        raise UserError(f"{root} is a directory without documents; known kinds of file: {_known()}")
    return tuple(paths)


def _is_known(name: str) -> bool:
    return Path(unpacked_name(name)).suffix in READERS or name.lower().endswith(_ARCHIVE)


def _known() -> str:
    return f"{' '.join(READERS)} (each also with {' or '.join(PACKED)}) and {_ARCHIVE}"


def _documents(sources: list[_Source], skipped: Counter[str]) -> Iterator[Document]:
    for source in sources:
        if source.name == BUILTIN:
            yield from python_docs.iterate(skipped=skipped)
            continue
        any_text = False
        for document in _rows(source, skipped):
            any_text = True
            yield document
        if not any_text:
            raise UserError(f"{source.name} holds no text")


def _rows(source: _Source, skipped: Counter[str]) -> Iterator[Document]:
    for path in source.files:
        origin = file_origin(path)
        if origin.name.lower().endswith(_ARCHIVE):
            yield from _archive(origin, source, skipped)
        else:
            yield from _file(origin, source, skipped)


def _archive(archive: Origin, source: _Source, skipped: Counter[str]) -> Iterator[Document]:
    inside = _Source(source.name, source.files, single=False)
    try:
        with zip_members(archive) as members:
            for member in members:
                if isinstance(member, Fault):
                    _skip(member, skipped)
                elif member.suffix in READERS:
                    yield from _file(member, inside, skipped)
    except Fault as fault:
        if source.single:
            raise
        _skip(fault, skipped)


def _file(origin: Origin, source: _Source, skipped: Counter[str]) -> Iterator[Document]:
    empty = True
    try:
        for row in READERS[origin.suffix](origin):
            empty = False
            if isinstance(row, Fault):
                if source.single:
                    raise row
                _skip(row, skipped)
            elif not row.text.strip():
                skipped["empty"] += 1
            else:
                yield Document(row.text, source.name, f"{origin.name}:{row.number}", row.offset, row.licence)
    except Fault as fault:
        # The rows before the fault are complete and have been used.
        if source.single:
            raise
        _skip(fault, skipped)
        return
    if empty:
        skipped["empty"] += 1


def _skip(fault: Fault, skipped: Counter[str]) -> None:
    skipped[fault.reason] += 1
    if skipped[fault.reason] <= REPORTED_FAULTS:
        say(f"left out: {fault}")
    if skipped[fault.reason] == REPORTED_FAULTS:
        say(f"more of this kind ({fault.reason}) are only counted")
