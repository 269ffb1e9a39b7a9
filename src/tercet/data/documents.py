"""Read text documents from files, directories, the Hub and the built-in corpus as a stream.

Memory holds a single document at a time (a single file for JSON arrays, ``.html`` and compressed parquet). A
defect of a file that the user named is an error. In a directory, an archive or a data set of the Hub a
defective file or row is reported, counted and left out; where most of the bytes are, that is an error too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
from tercet.progress import say, size

HUB = "hub:"
REPORTED_FAULTS = 3  # of each kind are reported; later ones are only counted
_ARCHIVE = ".zip"
UNPACKED = 2.8  # size of a text divided by its compressed size
MOST = 0.5  # of the bytes of a source; when more were left out, reading stops


@dataclass(frozen=True)
class _Source:
    """A source and its files; none for the built-in corpus."""

    name: str
    files: tuple[Path, ...]
    single: bool  # a file that the user named, whose defects are errors
    other: Counter[str] = field(default_factory=Counter)  # files of unknown kinds in a directory, by suffix


class _Reading:
    """The account of a source while it is read: what was left out, by reason, and its share of the bytes."""

    def __init__(self, source: _Source, skipped: Counter[str], allow_partial: bool) -> None:
        self.source, self.single = source, source.single
        self._skipped, self._allow_partial = skipped, allow_partial
        self._total = sum(path.stat().st_size for path in source.files if path.exists())
        self._left_out = 0.0  # bytes on disk
        self._reasons: Counter[str] = Counter()

    def empty(self) -> None:
        """Count a file or row without text."""
        self._skipped["empty"] += 1

    def leave_out(self, fault: Fault) -> None:
        """Report and count a file or row; an error if the user named the file itself."""
        if self.single:
            raise fault
        self._skipped[fault.reason] += 1
        self._reasons[fault.reason] += 1
        if self._skipped[fault.reason] <= REPORTED_FAULTS:
            say(f"left out: {fault}")
        if self._skipped[fault.reason] == REPORTED_FAULTS:
            say(f"more of this kind ({fault.reason}) are only counted")

    def add_left_out(self, bytes_left_out: float) -> None:
        """Count bytes that were left out; UserError when they are most of the source's."""
        self._left_out += bytes_left_out
        if self._allow_partial or self._left_out <= MOST * self._total:
            return
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self._reasons.most_common())
        raise UserError(
            f"{self.source.name}: more than half of it can't be used, {size(self._left_out)} of {size(self._total)} "
            f"({reasons}); mend or remove these files, or set `allow_partial` of build or curate to use the rest"
        )

    def ignore_others(self) -> None:
        """Name and count the files of a directory that are of no known kind."""
        if self.source.other:
            kinds = ", ".join(
                f"{count:,} {suffix or 'without suffix'}" for suffix, count in self.source.other.most_common()
            )
            say(f"{self.source.name}: files of other kinds are not read: {kinds}")
            self._skipped["file of another kind"] += self.source.other.total()


def read_documents(
    sources: Iterable[str], skipped: Counter[str] | None = None, *, allow_partial: bool = False
) -> Iterator[Document]:
    """Yield the documents of all sources in a fixed order (directories by sorted path).

    Args:
        sources: files (``.txt .md .html .htm .jsonl .ndjson .json .csv .tsv .parquet``, each also
            compressed, and ``.zip`` archives of them), directories of them, ``hub:ORG/NAME[@REVISION][#FILES]``
            (a data set of the Hugging Face Hub; FILES is a pattern such as ``data/train-*``), or
            ``builtin:python-docs``. A ``.txt`` or ``.md`` file is a document, divided at lines that are
            ``<|endoftext|>`` and, beyond 16 million characters, at the next blank line. An ``.html`` file
            is a document without its navigation and scripts. In other files each row is a document, in
            the first existing field of ``text``, ``content``, ``messages`` and ``conversations``.
        skipped: counts skipped files and rows by reason (``empty``: without text).
        allow_partial: go on when more than half of the bytes of a source were left out.

    Raises:
        UserError: before reading, if a path is missing or of an unknown kind; while reading, if a file
            in ``sources`` is broken, binary, not UTF-8 or without text field, a source has no text, or
            most of a source is left out and ``allow_partial`` is not set.
    """
    skipped = Counter() if skipped is None else skipped
    return _documents([_expanded(source) for source in _checked(sources)], skipped, allow_partial)


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
            if not path.exists():  # a broken link, which is reported when it is read
                identities.append([path.as_posix(), None])
                continue
            state = path.stat()
            identities.append([path.as_posix(), state.st_size, state.st_mtime_ns])
    return fingerprint(identities)


def source_bytes(sources: Iterable[str]) -> int | None:
    """Estimate the bytes of text from the files' sizes; None if the size is unknown before reading."""
    total = 0.0
    for source in _checked(sources):
        if source == BUILTIN:
            return None
        for path in filter(Path.exists, _expanded(source).files):
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
        files, other = _files_below(path)
        return _Source(source, files, single=False, other=other)
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


def _files_below(root: Path) -> tuple[tuple[Path, ...], Counter[str]]:
    """Return the files of known kinds below a directory, and the number of others by suffix."""
    paths: list[Path] = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        paths += [Path(directory, name) for name in files if not name.startswith(".")]
    known = sorted(path for path in paths if _is_known(path.name))
    if not known:
        raise UserError(f"{root} is a directory without documents; known kinds of file: {_known()}")
    return tuple(known), Counter(path.suffix.lower() for path in paths if not _is_known(path.name))


def _is_known(name: str) -> bool:
    return Path(unpacked_name(name)).suffix in READERS or name.lower().endswith(_ARCHIVE)


def _known() -> str:
    return f"{' '.join(READERS)} (each also with {', '.join(PACKED)}) and {_ARCHIVE}"


def _documents(sources: list[_Source], skipped: Counter[str], allow_partial: bool) -> Iterator[Document]:
    for source in sources:
        if source.name == BUILTIN:
            yield from python_docs.iterate(skipped=skipped)
            continue
        any_text = False
        for document in _rows(_Reading(source, skipped, allow_partial)):
            any_text = True
            yield document
        if not any_text:
            raise UserError(f"{source.name} holds no text")


def _rows(reading: _Reading) -> Iterator[Document]:
    reading.ignore_others()
    for path in reading.source.files:
        try:
            origin = file_origin(path)
        except OSError as problem:
            message = f"cannot read {path}: {problem.strerror or problem}"
            reading.leave_out(Fault("cannot be read", message))
            continue
        if origin.name.lower().endswith(_ARCHIVE):
            yield from _archive(origin, reading)
        else:
            yield from _file(origin, reading)


def _archive(archive: Origin, reading: _Reading) -> Iterator[Document]:
    single, reading.single = reading.single, False  # the defects of its members are no errors
    try:
        with zip_members(archive) as members:
            for member in members:
                if isinstance(member, Fault):
                    reading.leave_out(member)
                    reading.add_left_out(member.size)
                elif member.suffix in READERS:
                    yield from _file(member, reading)
    except Fault as fault:
        reading.single = single
        reading.leave_out(fault)
        reading.add_left_out(archive.size)
    reading.single = single


def _file(origin: Origin, reading: _Reading) -> Iterator[Document]:
    whole = faulty = 0  # rows
    try:
        for row in READERS[origin.suffix](origin):
            if isinstance(row, Fault):
                faulty += 1
                reading.leave_out(row)
                continue
            whole += 1
            if row.text.strip():
                name = f"{origin.name}:{row.number}"
                yield Document(row.text, reading.source.name, name, row.offset, row.licence)
            else:
                reading.empty()
    except Fault as fault:
        # The rows before the fault are complete and have been used.
        faulty += 1
        reading.leave_out(fault)
    if faulty:
        reading.add_left_out(origin.size * faulty / (whole + faulty))
    elif not whole:
        reading.empty()
