"""Documents are read from files of every kind; each kind of defect gives a clear one-line message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.documents import UNPACKED, read_documents, source_bytes, source_fingerprint
from tercet.errors import UserError


def texts(*sources: Path | str) -> list[str]:
    return [document.text for document in read_documents([str(source) for source in sources])]


def fault(*sources: Path | str) -> str:
    """Return the one-line message of the error that reading these sources raises."""
    with pytest.raises(UserError) as caught:
        texts(*sources)
    message = str(caught.value)
    assert "\n" not in message
    return message


def zstandard(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return bytes(packed.getvalue().to_pybytes())


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def test_a_text_file_is_one_document_and_its_separator_lines_divide_it(write: Any) -> None:
    assert texts(write("a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]
    assert texts(write("a.md", "# one")) == ["# one"]
    divided = write("b.txt", "one\n<|endoftext|>\ntwo\nmore\n<|endoftext|>\n")
    assert [(document.text, document.id) for document in read_documents([str(divided)])] == [
        ("one\n", f"{divided}:1"),
        ("two\nmore\n", f"{divided}:3"),
    ]


def test_a_separator_inside_a_line_is_text(write: Any) -> None:
    assert texts(write("a.txt", "the token <|endoftext|> ends\n")) == ["the token <|endoftext|> ends\n"]


def test_line_ends_and_byte_order_marks_are_not_text(write: Any) -> None:
    assert texts(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == ["one\ntwo\n"]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "é 1\n<|endoftext|>\ntwo"),
        ("a.jsonl", '{"text": "é 1\\n"}\n\n{"text": "two", "n": 3}\n'),
        ("a.json", '[{"text": "é 1\\n"}, {"content": "two"}]'),
        ("a.csv", 'id,text\n1,"é 1\n"\n2,two\n'),
        ("a.tsv", "text\tid\né 1\t1\ntwo\t2\n"),
    ],
)
def test_every_kind_of_file_gives_its_texts_also_with_gzip(
    write: Any, name: str, content: str, gz: str
) -> None:
    assert [text.strip() for text in texts(write(name + gz, content))] == ["é 1", "two"]


@pytest.mark.parametrize("gz", [False, True])
def test_parquet(tmp_path: Path, gz: bool) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["one", None, "three"]}), path)
    if gz:
        path = path.rename(tmp_path / "b.parquet.gz")
        path.write_bytes(gzip.compress(path.read_bytes()))
    skipped: Counter[str] = Counter()
    documents = list(read_documents([str(path)], skipped))
    assert [(document.text, document.id) for document in documents] == [
        ("one", f"{path}:1"),
        ("three", f"{path}:3"),
    ]
    assert skipped == {"empty": 1}


def test_a_conversation_becomes_the_texts_of_its_messages(write: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image"}]}]},
    ]
    path = write("chat.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert texts(path) == ["Hi\n\nHello.", "Why?\n\nSo.", "See"]


def test_a_csv_field_may_be_longer_than_the_csv_modules_limit(write: Any) -> None:
    assert texts(write("a.csv", "text\n" + "x" * 300_000)) == ["x" * 300_000]


def test_directories_are_read_in_sorted_order_known_kinds_only(write: Any, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.txt", "notes.pdf", ".hidden/x.txt", ".x.txt"):
        write(f"corpus/{name}", f"{name}\n")
    root = tmp_path / "corpus"
    assert texts(root) == ["a/z.md\n", "a.txt\n", "b.txt\n"]
    assert {document.source for document in read_documents([str(root)])} == {str(root)}


def test_empty_files_and_rows_are_counted(write: Any, tmp_path: Path) -> None:
    write("d/a.txt", "")
    write("d/b.jsonl", '{"text": ""}\n{"text": null}\n{"text": "kept"}')
    skipped: Counter[str] = Counter()
    assert [document.text for document in read_documents([str(tmp_path / "d")], skipped)] == ["kept"]
    assert skipped == {"empty": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt holds no text"),
        ("blank.jsonl", "\n\n", "blank.jsonl holds no text"),
        ("latin.txt", b"good\ncaf\xe9\n", "latin.txt is not UTF-8 text (byte 8)"),
        ("bom.txt", b"\xef\xbb\xbfab\xff", "bom.txt is not UTF-8 text (byte 5)"),
        ("binary.txt", b"GIF89a\0\1", "binary.txt is a binary file (byte 6 is NUL)"),
        ("wide.txt", "text".encode("utf-16"), "wide.txt is a binary file"),
        ("a.pdf", "x", "known: .txt .md .html"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2 is not valid JSON"),
        ("a.json", '[{"text": "x"}', "a.json:1:15 is not valid JSON"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl:1"),
        ("list.jsonl", "[1, 2]", "list.jsonl, row 1 is a int"),
        ("lists.jsonl", "[1]\n[2]", "lists.jsonl:1 is a list"),
        ("none.jsonl", '{"body": "x", "id": 1}', "none.jsonl:1: no text field"),
        ("number.jsonl", '{"text": 5}', "number.jsonl:1: text is a int"),
        (
            "half.jsonl",
            '{"text": "ab\\ud800"}',
            "half.jsonl:1: text holds half a surrogate pair at character 2",
        ),
        ("none.csv", "id,body\n1,x\n", "its fields are: id, body"),
        ("short.csv", "id,text\n1\n", "short.csv, row 1 has 1 values for 2 columns"),
        ("quote.csv", 'text\n"open\n', "quote.csv:2 is not valid csv"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a readable parquet file"),
    ],
)
def test_bad_input_is_one_line(write: Any, name: str, content: str | bytes, message: str) -> None:
    assert message in fault(write(name, content))


def test_parquet_without_text_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    assert "its fields are: id, body" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_broken_gzip_is_one_line(write: Any, tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(os.urandom(50_000).hex().encode(), mtime=0)
    flipped = whole[:5000] + bytes(255 - byte for byte in whole[5000:5100]) + whole[5100:]
    data = {"cut": whole[: len(whole) // 2], "flipped": flipped}[damage]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    assert "is not a whole gzip file" in fault(path)


def test_missing_paths_and_unknown_builtins_are_refused_before_reading(write: Any, tmp_path: Path) -> None:
    good = write("books.txt", "x")
    for wrong, message in [
        (str(tmp_path / "bocks.txt"), "did you mean books.txt?"),
        (str(tmp_path / "none" / "x.txt"), "there is no file or directory"),
        ("builtin:python-doc", "builtin:python-docs"),
    ]:
        with pytest.raises(UserError, match="no ") as caught:
            read_documents([str(good), wrong])  # not iterated
        assert message in str(caught.value)
    (tmp_path / "bare").mkdir()
    assert "directory without documents" in fault(tmp_path / "bare")
    assert "no data given" in fault()


def test_documents_before_a_fault_are_read(write: Any) -> None:
    path = write("a.jsonl", '{"text": "first"}\n' + "broken")
    assert next(read_documents([str(path)])).text == "first"


def test_the_builtin_corpus_is_a_source(write: Any) -> None:
    path = write("a.txt", "mine")
    documents = list(islice(read_documents([str(path), "builtin:python-docs"]), 3))
    assert documents[0].text == "mine"
    assert all(document.source.startswith("stdlib/") for document in documents[1:])


def test_the_fingerprint_changes_only_with_the_files(write: Any, tmp_path: Path) -> None:
    write("d/a.txt", "one")
    root, builtin = str(tmp_path / "d"), "builtin:python-docs"
    before = source_fingerprint([root, builtin])
    assert source_fingerprint([root, builtin]) == before
    assert source_fingerprint([root]) != before
    write("d/b.txt", "two")
    more = source_fingerprint([root, builtin])
    assert more != before
    (tmp_path / "d" / "b.txt").write_text("TWO")
    os.utime(tmp_path / "d" / "b.txt", (1, 1))
    assert source_fingerprint([root, builtin]) != more


def test_zstandard_also_of_several_frames(write: Any) -> None:
    content = zstandard(b'{"text": "one"}\n') + zstandard(b'{"text": "two"}\n')
    assert texts(write("a.jsonl.zst", content)) == ["one", "two"]
    assert "is not a whole zstandard file" in fault(write("cut.txt.zst", zstandard(b"words " * 99)[:-3]))
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["three"]}), table)
    assert texts(write("a.parquet.zst", zstandard(table.getvalue().to_pybytes()))) == ["three"]


def test_the_members_of_an_archive_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/two.jsonl.gz", gzip.compress(b'{"text": "two"}\n'))
        archive.writestr("a/one.txt", "one")
        archive.writestr("c.pdf", "no text")
        archive.writestr("d.txt", b"\xff")
        table = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": ["three"]}), table)
        archive.writestr("e.parquet", table.getvalue().to_pybytes())
    skipped: Counter[str] = Counter()
    documents = list(read_documents([str(tmp_path / "a.zip")], skipped))
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert documents[0].id == f"{(tmp_path / 'a.zip').as_posix()}/a/one.txt:1"
    assert skipped == {"not UTF-8 text": 1}


def test_a_page_gives_its_paragraphs(write: Any) -> None:
    page = """<!doctype html><html><head><title>T</title><script>x()</script></head><body><nav>Home</nav>
    <main><h1>Harbour</h1><p>The boats <i>came</i> back
    from the islands.<br>Yes &amp; no</p><pre>a  b
   c</pre><table><tr><td>1</td><td>2</td></tr></table><ul><li>x<li>y</ul></main><footer>(c)</footer>"""
    expected = "Harbour\n\nThe boats came back from the islands.\nYes & no\n\na  b\n   c\n\n1  2\n\nx\ny"
    assert texts(write("a.html", page), write("b.htm.gz", page)) == [expected] * 2
    assert texts(write("deep.html", "<div>" * 20_000 + "deep")) == ["deep"]


def test_defects_in_a_directory_are_reported_counted_and_skipped(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress("".join(f'{{"text": "row {n}"}}\n' for n in range(5000)).encode())
    (tmp_path / "d").mkdir()
    for name, content in {
        "a.jsonl.gz": whole[: len(whole) // 2],
        "b.txt": b"good\0bad",
        "c.txt": b"caf\xe9",
        "d.txt": b"",
        "e.jsonl": b'{"text": "kept"}\n{"text": \n{"words": "x"}\n{"text": 3}\n{"text": "kept too"}\n',
        "f.csv": b"text,n\nfine,1\nshort\n",
        "g.parquet": b"PAR1",
        "h.zip": b"PK no",
        "i.txt.zst": zstandard(b"words " * 99)[:-3],
        "j.json": b"[",
        "k.txt": b"the last",
    }.items():
        (tmp_path / "d" / name).write_bytes(content)
    skipped: Counter[str] = Counter()
    source = str(tmp_path / "d")
    read = [document.text for document in read_documents([source], skipped, allow_partial=True)]
    # Complete rows before the break in the gzip file are read.
    assert read[0] == "row 0" and read[-4:] == ["kept", "kept too", "fine", "the last"]
    assert skipped == {
        "not a whole gzip file": 1,
        "binary": 1,
        "not UTF-8 text": 1,
        "empty": 1,
        "not valid JSON": 2,
        "no text field": 1,
        "text is no string": 1,
        "wrong number of columns": 1,
        "not a readable parquet file": 1,
        "not a whole zip archive": 1,
        "not a whole zstandard file": 1,
    }
    message = capsys.readouterr().err
    assert "c.txt is not UTF-8 text (byte 3)" in message and "e.jsonl:2 is not valid JSON" in message


def test_three_faults_of_a_kind_are_reported_and_the_rest_only_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "kept"}\n' + "no\n" * 50)
    skipped: Counter[str] = Counter()
    assert len(list(read_documents([str(tmp_path)], skipped, allow_partial=True))) == 1
    assert skipped == {"not valid JSON": 50}
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "b.txt").write_text("open")
    skipped: Counter[str] = Counter()
    documents = read_documents([str(tmp_path)], skipped, allow_partial=True)
    assert [document.text for document in documents] == ["open"]
    assert skipped == {"cannot be read": 1}


def test_offsets_and_licences(write: Any) -> None:
    rows = [
        '{"text": "\u00e9", "license": "CC0"}',
        '{"text": "b", "meta": {"licence": "MIT"}}',
        '{"text": "c"}',
    ]
    path = write("a.jsonl", "\n".join(rows))
    documents = list(read_documents([str(path)]))
    assert [document.licence for document in documents] == ["CC0", "MIT", None]
    data = path.read_bytes()
    assert [json.loads(data[document.offset :].splitlines()[0])["text"] for document in documents] == [
        "\u00e9",
        "b",
        "c",
    ]
    [first, second] = read_documents([str(write("a.txt", "\u00e9 1\n<|endoftext|>\n<|endoftext|>\ntwo"))])
    assert (first.offset, second.offset, second.id[-2:]) == (0, len("\u00e9 1\n".encode()) + 28, ":4")


def test_a_huge_text_file_is_divided_at_a_blank_line(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tercet.data.document_files.DIVIDE_AFTER", 10)
    assert texts(write("a.txt", "one\n\ntwo words\n\nthree\n")) == ["one\n\ntwo words\n", "three\n"]


def test_the_amount_of_text_is_estimated_from_the_files(write: Any) -> None:
    plain, packed = write("d/a.txt", "x" * 1000), write("d/b.jsonl.gz", "y" * 100_000)
    assert source_bytes([str(plain)]) == 1000
    assert source_bytes([str(plain.parent)]) == int(1000 + UNPACKED * packed.stat().st_size)
    assert source_bytes(["builtin:python-docs", str(plain)]) is None


SHARD = "".join(json.dumps({"text": f"Page {n} of the atlas."}) + "\n" for n in range(20))


@pytest.mark.parametrize("name", ["shard.json", "shard.jsonl", "shard.json.gz", "c4.00000-of-00001.json.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard, bz2.compress, lzma.compress])
def test_json_lines_are_read_under_any_name_and_packing(tmp_path: Path, name: str, pack: Any) -> None:
    for path in (tmp_path / name, tmp_path / "d" / name):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pack(SHARD.encode()))
        source = str(path if path.parent == tmp_path else path.parent)
        skipped: Counter[str] = Counter()
        documents = list(read_documents([source], skipped))
        assert [document.text for document in documents] == [f"Page {n} of the atlas." for n in range(20)]
        assert documents[3].id == f"{path}:4" and documents[3].offset == len(SHARD.split("Page 3")[0]) - 10
        assert not skipped


def test_an_array_is_read_under_the_name_of_json_lines(write: Any) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=1),
        "\n".join(json.dumps(row, indent=1) for row in rows),
    ):
        documents = list(read_documents([str(path := write("a.jsonl", content))]))
        assert [(document.text, document.id) for document in documents] == [
            ("a", f"{path}:1"),
            ("b", f"{path}:2"),
        ]


def test_a_file_that_was_unpacked_on_the_way_keeps_its_name(tmp_path: Path) -> None:
    for packing in ("gz", "zst", "bz2", "xz"):
        path = tmp_path / f"a.jsonl.{packing}"
        path.write_text('{"text": "plain"}')
        assert texts(path) == ["plain"]


def test_a_broken_bzip2_or_xz_file_is_one_line(tmp_path: Path) -> None:
    for kind, pack in (("bzip2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / "a.txt").write_bytes(pack(b"words " * 999)[:-20])
        assert f"is not a whole {kind} file" in fault(tmp_path / "a.txt")


def test_a_directory_of_which_most_is_broken_stops_and_asks(write: Any, tmp_path: Path) -> None:
    write("d/a.txt", "a short note")
    write("d/b.csv", "body,n\n" + "words,1\n" * 40)
    write("d/c.txt", "another note")
    message = fault(tmp_path / "d")
    assert "d: more than half of it can't be used, 327 B of 351 B (no text field: 40)" in message
    assert message.endswith(
        "mend or remove these files, or set `allow_partial` of build or curate to use the rest"
    )
    skipped: Counter[str] = Counter()
    read = read_documents([str(tmp_path / "d")], skipped, allow_partial=True)
    assert [document.text for document in read] == ["a short note", "another note"]
    assert skipped == {"no text field": 40}
    write("d/d.txt", "long " * 200)
    assert len(texts(tmp_path / "d")) == 3, "less than half of the bytes"


def test_an_archive_of_which_most_is_broken_stops(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a note")
        archive.writestr("b.txt", b"\xff" * 500)
    assert "a.zip: more than half of it can't be used" in fault(tmp_path / "a.zip")
    assert [document.text for document in read_documents([str(tmp_path / "a.zip")], allow_partial=True)] == [
        "a note"
    ]


def test_files_of_other_kinds_and_broken_links_are_named_and_counted(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.pdf", "c.PDF", "LICENSE"):
        write(f"d/{name}", "x")
    (tmp_path / "d" / "e.txt").symlink_to(tmp_path / "nowhere")
    skipped: Counter[str] = Counter()
    source = str(tmp_path / "d")
    assert [document.text for document in read_documents([source], skipped)] == ["x"]
    assert skipped == {"file of another kind": 3, "cannot be read": 1}
    assert "files of other kinds are not read: 2 .pdf, 1 without suffix" in capsys.readouterr().err
    assert source_fingerprint([source]) and source_bytes([source]) == 1
