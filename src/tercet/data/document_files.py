"""Read files as texts: a reader yields a `Row` for each text and a `Fault` for each unusable row.

A defect of the whole file is raised as a `Fault`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tercet.data.byte_streams import Fault, Origin
from tercet.data.json_rows import json_rows

END_OF_TEXT = "<|endoftext|>"  # GPT-2's separator, as TinyStories and others write it between texts
TEXT_FIELDS = ("text", "content", "messages", "conversations")
LICENCE_FIELDS = ("license", "licence", "metadata", "meta")
# Characters of a text file after which it is divided at the next blank line. No book is that long, and a dump
# of many gigabytes is still streamed.
DIVIDE_AFTER = 16_000_000


class Row(NamedTuple):
    """A text in a file.

    Attributes:
        number: the line or row in which the text begins, from 1.
        text: the text.
        offset: the byte of the unpacked file at which the text, or its row, begins; None for tables.
        licence: the licence that the row names.
    """

    number: int
    text: str
    offset: int | None = None
    licence: str | None = None


Reader = Callable[[Origin], Iterator[Row | Fault]]


def lines(origin: Origin) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, each with its byte offset; line ends become a single line feed.

    Raises:
        Fault: the content is binary or in another encoding.
    """
    offset = 0
    with origin.opened() as stream:
        for data in stream:
            if b"\0" in data:
                where = offset + data.index(0)
                raise Fault("binary", f"{origin.name} is a binary file (byte {where} is NUL), not UTF-8 text")
            try:
                line = data.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as problem:
                mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
                where = offset + mark + problem.start
                message = f"{origin.name} is not UTF-8 text (byte {where}); convert it first"
                raise Fault("not UTF-8 text", message) from problem
            yield offset, line[:-2] + "\n" if line.endswith("\r\n") else line
            offset += len(data)


def read_text(origin: Origin) -> Iterator[Row]:
    """Yield the documents of a text file, divided as `DIVIDE_AFTER` and `END_OF_TEXT` say."""
    held: list[str] = []
    first = begin = size = 0
    for number, (offset, line) in enumerate(lines(origin), start=1):
        ends = line.strip() == END_OF_TEXT
        if ends or (size > DIVIDE_AFTER and not line.strip()):
            if held:
                yield Row(first, "".join(held), begin)
            held, size = [], 0
            continue
        if not held:
            first, begin = number, offset
        held.append(line)
        size += len(line)
    if held:
        yield Row(first, "".join(held), begin)


def read_html(origin: Origin) -> Iterator[Row]:
    """Yield the text of an HTML page."""
    from tercet.data.html_text import html_text

    page = "".join(line for _, line in lines(origin))
    if page.strip():
        yield Row(1, html_text(page), 0)


def read_json(origin: Origin) -> Iterator[Row | Fault]:
    """Yield the text of each JSON object, laid out as `tercet.data.json_rows` describes."""
    for row in json_rows(origin.name, lines(origin)):
        yield row if isinstance(row, Fault) else _row(row.value, row.number, row.where, row.offset)


def read_csv(origin: Origin) -> Iterator[Row | Fault]:
    """Yield the text of each row of a comma-separated table with a header line (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long documents
    reader = csv.reader((line for _, line in lines(origin)), strict=True)
    try:
        yield from _table(origin, reader)
    except csv.Error as problem:
        message = f"{origin.name}:{reader.line_num} is not valid csv: {problem}"
        raise Fault("not valid csv", message) from problem


def read_tsv(origin: Origin) -> Iterator[Row | Fault]:
    """Yield the text of each line of a tab-separated table; quotes are ordinary characters."""
    cells = (line.rstrip("\n").split("\t") if line.strip() else [] for _, line in lines(origin))
    return _table(origin, cells)


def read_parquet(origin: Origin) -> Iterator[Row | Fault]:
    """Yield the text of each row of a parquet file, in batches of 1024 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with origin.opened() as stream:
        try:
            # A parquet file is read from its end, so a stream without seek is unpacked into memory.
            on_disk = isinstance(getattr(stream, "raw", None), io.FileIO)
            table = pq.ParquetFile(stream if on_disk else io.BytesIO(stream.read()))
            names = table.schema_arrow.names
            field = next((name for name in TEXT_FIELDS if name in names), None)
            if field is None:
                raise Fault("no text field", _no_text_field(origin.name, names))
            columns = [field, *(name for name in LICENCE_FIELDS if name in names)]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, number, f"{origin.name}, row {number}")
        except pa.ArrowException as problem:
            message = f"{origin.name} is not a readable parquet file: {problem}".splitlines()[0]
            raise Fault("not a readable parquet file", message) from problem


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def _table(origin: Origin, rows: Iterable[list[str]]) -> Iterator[Row | Fault]:
    header: list[str] | None = None
    number = 0
    for values in rows:
        if not values:
            continue
        if header is None:
            header = values
            continue
        number += 1
        where = f"{origin.name}, row {number}"
        if len(values) != len(header):
            yield Fault(
                "wrong number of columns", f"{where} has {len(values)} values for {len(header)} columns"
            )
            continue
        yield _row(dict(zip(header, values, strict=True)), number, where)


def _row(row: Any, number: int, where: str, offset: int | None = None) -> Row | Fault:
    try:
        return Row(number, _text_of(row, where), offset, _licence_of(row))
    except Fault as problem:
        return problem


def _licence_of(row: dict[str, Any]) -> str | None:
    inner = (row[name] for name in ("metadata", "meta") if isinstance(row.get(name), dict))
    named = (place.get(name) for place in (row, *inner) for name in ("license", "licence"))
    return next((value for value in named if isinstance(value, str) and value), None)


def _text_of(row: Any, where: str) -> str:
    """Return the text of a row, empty for null; raise a Fault if it has no text field."""
    if not isinstance(row, dict):
        raise Fault(
            "no text field", f"{where} is a {type(row).__name__}; a row must be an object with a text field"
        )
    field = next((name for name in TEXT_FIELDS if name in row), None)
    if field is None:
        raise Fault("no text field", _no_text_field(where, list(row)))
    value = row[field]
    text: Any = _conversation(value, where) if isinstance(value, list) else value
    if text is None:
        return ""
    if not isinstance(text, str):
        raise Fault("text is no string", f"{where}: {field} is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        message = f"{where}: {field} holds half a surrogate pair at character {problem.start}"
        raise Fault("half a surrogate pair", message) from problem
    return text.replace("\r\n", "\n")


def _conversation(messages: list[Any], where: str) -> str:
    """Join the texts of a conversation's messages (or of a content's parts) with blank lines."""
    texts = []
    for message in messages:
        if not isinstance(message, dict):
            raise Fault(
                "not a conversation",
                f"{where}: a message is a {type(message).__name__}; it must be an object",
            )
        content = next((message[key] for key in ("content", "value", "text") if key in message), None)
        if isinstance(content, list):
            content = _conversation(content, where)
        if isinstance(content, str) and content:
            texts.append(content)
    return "\n\n".join(texts)


def _no_text_field(where: str, fields: list[str]) -> str:
    names = ", ".join(str(field) for field in fields) or "none"
    return f"{where}: no text field ({', '.join(TEXT_FIELDS)}); its fields are: {names}"
