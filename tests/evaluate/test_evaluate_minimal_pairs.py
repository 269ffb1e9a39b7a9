"""Minimal pairs as a task: the file, the scores through the engine, and one line for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tercet.data.minimal_pairs import Pair
from tercet.errors import UserError
from tercet.evaluate.evaluate import load_task
from tercet.evaluate.minimal_pairs import GroupScore, PairTask, evaluate_pairs
from tercet.evaluate.task import Task
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tercet.prompt.llm import LLM
from tercet.train.evaluate import pair_accuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "prompt"))  # the directory of tiny_model.py

from tiny_model import CONTEXT, write_model

EXAMPLES = Path(__file__).parents[2] / "examples"
YAML = "kind: minimal_pairs\nname: verbs\ndata: pairs.jsonl\n"
SENTENCES = [
    "the cat sat.",
    "the cat sit.",
    "dogs run",
    "dogs runs",
    "Ünïcode 日本",
    "two",
    "two mats",
    "a",
    "b b b",
]
PAIRS = [
    Pair(good, bad, f"group {n % 3}")
    for n, good in enumerate(SENTENCES)
    for bad in SENTENCES
    if good != bad
]  # fmt: skip


def write(folder: Path, yaml: str = YAML, pairs: list[Pair] = PAIRS) -> Path:
    rows: list[dict[str, Any]] = [
        {"sentence_good": pair.good, "sentence_bad": pair.bad, "UID": pair.group} for pair in pairs
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(yaml, encoding="utf-8")
    return folder / "task.yaml"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, quantize="none", threads=1)


def test_a_task_file(tmp_path: Path) -> None:
    task = load_task(write(tmp_path))
    assert task == PairTask("verbs", PAIRS)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.jsonl").write_text('{"a": "They go.", "b": "They goes.", "c": "agreement"}\n')
    yaml = "kind: minimal_pairs\ndata: [more]\ngood: a\nbad: b\ngroup: c\ndescription: d\nsample: 5\n"
    (tmp_path / "own.yaml").write_text(yaml)
    assert PairTask.load(tmp_path / "own.yaml") == PairTask(
        "own", [Pair("They go.", "They goes.", "agreement")], "d"
    )


def test_a_sample_of_each_group(tmp_path: Path) -> None:
    task = PairTask.load(write(tmp_path, YAML + "sample: 4\n"))
    assert [pair.group for pair in task.pairs].count("group 1") == 4 and len(task.pairs) == 12


def test_the_example_in_this_repository_is_read_up_to_its_data() -> None:
    example = EXAMPLES / "blimp.yaml"
    try:
        assert len(PairTask.load(example).pairs) == 6700
    except UserError as problem:
        assert f"{example}:" in str(problem) and "there is no file or directory" in str(problem)


def test_the_engine_agrees_with_the_network(directory: Path, llm: LLM) -> None:
    task = PairTask("t", PAIRS)
    result = evaluate_pairs(llm, task)
    expected = pair_accuracy(load_model(directory), Tokenizer.load(directory), PAIRS)
    assert result.score == expected["accuracy"] == 0.5 and result.pairs == 72  # both directions of each
    for group in result.groups:
        assert {"accuracy": group.score, "pairs": group.pairs} == expected["groups"][group.group]
    assert len({group.score for group in result.groups}) > 1


def test_a_model_that_transformers_runs_gives_the_same(directory: Path, llm: LLM) -> None:
    task = PairTask("t", PAIRS)
    theirs = evaluate_pairs(LLM(f"transformers:{directory}"), task)
    assert theirs.groups == evaluate_pairs(llm, task).groups


def test_intervals_are_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 gives 0.2553 to 0.3662.
    score = GroupScore.of("g", [True] * 81 + [False] * 182)
    assert (score.correct, score.pairs) == (81, 263)
    assert (score.low, score.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_equal_sentences_are_wrong(llm: LLM) -> None:
    result = evaluate_pairs(llm, PairTask("t", [Pair("the same", "the same", "a")]))
    assert (result.score, result.correct) == (0.0, 0)


def test_a_sentence_longer_than_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(UserError, match=f"has {CONTEXT + 1} tokens; the model takes at most {CONTEXT}"):
        evaluate_pairs(llm, PairTask("t", [Pair("a", "x" * (CONTEXT + 1), "a")]))


def test_hosted_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(UserError, match="openai:gpt is hosted, and minimal pairs need the log-probability"):
        evaluate_pairs(LLM("openai:gpt"), PairTask("t", PAIRS))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (YAML + "sampel: 3\n", r"task\.yaml:4: unknown field 'sampel'; did you mean 'sample'"),
        (YAML + "sample: 0\n", r"task\.yaml:4: sample is 0; it must be 1 or more"),
        (YAML + "sample: many\n", r"task\.yaml:4: sample must be a whole number, not text"),
        (YAML + "group: term\n", r"task\.yaml:3: .*pairs\.jsonl, row 1 has no field 'term'"),
        (YAML + "prompt: '{text}'\n", r"task\.yaml:4: unknown field 'prompt'"),
        ("kind: minimal_pairs\n", "the field 'data' is missing; a task needs data"),
        ("kind: minimal_pairs\ndata: []\n", r"task\.yaml:2: data must be a path or a list of paths"),
        ("kind: minimal_pairs\ndata: [1]\n", r"task\.yaml:2: data must be a path or a list of paths"),
        ("kind: minimal_pairs\ndata: nothing.jsonl\n", r"task\.yaml:2: there is no file or directory"),
        ("kind: pairs\ndata: x\n", r"task\.yaml:1: kind is 'pairs'; it must be examples or minimal_pairs"),
        ("kind:\ndata: x\n", r"task\.yaml:1: kind is None; it must be examples or minimal_pairs"),
        ("kind: [a]\ndata: x\n", r"task\.yaml:1: kind is \['a'\]; it must be examples or minimal_pairs"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(write(tmp_path, yaml))


def test_a_climb_refuses_minimal_pairs_and_names_the_command_for_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"task\.yaml:1: a task of kind minimal_pairs can be measured only by 'tercet eval REF",
    ):
        Task.load(write(tmp_path))


def test_a_file_of_examples_may_name_its_kind(tmp_path: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("ham", "spam")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "task.yaml"
    plain = "data: rows.jsonl\nprompt: '{text}'\ntarget: label\n"
    path.write_text("kind: examples\n" + plain)
    said = load_task(path)
    path.write_text(plain)
    unsaid = load_task(path)
    assert isinstance(said, Task) and isinstance(unsaid, Task) and said.fingerprint == unsaid.fingerprint
    with pytest.raises(UserError, match="is a task of kind examples, not minimal_pairs"):
        PairTask.load(path)
