"""Read tables of examples (jsonl, json, csv, tsv, parquet, also compressed) as lists of dicts.

The content of a file decides how it is read, where its name says something else: JSON Lines may be called
``.json``, an array ``.jsonl``, and any file may be compressed or not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tercet.data.byte_streams import Fault, file_origin, unpacked_name
from tercet.data.json_rows import json_rows
from tercet.errors import UserError, nearest

OverLength = Literal["drop", "truncate", "error"]  # what happens to a row with too many tokens

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
_SUFFIXES = {"ndjson": "jsonl", "tab": "tsv", "pq": "parquet"}


def read_rows(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
    quoting: bool | None = None,
) -> list[dict[str, Any]]:
    """Read every row of a file, in order. Values of csv and tsv are strings.

    Args:
        path: the file; it may be compressed with gzip, zstandard, bzip2 or xz.
        format: one of ``FORMATS``; by default that of the suffix, or without a known suffix that of the content.
            The content distinguishes jsonl from json.
        columns: names for a csv or tsv file without a header line.
        encoding: of the text formats. A byte order mark is not part of the text.
        quoting: whether ``"`` quotes a value. By default it does in csv (RFC 4180) but not in tsv,
            where a quote is an ordinary character and each line is a row.

    Raises:
        UserError: the file can't be read; the error names the file and, if there is one, the line.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"{path}: format {format!r} is not one of {', '.join(FORMATS)}")
    content = _content(path)
    format = format or _format_of(path, content)
    if format not in ("csv", "tsv") and (columns is not None or quoting is not None):
        setting = "columns" if columns is not None else "quoting"
        raise UserError(f"{path}: `{setting}` is for csv and tsv files; this one is {format}")
    if format == "parquet" or (format in ("json", "jsonl") and content.startswith(b"PAR1")):
        return _parquet(path, content)
    text = _decode(path, content, encoding)
    if format in ("json", "jsonl"):
        return _json(path, text)
    return _table(
        path, text, "\t" if format == "tsv" else ",", columns, format == "csv" if quoting is None else quoting
    )


def _format_of(path: Path, content: bytes) -> str:
    """Return the format that the suffix names, or else the one that the content begins like."""
    suffix = Path(unpacked_name(path.name)).suffix.removeprefix(".")
    format = _SUFFIXES.get(suffix, suffix)
    if format not in FORMATS:
        if content.startswith(b"PAR1"):
            return "parquet"
        if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
            return "json"
        reason = f"the suffix .{suffix} is not that of a known format" if suffix else "its name has no suffix"
        raise UserError(
            f"{path}: {reason}; rename it to one ({', '.join(FORMATS)}), or set `format` in a task file"
        )
    return format


def _content(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"there is no file {path}{nearest_file(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    with file_origin(path).opened() as stream:
        return stream.read()


def nearest_file(path: Path) -> str:
    """Return ``; did you mean X?`` if the directory holds a similar name, else an empty string."""
    if not path.parent.is_dir():
        return ""
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; did you mean {near[0]}?" if near else ""


def _decode(path: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except LookupError as problem:
        raise UserError(f"{path}: there is no encoding {encoding!r}") from problem
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UserError(
            f"{path}:{line} is not {encoding} text; set `encoding` (latin-1, cp1252, ...)"
        ) from problem


def _json(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    # Only a line feed ends a line: JSON strings may hold U+2028 and its like as they are.
    lines = io.StringIO(text, newline="\n")
    for row in json_rows(str(path), ((0, line) for line in lines)):
        if isinstance(row, Fault):
            raise row
        if not isinstance(row.value, dict):
            raise UserError(f"{row.where} is a {type(row.value).__name__}; each row must be a JSON object")
        rows.append(row.value)
    return rows


def _table(
    path: Path, text: str, delimiter: str, columns: Sequence[str] | None, quoting: bool
) -> list[dict[str, Any]]:
    lines = _quoted(path, text, delimiter) if quoting else _plain(text, delimiter)
    if columns is None:
        if not lines:
            return []
        columns = lines.pop(0)[1]
    repeated = [name for index, name in enumerate(columns) if name in columns[:index]]
    if repeated:
        raise UserError(f"{path}: two columns are called {repeated[0]!r}")
    rows = []
    for number, values in lines:
        if len(values) != len(columns):
            kind = "tab" if delimiter == "\t" else "comma"
            raise UserError(
                f"{path}:{number} has {len(values)} {kind}-separated values for {len(columns)} columns "
                f"({', '.join(columns)})"
            )
        rows.append(dict(zip(columns, values, strict=True)))
    return rows


def _plain(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    # Only a line feed ends a line: a stray carriage return inside a message is part of it.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [(number, line.split(delimiter)) for number, line in enumerate(lines, start=1) if line.strip()]


def _quoted(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for values in reader:
            if values:
                rows.append((start, values))
            start = reader.line_num + 1
    except csv.Error as problem:
        raise UserError(f"{path}:{start} is not valid csv: {problem}") from problem
    return rows


def _parquet(path: Path, content: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowInvalid, OSError) as problem:
        raise UserError(f"{path} is not a parquet file: {str(problem).splitlines()[0]}") from problem
    return rows
