from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_model import write_model

from tercet.cli import main as cli
from tercet.evaluate.statistics import wilson_interval

ROWS = [("dogs run", "dogs runs", "verbs"), ("two mats", "two mat", "nouns"), ("a cat", "a cats", "nouns")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), chat=False))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"sentence_good": good, "sentence_bad": bad, "UID": group} for good, bad, group in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.yaml").write_text("kind: minimal_pairs\ndata: pairs.jsonl\n")
    return str(tmp_path / "pairs.yaml")


def test_minimal_pairs_as_json(model: str, pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", model, pairs, "--quantize", "none", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {key: report[key] for key in ("kind", "metric", "task", "model", "pairs")} == {
        "kind": "minimal_pairs",
        "metric": "accuracy",
        "task": "pairs",
        "model": model,
        "pairs": 3,
    }
    assert [(group["group"], group["pairs"]) for group in report["groups"]] == [("verbs", 1), ("nouns", 2)]
    assert report["score"] == report["correct"] / 3
    assert (report["low"], report["high"]) == wilson_interval(report["correct"], 3)
    assert report["pairs_per_second"] == pytest.approx(3 / report["seconds"])


def test_minimal_pairs_for_people(model: str, pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", model, pairs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].endswith("on 3 minimal pairs")
    assert {line.split()[0] for line in lines[1:]} == {"verbs", "nouns"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "2"], "--shots has no effect on minimal pairs; leave it out"),
        (["--split", "dev"], "--split has no effect on minimal pairs"),
        (["--as-is"], "--tuned has no effect on minimal pairs"),
        (["--seed", "0"], "--seed has no effect on minimal pairs"),
        (["--limit", "3"], "--limit has no effect on a task file"),
        (["--chat-template"], "--chat-template has no effect on a task file"),
        (["--include-path", "."], "--include-path has no effect on a task file"),
        (["--quantize", "int3"], "--quantize is 'int3'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], message: str, model: str, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", model, pairs, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_task_must_be_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", model]) == 2
    assert "TASK is missing; give a YAML file, builtin:docs-routing, or --lm-eval" in capsys.readouterr().err


def test_a_hosted_model_has_no_minimal_pairs(
    pairs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert cli.main(["eval", "openai:gpt", pairs]) == 2
    error = capsys.readouterr().err
    assert "openai:gpt is hosted, and minimal pairs need" in error and error.count("\n") == 1


def test_without_the_harness_the_extra_is_named(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tercet.evaluate.lm_eval", raising=False)
    assert cli.main(["eval", model, "--lm-eval", "arc_easy"]) == 2
    assert "(lm_eval is not installed): pip install 'tercet[lm-eval]'" in capsys.readouterr().err


def test_a_task_of_examples_is_measured_as_before(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(20) for word in ("ham", "spam")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        "data: rows.jsonl\nprompt: '{text}:'\ntarget: label\nlabels: [ham, spam]\n"
    )
    task = str(tmp_path / "task.yaml")
    assert cli.main(["eval", model, task, "--split", "dev", "--shots", "1", "--seed", "3", "--json"]) == 0
    details = json.loads(capsys.readouterr().out)["details"]
    assert (details["split"], details["shots"]) == ("dev", 1)
    assert cli.main(["eval", model, task]) == 0
    assert "latency p50" in capsys.readouterr().out
    assert cli.main(["eval", model, task, "--split", "train"]) == 2
    assert "--split is 'train'; it must be test or dev" in capsys.readouterr().err
