"""Text documents from files, directories and the built-in corpus, one after the other.

Files are streamed: memory holds one document at a time (one file for ``.json`` and gzipped
parquet). What is wrong with a file is told in one line; nothing is dropped without being counted.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tercet.data.rows import nearest_file
from tercet.errors import UserError
from tercet.files import fingerprint

BUILTIN = "builtin:python-docs"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's separator, as TinyStories and others write it between texts
_LICENCE_FIELDS = ("license", "licence", "metadata", "meta")
_TEXT_FIELDS = ("text", "content", "messages", "conversations")


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        text: the text, with ``\\n`` line ends.
        source: the group it is counted under: the source as the user named it, or ``stdlib/json``.
        id: where exactly it stands: ``path:line`` (row for tables), or the module.
        offset: the byte of the (unpacked) file at which it, or its row, begins; None for tables.
        licence: as the row names it, in ``license``, ``licence`` or in a ``meta`` or ``metadata`` object.
    """

    text: str
    source: str
    id: str
    offset: int | None = None
    licence: str | None = None


class Row(NamedTuple):
    """A text in a file: the line or row it begins in (from 1), and what its document says of it."""

    number: int
    text: str
    offset: int | None = None
    licence: str | None = None


def read_documents(sources: Iterable[str], skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Every document of every source, in a fixed order (directories by sorted path).

    Args:
        sources: files (``.txt .md .jsonl .json .csv .tsv .parquet``, each also ``.gz``),
            directories of them, or ``builtin:python-docs``. A ``.txt`` or ``.md`` file is one document,
            divided at lines that are ``<|endoftext|>``; the others have one document a row, in the
            field ``text``, ``content``, ``messages`` or ``conversations``, whichever there is first.
        skipped: counts what was left out, by reason (``empty``: no text in it).

    Raises:
        UserError: at once for a path that is missing or of an unknown kind; while reading for a
            broken gzip, binary content, invalid UTF-8 or JSON, a row without text field, or a source
            without any text.
    """
    skipped = Counter() if skipped is None else skipped
    expanded = [(source, _files(source)) for source in _checked(sources)]
    return _documents(expanded, skipped)


def source_fingerprint(sources: Iterable[str]) -> str:
    """Changes when the sources' content does, without reading it.

    Files count by path, size and time of change; the built-in corpus by the versions of Python and
    of every installed package.
    """
    from tercet.data import python_docs

    found: list[Any] = []
    for source in _checked(sources):
        if source == BUILTIN:
            found.append(python_docs.corpus_fingerprint())
            continue
        for path in _files(source):
            state = path.stat()
            found.append([path.as_posix(), state.st_size, state.st_mtime_ns])
    return fingerprint(found)


def _checked(sources: Iterable[str]) -> list[str]:
    sources = [sources] if isinstance(sources, str) else [str(source) for source in sources]
    if not sources:
        raise UserError(f"no data given; name a file, a directory or {BUILTIN}")
    return sources


def _files(source: str) -> list[Path]:
    """The files of a source, checked to be there and of a known kind; none for the built-in one."""
    if source == BUILTIN:
        return []
    if source.startswith("builtin:"):
        raise UserError(f"there is no corpus {source}; the built-in corpus is {BUILTIN}")
    path = Path(source)
    if path.is_dir():
        return _files_below(path)
    if not path.exists():
        raise UserError(f"there is no file or directory {source}{nearest_file(path)}")
    if _kind(path) is None:
        raise UserError(f"{source}: can't read documents from this kind of file; known: {_known()}")
    return [path]


def _files_below(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(directory, name) for name in files if not name.startswith(".")]
    found = sorted(path for path in found if _kind(path) is not None)
    if not found:
        raise UserError(f"{root} is a directory without documents; known kinds of file: {_known()}")
    return found


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in _READERS else None


def _known() -> str:
    return f"{' '.join(_READERS)} (each also with .gz)"


def _documents(expanded: list[tuple[str, list[Path]]], skipped: Counter[str]) -> Iterator[Document]:
    for source, files in expanded:
        if source == BUILTIN:
            from tercet.data import python_docs

            yield from python_docs.iterate(skipped=skipped)
            continue
        any_text = False
        for path in files:
            read = _READERS[_kind(path) or ""]
            empty = True
            for row in read(path):
                empty = False
                if not row.text.strip():
                    skipped["empty"] += 1
                    continue
                any_text = True
                yield Document(row.text, source, f"{path.as_posix()}:{row.number}", row.offset, row.licence)
            if empty:
                skipped["empty"] += 1
        if not any_text:
            raise UserError(f"{source} holds no text")


# Readers of one file.


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes, unpacked if the name ends in ``.gz``; faults while reading become UserError."""
    try:
        with path.open("rb") as plain:
            yield gzip.GzipFile(fileobj=plain) if path.name.lower().endswith(".gz") else plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(f"{path} is not a whole gzip file: {problem}") from problem
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its ``\\n``."""
    return (line for _, line in _placed_lines(path))


def _placed_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`_lines`, each with the byte it begins at."""
    offset = 0
    with _opened(path) as stream:
        for data in stream:
            if b"\0" in data:
                where = offset + data.index(0)
                raise UserError(f"{path} is a binary file (byte {where} is NUL), not UTF-8 text")
            try:
                line = data.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as problem:
                mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
                where = offset + mark + problem.start
                raise UserError(f"{path} is not UTF-8 text (byte {where}); convert it first") from problem
            yield offset, line[:-2] + "\n" if line.endswith("\r\n") else line
            offset += len(data)


def _read_text(path: Path) -> Iterator[Row]:
    held: list[str] = []
    first, begin = 1, 0
    for number, (offset, line) in enumerate(_placed_lines(path), start=1):
        if line.strip() != END_OF_TEXT:
            if not held:
                first, begin = number, offset
            held.append(line)
            continue
        if held:
            yield Row(first, "".join(held), begin)
        held = []
    if held:
        yield Row(first, "".join(held), begin)


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, (offset, line) in enumerate(_placed_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as problem:
            raise UserError(f"{path}:{number} is not valid JSON: {problem}") from problem
        yield Row(number, _text_of(row, f"{path}:{number}"), offset, _licence_of(row))


def _read_json(path: Path) -> Iterator[Row]:
    content = "".join(_lines(path))
    if not content.strip():
        return
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from problem
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield Row(number, _text_of(row, f"{path}, row {number}"), None, _licence_of(row))


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long documents
    reader = csv.reader(_lines(path), strict=True)
    try:
        yield from _table(path, reader)
    except csv.Error as problem:
        raise UserError(f"{path}:{reader.line_num} is not valid csv: {problem}") from problem


def _read_tsv(path: Path) -> Iterator[Row]:
    # As in tables of examples: a quote is text like any other and a line is a row.
    return _table(path, (line.rstrip("\n").split("\t") if line.strip() else [] for line in _lines(path)))


def _table(path: Path, rows: Iterable[list[str]]) -> Iterator[Row]:
    header: list[str] | None = None
    number = 0
    for values in rows:
        if not values:
            continue
        if header is None:
            header = values
            continue
        number += 1
        where = f"{path}, row {number}"
        if len(values) != len(header):
            raise UserError(f"{where} has {len(values)} values for {len(header)} columns")
        row = dict(zip(header, values, strict=True))
        yield Row(number, _text_of(row, where), None, _licence_of(row))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with _opened(path) as stream:
        try:
            table = pq.ParquetFile(io.BytesIO(stream.read()) if path.name.lower().endswith(".gz") else stream)
            names = table.schema_arrow.names
            field = next((name for name in _TEXT_FIELDS if name in names), None)
            if field is None:
                raise UserError(_no_text_field(str(path), names))
            columns = [field, *(name for name in _LICENCE_FIELDS if name in names)]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(number, _text_of(row, f"{path}, row {number}"), None, _licence_of(row))
        except pa.ArrowException as problem:
            raise UserError(f"{path} is not a readable parquet file: {problem}".splitlines()[0]) from problem


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _licence_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    inner = (row[name] for name in ("metadata", "meta") if isinstance(row.get(name), dict))
    named = (place.get(name) for place in (row, *inner) for name in ("license", "licence"))
    return next((value for value in named if isinstance(value, str) and value), None)


def _text_of(row: Any, where: str) -> str:
    """The text of a row; null is no text. UserError when there is no field for it."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}; a row must be an object with a text field")
    field = next((name for name in _TEXT_FIELDS if name in row), None)
    if field is None:
        raise UserError(_no_text_field(where, list(row)))
    value = row[field]
    text: Any = _conversation(value, where) if isinstance(value, list) else value
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {field} is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        place = f"character {problem.start}"
        raise UserError(f"{where}: {field} holds half a surrogate pair at {place}") from problem
    return text.replace("\r\n", "\n")


def _conversation(messages: list[Any], where: str) -> str:
    """The texts of a conversation's messages (or of a content's parts), a blank line between."""
    texts = []
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"{where}: a message is a {type(message).__name__}; it must be an object")
        content = next((message[key] for key in ("content", "value", "text") if key in message), None)
        if isinstance(content, list):
            content = _conversation(content, where)
        if isinstance(content, str) and content:
            texts.append(content)
    return "\n\n".join(texts)


def _no_text_field(where: str, fields: list[str]) -> str:
    there = ", ".join(str(field) for field in fields) or "none"
    return f"{where}: no text field ({', '.join(_TEXT_FIELDS)}); the fields there are: {there}"
