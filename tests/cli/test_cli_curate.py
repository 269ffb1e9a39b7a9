"""``tercet curate``: its output on both streams, and its error messages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tercet.cli import main as cli


@pytest.fixture(autouse=True)
def with_curate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, "curate"))))


def corpus(name: str, documents: int = 12) -> str:
    generator = random.Random(name)
    texts = [
        " ".join(f"w{number}" for number in generator.sample(range(10**9), 30)) for _ in range(documents)
    ]
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    return name


def curate(*arguments: str) -> int:
    return cli.main(["curate", "--out", "out", "--processes", "1", "--rules", "none", *arguments])


def sources(out: str = "out") -> list[str]:
    return [row["source"] for path in Path(out, "data").iterdir() for row in pq.read_table(path).to_pylist()]


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert curate("--data", corpus("a.jsonl"), "--json") == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert (made["documents_read"], made["documents"], made["dropped"]) == (13, 12, {"exact duplicate": 1})
    assert made["data"] == "out/data"
    assert "12 of 13 documents" in printed.err
    assert "exact duplicate" in printed.err
    assert len(sources()) == 12


def test_without_json_standard_output_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert curate("--data", corpus("a.jsonl")) == 0
    assert capsys.readouterr().out == ""


def test_weights_decontamination_and_near_duplicates_are_passed_on() -> None:
    first, second = corpus("a.jsonl"), corpus("b.jsonl")
    test = json.loads(Path(first).read_text().splitlines()[5])["text"]
    Path("tests.txt").write_text(test + "\n")
    options = ["--data", first, "--data", second, "--weight", "b.jsonl=2", "--decontaminate", "tests.txt"]
    assert curate(*options, "--no-near-duplicates", "--shard-mb", "0.002") == 0
    assert sorted(sources()) == ["a.jsonl"] * 11 + ["b.jsonl"] * 24
    report = json.loads(Path("out/report.json").read_text())
    assert report["near_duplicates"] is None
    assert report["decontamination"]["sets"] == [{"name": "tests.txt", "texts": 1, "found": 1}]
    assert len(report["shards"]) > 2


def test_bands_and_rows_decide_what_is_a_near_duplicate() -> None:
    generator = random.Random(0)
    base = [f"w{number}" for number in generator.sample(range(10**9), 100)]
    texts = [" ".join(base), " ".join([*base[:60], *(f"v{number}" for number in range(40))])]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert curate("--data", "a.jsonl") == 0  # similarity 0.41: found with a chance of 1%
    assert len(sources()) == 2
    options = ["--rules", "none", "--processes", "1", "--bands", "40", "--rows", "2"]
    assert cli.main(["curate", "--data", "a.jsonl", "--out", "two", *options]) == 0
    assert len(sources("two")) == 1  # 1 - (1 - 0.41^2)^40: 99.9%


def test_a_task_gives_its_test_texts() -> None:
    words = ["sun", "moon", "star", "tree", "river", "stone", "cloud", "house", "bird", "road"]
    generator = random.Random(1)
    rows = [{"text": " ".join(generator.choices(words, k=12)), "label": "ab"[n % 2]} for n in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("task.yaml").write_text(
        "name: t\ndata: rows.jsonl\nprompt: 'Label this: {text}'\ntarget: label\nlabels: [a, b]\n"
    )
    from tercet.evaluate.task import Task

    held_out = Task.load("task.yaml").test_texts
    assert held_out
    assert curate("--data", "rows.jsonl", "--decontaminate", "task.yaml", "--no-near-duplicates") == 0
    report = json.loads(Path("out/report.json").read_text())["decontamination"]
    assert report["sets"] == [{"name": "task.yaml", "texts": len(held_out), "found": len(held_out)}]
    left = "\n".join(
        row["text"] for path in Path("out/data").iterdir() for row in pq.read_table(path).to_pylist()
    )
    assert left
    assert not [text for text in held_out if text in left]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nothing"], "there is no file or directory nothing"),
        (["--data", "a.jsonl", "--weight", "a.jsonl"], "SOURCE=FACTOR"),
        (["--data", "a.jsonl", "--weight", "b=2"], "--weight names 'b', which is no source"),
        (["--data", "a.jsonl", "--set", "words"], "NAME=NUMBER"),
        (["--data", "a.jsonl", "--decontaminate", "b.yaml"], "no task file b.yaml"),
        (["--data", "a.jsonl", "--processes", "many"], "--processes"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus("a.jsonl")
    assert curate(*options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
