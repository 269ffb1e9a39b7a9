"""The whole ladder on a small task: measurements, failures, resuming after a kill, repeatable numbers."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score

import forked
from tercet.errors import UserError
from tercet.evaluate.answer import Answerer, nearest_label
from tercet.evaluate.evaluate import evaluate
from tercet.evaluate.task import Task
from tercet.ladder.climb import climb
from tercet.ladder.report import read_report
from tercet.ladder.rungs import tuning
from tercet.ladder.rungs.prompting import FewShot
from tercet.ladder.rungs.rung import Setting
from tercet.ladder.settings import LADDER
from tercet.model.tokenizer import Tokenizer
from tercet.prompt.llm import LLM

pytestmark = pytest.mark.long

KINDS = {
    "fruit": ["apple", "pear", "plum"],
    "tool": ["saw", "hammer", "drill"],
    "bird": ["robin", "owl", "wren"],
}
FILLER = ["old", "new", "big", "little", "grey", "bright", "heavy", "light", "my", "your", "their", "one"]


def sentence(rng: np.random.Generator, label: str) -> str:
    words = [*rng.choice(FILLER, 5), rng.choice(KINDS[label]), *rng.choice(FILLER, 4)]
    return " ".join(words)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task file and a corpus that contains the task's texts, including test examples."""
    directory = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(0)
    rows = [(label, sentence(rng, label)) for label in KINDS for _ in range(90)]
    (directory / "rows.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    corpus = [text for _, text in rows] + [sentence(rng, label) + "." for label in KINDS for _ in range(600)]
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    (directory / "task.yaml").write_text(
        "name: things\ndata: {path: rows.tsv, columns: [label, text]}\nprompt: '{text} is a'\ntarget: label\n"
        f"labels: [fruit, tool, bird]\nfew_shot: 3\ncorpus: {directory / 'corpus.jsonl'}\n"
    )
    return directory


MINUTES = 0.2


@pytest.fixture(scope="module")
def climbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("climbed") / "run"
    climb(files / "task.yaml", minutes=MINUTES, out=out)
    return out


def predictions(out: Path, name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (out / "rungs" / name / "predictions.jsonl").read_text().splitlines()
    ]


def test_every_rung_answers_every_test_example_and_its_score_can_be_recomputed(
    files: Path, climbed: Path
) -> None:
    report = json.loads((climbed / "report.json").read_text())
    task = Task.load(files / "task.yaml")
    targets = {example.id: example.target for example in task.test}
    assert report["version"] == 1
    assert [rung["name"] for rung in report["rungs"]] == list(LADDER)
    for rung in report["rungs"]:
        assert rung["status"] == "ok", rung["reason"]
        rows = predictions(climbed, rung["name"])
        assert {row["id"]: row["target"] for row in rows} == targets
        assert all(row["text"] in KINDS for row in rows), "a closed task is answered with a label"
        assert rung["score"] == accuracy_score([r["target"] for r in rows], [r["text"] for r in rows])
        right = sum(row["target"] == row["text"] for row in rows)
        interval = binomtest(right, len(rows)).proportion_ci(method="wilson")
        assert (rung["low"], rung["high"]) == pytest.approx((interval.low, interval.high))
        assert rung["latency_p95"] >= rung["latency_p50"] > 0


def test_differences_are_paired_and_tested_exactly(climbed: Path) -> None:
    report = json.loads((climbed / "report.json").read_text())
    by_name = {rung["name"]: rung for rung in report["rungs"]}
    full = by_name["full"]["difference"]
    a, b = ([r["score"] for r in predictions(climbed, name)] for name in (full["to"], "full"))
    only_a, only_b = (
        sum(x > y for x, y in zip(a, b, strict=True)),
        sum(y > x for x, y in zip(a, b, strict=True)),
    )
    assert full["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert full["p"] == pytest.approx(expected)
    cheaper = report["rungs"][: LADDER.index("full")]
    assert by_name[full["to"]]["score"] == max(rung["score"] for rung in cheaper)


def test_learning_helps_and_the_report_recommends_a_rung(climbed: Path) -> None:
    report = read_report(climbed)
    scores = {rung.name: rung.score or 0 for rung in report.rungs}
    assert scores["majority"] < 0.5 < scores["tfidf"]
    assert scores["full"] > scores["majority"]
    assert report.recommended is not None and report.reason and report.rule
    assert (climbed / "report.html").stat().st_size > 5000
    assert any("tercet chat" in step.command for step in report.next_steps)


def test_test_examples_are_removed_from_the_corpus_and_counted(files: Path, climbed: Path) -> None:
    report = read_report(climbed)
    test = Task.load(files / "task.yaml").test_texts
    assert report.decontamination["test_examples"] == len(test)
    assert report.decontamination["test_examples_found"] == len(test)
    from tercet.pretrain.corpus import open_stream

    tokenizer = Tokenizer.load(climbed / "base" / "corpus" / "tokenizer")
    stream = open_stream(climbed / "base" / "corpus" / "train.bin", tokenizer.vocab_size)
    text = tokenizer.decode([int(token) for token in stream])
    assert not [example for example in test if example in text]


def test_no_rung_is_trained_on_a_test_example(files: Path, climbed: Path) -> None:
    task = Task.load(files / "task.yaml")
    tokenizer = Tokenizer.load(climbed / "base" / "model")
    trained = {row["prompt"] for row in tuning.training_rows(task, [*task.train, *task.dev], tokenizer, 512)}
    assert not {task.render(example.fields) for example in task.test} & trained
    assert not {e.id for e in task.test} & {e.id for e in (*task.train, *task.dev)}


def test_a_rerun_with_the_same_seed_gives_the_same_numbers(
    files: Path, climbed: Path, tmp_path: Path
) -> None:
    again = climb(files / "task.yaml", minutes=MINUTES, out=tmp_path / "again")
    for rung in again.rungs:
        ours, theirs = predictions(tmp_path / "again", rung.name), predictions(climbed, rung.name)
        assert [row["text"] for row in ours] == [row["text"] for row in theirs], rung.name


def test_a_finished_climb_is_not_repeated(
    files: Path, climbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    climb(files / "task.yaml", minutes=MINUTES, out=climbed)
    assert time.monotonic() - begun < 10
    assert capsys.readouterr().err.count("already measured") == len(LADDER)


def test_a_rung_that_fails_gives_its_reason_and_the_others_are_measured(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, setting: object) -> None:
        raise RuntimeError("out of luck\non two lines")

    monkeypatch.setattr(tuning.Tuned, "fit", broken)
    report = climb(
        files / "task.yaml", rungs=["majority", "tfidf", "lora"], minutes=MINUTES, out=tmp_path / "run"
    )
    assert [(rung.name, rung.status) for rung in report.rungs] == [
        ("majority", "ok"), ("tfidf", "ok"), ("lora", "failed")
    ]  # fmt: skip
    assert report.rungs[2].reason is not None
    assert report.rungs[2].reason.startswith("RuntimeError: out of luck on two lines")
    assert report.recommended == "tfidf"
    monkeypatch.undo()
    # The same command retries failed rungs.
    mended = climb(
        files / "task.yaml", rungs=["majority", "tfidf", "lora"], minutes=MINUTES, out=tmp_path / "run"
    )
    assert mended.rungs[2].status == "ok"


def test_a_given_model_is_used_for_prompting_and_tuning(files: Path, climbed: Path, tmp_path: Path) -> None:
    model = climbed / "base" / "model"
    report = climb(
        files / "task.yaml",
        model=str(model),
        rungs=["zero-shot", "lora"],
        minutes=MINUTES,
        out=tmp_path / "run",
    )
    assert [rung.status for rung in report.rungs] == ["ok", "ok"], [rung.reason for rung in report.rungs]
    assert report.base is None and not (tmp_path / "run" / "base").exists()
    # The same model zero-shot gives the same answers as in the climb that built it.
    same = [row["text"] for row in predictions(climbed, "zero-shot")]
    assert [row["text"] for row in predictions(tmp_path / "run", "zero-shot")] == same


def test_eval_agrees_with_the_climb(files: Path, climbed: Path) -> None:
    report = read_report(climbed)
    result = evaluate(LLM(str(climbed / "rungs" / "full" / "run")), files / "task.yaml")
    assert result.score == report.rung("full").score
    dev = evaluate(LLM(str(climbed / "base" / "model")), files / "task.yaml", split="dev", shots=2)
    assert dev.details["examples"] == len(Task.load(files / "task.yaml").dev)


@pytest.mark.parametrize("name", ["zero-shot", "few-shot"])
def test_the_stored_choices_of_a_rung_give_its_answers_again(files: Path, climbed: Path, name: str) -> None:
    stored = climbed / "rungs" / name / "choices.json"
    llm = LLM(str(climbed / "base" / "model"))
    result = evaluate(llm, files / "task.yaml", choices=stored)
    rung = read_report(climbed).rung(name)
    assert result.score == rung.score
    assert result.details["calibration"] == rung.details["calibration"]
    assert result.details["shots"] == rung.details.get("shots", 0)
    with pytest.raises(UserError, match="leave out one of them"):
        evaluate(llm, files / "task.yaml", shots=2, choices=stored)
    rows = [{"q": f"{n}{label}", "a": label} for n in range(30) for label in "xy"]
    other = Task.from_rows("other", rows, prompt="{q}", target="a", labels=["x", "y"])
    with pytest.raises(UserError, match=r"for the labels of things \(fruit, tool, bird\); other has x, y"):
        evaluate(llm, other, choices=stored)


def test_an_open_task_is_answered_by_generating(tmp_path: Path, climbed: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [{"q": sentence(rng, label), "a": {"kind": label}} for label in KINDS for _ in range(150)]
    task = Task.from_rows("open", rows, prompt="{q} is a", target="a", metric="exact_match")
    report = climb(
        task, model=str(climbed / "base" / "model"), rungs=["majority", "tfidf", "few-shot", "full"],
        minutes=3.0, out=tmp_path / "run",
    )  # fmt: skip
    assert [rung.status for rung in report.rungs] == ["ok"] * 4, [rung.reason for rung in report.rungs]
    rows_out = predictions(tmp_path / "run", "full")
    assert report.rung("full").score == np.mean([row["text"] == row["target"] for row in rows_out])
    assert report.rung("full").score is not None and report.rung("full").score > 0.5  # type: ignore[operator]


SCRIPT = """
import sys
from tercet.train import calibrate
calibrate._measure = lambda *a: calibrate.Speed(3_000.0, "float32", 1)
from tercet.ladder.climb import climb
climb(sys.argv[1], minutes=float(sys.argv[2]), out=sys.argv[3])
"""


def test_a_killed_climb_resumes_and_gives_the_same_numbers(
    files: Path, climbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = (SCRIPT, str(files / "task.yaml"), str(MINUTES), str(out))
    for awaited in ("base/metrics.jsonl", "rungs/lora/run/metrics.jsonl"):
        process = forked.Program(*arguments)
        begun = time.monotonic()
        while time.monotonic() - begun < 60 and process.returncode is None:
            if (out / awaited).is_file():
                time.sleep(0.1)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL, f"no {awaited} came"
    finished = forked.run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert "already measured" in finished.stderr
    for name in LADDER:
        ours, theirs = predictions(out, name), predictions(climbed, name)
        assert [row["text"] for row in ours] == [row["text"] for row in theirs], name


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"rungs": ["zeroshot"]},
            "there is no rung 'zeroshot'; did you mean zero-shot\\? \\(the ladder has majority",
        ),
        ({"rungs": []}, "`rungs` is empty"),
        ({"minutes": 0}, "`minutes` is 0"),
        ({"minutes": float("inf")}, "`minutes` is inf"),
        ({"seed": -1}, "`seed` is -1; it must be from 0 to"),
        ({"model": "nowhere/at/all"}, "no model at nowhere/at/all"),
    ],
)
def test_wrong_settings_are_refused(files: Path, tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        climb(files / "task.yaml", out=tmp_path / "run", **options)


def test_a_directory_of_another_climb_is_refused(files: Path, climbed: Path) -> None:
    with pytest.raises(UserError, match="other data or settings"):
        climb(files / "task.yaml", minutes=MINUTES, seed=5, out=climbed)


def test_a_generated_answer_is_read_as_the_label_it_names() -> None:
    labels = ["internet", "internet protocols", "text"]
    assert nearest_label("Text.", labels) == "text"
    assert nearest_label("It is about internet protocols", labels) == "internet protocols"
    assert nearest_label("text or internet", labels) == "text or internet"
    assert nearest_label("I don't know", ["yes", "no"]) == "I don't know"


def test_a_base_model_that_cannot_be_built_is_tried_once_and_fails_the_rungs_that_need_it(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task.load(files / "task.yaml")
    (tmp_path / "short.txt").write_text("too little text")
    task.corpus = [str(tmp_path / "short.txt")]
    report = climb(task, rungs=["majority", "zero-shot", "full"], minutes=MINUTES, out=tmp_path / "run")
    assert [rung.status for rung in report.rungs] == ["ok", "failed", "failed"]
    assert all("the corpus has" in (rung.reason or "") for rung in report.rungs[1:])
    assert capsys.readouterr().err.count("this machine trains the network at") == 1


def test_long_inputs_are_shortened_in_the_same_way_for_tuning_and_for_answering(climbed: Path) -> None:
    rows = [
        {"q": f"{label} " + "x" * 4000 + f" {n}", "a": label} for n in range(40) for label in ("up", "down")
    ]
    task = Task.from_rows("long", rows, prompt="{q} ->", target="a", labels=["up", "down"])
    llm = LLM(str(climbed / "base" / "model"))
    answerer = Answerer(llm, task, tuned=True)
    answers = answerer.answer(task.test[:3])
    assert all(answer.shortened and answer.prompt_tokens < 512 for answer in answers)
    assert llm.tokenizer is not None
    [row] = tuning.training_rows(task, task.test[:1], llm.tokenizer, 512)
    assert row["prompt"] == answerer.prompts(task.test[:1])[0][0]
    assert " ... " in row["prompt"] and row["prompt"].endswith(" ->")


def test_a_label_that_begins_another_can_win_and_lose(climbed: Path) -> None:
    rows = [
        {"q": f"say {n}", "a": label}
        for n in range(60)
        for label in (["the old"] if n % 2 else ["the old apple"])
    ]
    task = Task.from_rows("prefix", rows, prompt="{q}:", target="a", labels=["the old", "the old apple"])
    llm = LLM(str(climbed / "base" / "model"))
    scores = llm.choose(["one"], [[" the old", " the old apple"]])[0]
    assert scores[0] > scores[1], "without an ending the shorter one always wins"
    ended = Answerer(llm, task).llm.choose(["one"], [[" the old\n", " the old apple\n"]])[0]
    assert Answerer(llm, task).ending == "\n" and ended != scores


def test_shots_leave_room_for_the_query_and_a_long_answer(climbed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [{"q": sentence(rng, label), "a": label} for label in KINDS for _ in range(60)]
    # Up to 400 tokens of answer in a context of 512: forty shots no longer fit beside it.
    task = Task.from_rows("long answers", rows, prompt="{q} is a", target="a", max_tokens=400, few_shot=40)
    rung = FewShot(lambda: LLM(str(climbed / "base" / "model")))
    rung.fit(Setting(task, tmp_path))
    assert 1 <= rung.details["shots"] < 40
    assert not rung.predict(task.test[:2])[0].shortened
