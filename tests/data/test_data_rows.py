"""Every format of a table gives the same rows; errors name the broken line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tercet.data.rows import read_rows
from tercet.errors import UserError

ROWS = [{"label": "ham", "text": 'He said "no", twice'}, {"label": "spam", "text": "WIN £100 – now"}]


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
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


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(CONTENT[name]) if packed else CONTENT[name])
    assert read_rows(path) == ROWS


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
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is a list; each line must be a JSON object"),
        ("a.json", b'{"a": 1}', "holds a dict"),
        ("a.json", b"[1]", "row 1 is a int"),
        ("a.json", b"[\n{]", r"a\.json:2:2 is not valid JSON"),
        ("a.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2 is not valid csv"),
        ("a.parquet", b"PAR1 not really", "is not a parquet file"),
        ("a.csv.gz", b"\x1f\x8b\x08broken", "is not a whole gzip file"),
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
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path, format="csv")


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="`columns` is for csv and tsv"):
        read_rows(tmp_path / "a.jsonl", columns=["a"])
    with pytest.raises(UserError, match="format 'xml' is not one of"):
        read_rows(tmp_path / "a.jsonl", format="xml")
