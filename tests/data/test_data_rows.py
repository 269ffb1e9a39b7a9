"""Every format of a table gives the same rows; errors name the broken line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tercet.data.rows import read_rows
from tercet.errors import UserError

ROWS = [{"label": "ham", "text": 'He said "no", twice'}, {"label": "spam", "text": "WIN £100 – now"}]


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


CONTENT = {
    "rows.jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS).encode(),
    "rows.ndjson": "\ufeff".encode() + json.dumps(ROWS[0]).encode() + b"\n" + json.dumps(ROWS[1]).encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": 'label,text\r\nham,"He said ""no"", twice"\r\n\r\nspam,WIN £100 – now\r\n'.encode(),
    "rows.tsv": 'label\ttext\r\nham\tHe said "no", twice\r\nspam\tWIN £100 – now\r\n'.encode(),
    "rows.parquet": _parquet(ROWS),
}


def plain(content: bytes) -> bytes:
    return content


def zstandard(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("pack", [plain, gzip.compress, bz2.compress, lzma.compress, zstandard])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_format_gives_the_same_rows_whatever_its_name_says_of_the_packing(
    tmp_path: Path, name: str, pack: Any, suffix: str
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(CONTENT[name]))
    assert read_rows(path) == ROWS


# The json reader of datasets 5.2 gives the same two rows for each of them, under either name.
LAYOUTS = {
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "lines, blank ones between": "\n \n" + "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\n",
    "array": json.dumps(ROWS),
    "array of lines": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "indented array": "\n" + json.dumps(ROWS, indent=2),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "a line, then an indented object": json.dumps(ROWS[0], indent=2) + "\n" + json.dumps(ROWS[1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_layout_of_json_is_read_from_its_content(tmp_path: Path, name: str, layout: str) -> None:
    (tmp_path / name).write_text(LAYOUTS[layout], newline="")
    assert read_rows(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("new", ["train", "rows.txt", "rows.json"])
def test_json_and_parquet_are_recognized_without_a_suffix(tmp_path: Path, name: str, new: str) -> None:
    (tmp_path / new).write_bytes(CONTENT[name])
    assert read_rows(tmp_path / new) == ROWS


def test_an_array_with_a_single_row_and_a_line_separator_in_a_string(tmp_path: Path) -> None:
    for content in (
        '[\n{"a": "x\u2028y"}\n]',
        '[{"a": "x\u2028y"}]',
        '{"a": "x\u2028y"}',
        '{\n"a": "x\u2028y"}',
    ):
        (tmp_path / "a.json").write_text(content)
        assert read_rows(tmp_path / "a.json") == [{"a": "x\u2028y"}]


def test_a_tsv_without_header_and_with_stray_quotes(tmp_path: Path) -> None:
    path = tmp_path / "Collection"
    path.write_bytes(b'ham\t"Oh, he said\r\nspam\tfree\rly yours"\r\n')
    assert read_rows(path, format="tsv", columns=["label", "text"]) == [
        {"label": "ham", "text": '"Oh, he said'},
        {"label": "spam", "text": 'free\rly yours"'},
    ]


def test_quoting_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('a\tb\n"x\ty"\tz\n')
    assert read_rows(path, quoting=True) == [{"a": "x\ty", "b": "z"}]
    with pytest.raises(UserError, match=r"a\.tsv:2 has 3 tab-separated values for 2 columns"):
        read_rows(path)


def test_a_quoted_value_may_hold_lines_and_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n"1\n2",' + "x" * 200_000 + "\n3\n")
    with pytest.raises(UserError, match=r"a\.csv:4 has 1 comma-separated"):
        read_rows(path)
    path.write_text('a,b\n"1\n2",' + "x" * 200_000 + "\n")
    assert read_rows(path) == [{"a": "1\n2", "b": "x" * 200_000}]


def test_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("a\nx\nnaïve\n".encode("latin-1"))
    assert read_rows(path, encoding="latin-1")[1] == {"a": "naïve"}
    with pytest.raises(UserError, match=r"a\.csv:3 is not utf-8 text; set `encoding`"):
        read_rows(path)
    with pytest.raises(UserError, match="no encoding 'latin-eleventy'"):
        read_rows(path, encoding="latin-eleventy")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2 is a list; each row must be a JSON object"),
        ("a.jsonl", b'[{"a": 1}]\n[1]\n', r"a\.jsonl:1 is a list; each row must be a JSON object"),
        ("a.json", b'{"a": 1}\n{"a": \n', r"a\.json:2 is not valid JSON"),
        ("a.json", b'{"a": \n{"a": 1}\n', r"a\.json:1 is not valid JSON"),
        ("a.json", b'{\n"a": 1\n}\n{\n"a": 1,\n}', r"a\.json:6:1 is not valid JSON"),
        ("a.json", b"[" * 100_000, r"a\.json:1 is not valid JSON: it is nested too deeply"),
        ("a.json", b"nothing", r"a\.json:1 is not valid JSON"),
        ("a.json", b"[1]", "row 1 is a int"),
        ("a.json", b"[\n{]", r"a\.json:2:2 is not valid JSON"),
        ("a.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2 is not valid csv"),
        ("a.parquet", b"PAR1 not really", "is not a parquet file"),
        ("a.csv.gz", b"\x1f\x8b\x08broken", "is not a whole gzip file"),
        ("a.csv", bz2.compress(b"a\n1\n")[:-9], "is not a whole bzip2 file"),
        ("a.csv", bz2.compress(b"a\n1\n")[:-9] + b"x" * 20, "is not a whole bzip2 file"),
        ("a.csv.xz", lzma.compress(b"a\n1\n")[:-9], "is not a whole xz file"),
        ("a.csv", zstandard(b"a\n1\n")[:-3], "is not a whole zstandard file"),
        ("a.xlsx", b"x", r"the suffix \.xlsx is not that of a known format"),
        ("a", b"x", "its name has no suffix"),
    ],
)
def test_errors_name_the_defect(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"there is no file .*trian\.jsonl; did you mean train\.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    for options in ({}, {"format": "csv"}):
        with pytest.raises(UserError, match="is a directory; name a file"):
            read_rows(tmp_path, **options)  # type: ignore[arg-type]


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="`columns` is for csv and tsv"):
        read_rows(tmp_path / "a.jsonl", columns=["a"])
    with pytest.raises(UserError, match="format 'xml' is not one of"):
        read_rows(tmp_path / "a.jsonl", format="xml")
