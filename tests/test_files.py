"""Files are complete or absent; a directory belongs to one run and one process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tercet import files
from tercet.errors import UserError
from tercet.files import atomic_directory, locked, read_json, read_jsonl, write_atomic, write_json
from tercet.progress import duration
from tercet.run_directory import open_run


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file.txt: No space left on device"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_directory_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as directory:
        (directory / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_directory(path) as directory:
        (directory / "b").write_text("2")
        raise ZeroDivisionError
    assert [entry.name for entry in path.iterdir()] == ["a"]
    with atomic_directory(path) as directory:
        (directory / "c").write_text("3")
    assert [entry.name for entry in path.iterdir()] == ["c"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    with locked(tmp_path):
        script = (
            "import sys; from tercet.files import locked; from tercet.errors import UserError\n"
            "try:\n  with locked(sys.argv[1]): pass\nexcept UserError as problem: print(problem)"
        )
        second = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert "another tercet process is writing to" in second.stdout
    with locked(tmp_path):
        pass  # the lock ends with the block


def test_a_run_owns_its_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(out, "build", "key", {"minutes": 1}):
        pass
    leftover = out / ".model.0123.tmp"
    leftover.mkdir()
    with open_run(out, "build", "key", {"minutes": 1}):
        assert not leftover.exists(), "the files of a killed process are removed"
    assert "minutes: 1" in (out / "config.yaml").read_text()
    for command, key in (("build", "other"), ("tune", "key")):
        with pytest.raises(UserError, match="other data or settings"), open_run(out, command, key, {}):
            pass
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("mine")
    with (
        pytest.raises(UserError, match="not empty and contains no Tercet run"),
        open_run(foreign, "build", "key", {}),
    ):
        pass
    assert sorted(entry.name for entry in foreign.iterdir()) == [".lock", "chapter.tex"]


def test_a_kill_before_the_first_file_of_a_run_does_not_lock_it_out(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123.tmp").write_text("{")
    with open_run(tmp_path, "build", "key", {}):
        pass


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"a": 1', r"x.jsonl:1 is not valid JSON"),
        (b'{"a": 1}\n[2]\n', r"x.jsonl:2 is a list; each line must be a JSON object"),
        (b'{"a": "\xff"}', r"x.jsonl is not UTF-8 text \(byte 7\)"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=line):
        read_jsonl(tmp_path / "x.jsonl")


def test_json_refuses_infinity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"a": float("inf")})
    write_json(tmp_path / "x.json", {"ä": 0.1})
    assert read_json(tmp_path / "x.json") == {"ä": 0.1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3, "3 s"),
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (3600 * 2 + 300, "2 h 5 min"),
        (float("inf"), "unknown time"),
    ],
)
def test_durations_have_a_readable_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
