"""What a task's author is told: against counts by hand, scikit-learn's vectors and transformers' chat template."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from sklearn.feature_extraction.text import TfidfVectorizer
from tiny_model import CONTEXT, write_model

from tercet.evaluate.task import Task
from tercet.ladder.check import check_task
from tercet.ladder.check_labels import prefix_pairs, token_clashes
from tercet.prompt.llm import LLM

WORDS = "apple pear plum fig saw hammer drill file robin owl wren crow old new big small red grey".split()  # noqa: SIM905


def text(draw: random.Random, length: int = 8) -> str:
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(50)}" for _ in range(length))


def made(**options: Any) -> Task:
    draw = random.Random(0)
    rows = [{"text": text(draw), "kind": ("a", "b", "c")[number % 3]} for number in range(900)]
    return Task.from_rows(
        "kinds", **{"rows": rows, "prompt": "{text}:", "target": "kind", "labels": "auto"} | options
    )


def test_splits_labels_and_the_baseline_are_counted() -> None:
    task = made()
    check = check_task(task)
    assert check.splits == {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)}
    assert check.labels is not None and list(check.labels) == ["a", "b", "c"]
    assert sum(count for counts in check.labels.values() for count in counts.values()) == 900
    assert check.labels["b"]["dev"] == sum(example.target == "b" for example in task.dev)
    top = max("abc", key=lambda label: check.labels[label]["train"])  # type: ignore[index]
    assert check.baseline.answer == top
    assert check.baseline.score == check.baseline.test_share == check.labels[top]["test"] / len(task.test)
    assert [prompt.tokens for prompt in check.prompts] == [None, None, None]
    assert check.model is None
    assert json.loads(json.dumps(check.to_json()))["labels"] == check.labels


def test_near_copies_are_those_of_scikit_learns_vectors() -> None:
    draw = random.Random(1)
    rows = [{"text": text(draw, 20), "kind": draw.choice("ab")} for _ in range(300)]
    test_rows = [{"text": text(draw, 20), "kind": "a"} for _ in range(30)]
    test_rows += [{**row, "text": row["text"].replace("1", "7", 1)} for row in rows[:12]]
    test_rows[-1]["kind"] = "b" if test_rows[-1]["kind"] == "a" else "a"
    task = made(rows=rows, test_rows=test_rows, dev_size=40)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    train = vectorizer.fit_transform([str(example.fields["text"]) for example in task.train])
    nearest = {}
    for split in ("test", "dev"):
        queries = vectorizer.transform([str(example.fields["text"]) for example in getattr(task, split)])
        nearest[split] = (queries @ train.T).toarray().max(axis=1)
    near = check_task(task).near_copies
    assert near.test == (nearest["test"] >= 0.9).sum() > 5
    assert near.dev == (nearest["dev"] >= 0.9).sum() == 0
    assert near.other_target <= 1 and len(near.shown) == 2
    if near.other_target:
        assert not near.shown[0].same_target


def rows_of(*labels: str, count: int = 300, seed: int = 2) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"text": text(draw), "kind": labels[number % len(labels)]} for number in range(count)]


LARGE = {"test_size": 200, "dev_size": 100}


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"test_size": 25}, "The test split has 25 examples: a score near 50% is uncertain by 20 points"),
        ({"dev_size": 10}, "The dev split has 10 examples"),
        (
            {"rows": rows_of(*["ham"] * 9, "spam", count=1000), **LARGE},
            "of the test examples are 'ham': accuracy says little",
        ),
        ({"rows": rows_of("old", "old apple"), "dev_size": 90}, "The label 'old' is the beginning of 'old apple':"),
        ({"rows": rows_of("Yes", "yes", "no"), "dev_size": 90}, "differ only in case or spaces, .*: 'Yes' and 'yes'"),
        ({"rows": rows_of("a", "b\nc"), "dev_size": 90}, r"A label of several lines .*: 'b\\nc'"),
        (
            {"rows": [*rows_of("a", "b"), *rows_of("rare", count=4, seed=3)], "labels": ["a", "b", "rare"], "dev_size": 90},
            "1 label has fewer than 5 training examples: 'rare'",
        ),
        (
            {"rows": rows_of("a", "b", "c"), "test_rows": rows_of("a", "b", count=20, seed=4), "dev_size": 90},
            "1 label has no test example, so no score tells about it: 'c'",
        ),
        (
            {"rows": [{"text": text(random.Random(n)), "kind": f"{n % 40}"} for n in range(120)],
             "labels": [str(n) for n in range(40)]},
            "There are 40 labels for .* training examples: if targets are free text",
        ),
        ({"labels": None}, "only 3 different targets: with labels: auto they become labels"),
        ({"labels": None, "rows": rows_of("a\nb", "c")}, "of 300 targets have several lines"),
    ],
)  # fmt: skip
def test_a_mistake_of_the_task_is_a_warning(options: dict[str, Any], warning: str) -> None:
    assert any(re.search(warning, line) for line in check_task(made(**options)).warnings)


def test_a_sound_task_has_no_warning() -> None:
    draw = random.Random(3)
    rows = [{"text": text(draw), "kind": draw.choice(["fruit", "tool", "bird"])} for _ in range(2000)]
    assert check_task(made(rows=rows)).warnings == []


def test_beginnings_and_shared_tokens_of_labels() -> None:
    assert prefix_pairs(["b", "internet protocols", "a", "internet", "intern"]) == [
        ("intern", "internet"), ("intern", "internet protocols"), ("internet", "internet protocols")
    ]  # fmt: skip
    tokens = [("a x", [1, 2]), ("a y", [1, 3]), ("b", [1]), ("c", [2]), ("a x y", [1, 2, 3])]
    assert token_clashes(tokens) == [("a x", "a y")]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat=True)


def lengths_task(lengths: list[int], **options: Any) -> Task:
    """A task whose inputs have these lengths in bytes, which are tokens of the tiny model."""
    rows = [
        {"text": f"{number:03d}" + "x" * (length - 3), "kind": "ab"[number % 2]}
        for number, length in enumerate(lengths)
    ]
    return made(rows=rows, prompt="{text}", **options)


def test_prompts_are_those_of_transformers_template(chat_model: Path) -> None:
    task = lengths_task([10, 11, 12, 13] * 30, few_shot=2, system="Be brief")
    check = check_task(task, chat_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    median, few, longest = check.prompts
    assert "zero-shot" in median.title and "2 shots" in few.title and "longest" in longest.title
    for prompt in (median, longest):
        [example] = [example for example in task.test if example.fields["text"] in prompt.text]
        messages = [
            {"role": "system", "content": "Be brief"}, {"role": "user", "content": example.fields["text"]}
        ]  # fmt: skip
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.text == expected and prompt.target == example.target
        assert prompt.tokens == len(tokenizer(expected, add_special_tokens=False).input_ids)
    assert few.text.count("<|user|>") == 3 and few.text.endswith(median.text.split("<|user|>")[1])
    assert check.model is not None and check.model.longest == longest.tokens


def test_what_does_not_fit_is_counted(chat_model: Path) -> None:
    # A chat of one message is the text, <s>, <|user|>, <|end|> and <|assistant|>. An answer of a letter keeps 1 + 4 + 1.
    overhead, answer = 4, 6
    room = CONTEXT - answer - 1
    lengths = [20] * 60 + [room - overhead, room - overhead + 1, 200] * 20
    task = lengths_task(lengths, few_shot=4, labels=["a", "b"])
    check = check_task(task, chat_model)
    model = check.model
    assert model is not None and model.context == CONTEXT
    too_long = sum(len(example.fields["text"]) > room - overhead for example in task.test)
    assert model.shortened["zero-shot"] == too_long > 0
    assert model.longest == 200 + overhead
    # A shot of 20 bytes, a space, a letter and two line breaks takes 24 tokens and <s>; shots have 70% of the room.
    assert model.shots == 4 and model.shots_that_fit == int(0.7 * room / 25) == 2
    assert "2 of 4 shots fit the context of 96 tokens." in " ".join(check.warnings)
    assert f"{too_long} of {len(task.test)} test inputs do not fit the context of 96 tokens" in " ".join(
        check.warnings
    )
    assert check.prompts[-1].shortened and check.prompts[-1].tokens is not None
    assert check.prompts[-1].tokens <= room


def test_a_prompt_that_cannot_fit_is_told_and_the_rest_is_checked(chat_model: Path) -> None:
    task = lengths_task([20] * 120, system="long " * 40, labels=["a", "b"])
    check = check_task(task, chat_model)
    assert any("zero-shot will fail: the prompt does not fit" in warning for warning in check.warnings)
    assert check.model is not None and check.model.prompting == []
    assert check.model.not_tunable is not None and "does not fit" in check.model.not_tunable
    assert check.splits["train"] == len(task.train)


def test_costs_are_measured_and_training_tokens_counted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "base", chat=False)
    task = lengths_task([20] * 120, few_shot=2, labels=["a", "b"])
    check = check_task(task, LLM(str(model))).model
    assert check is not None and check.not_tunable is None
    assert [cost.rung for cost in check.prompting] == ["zero-shot", "few-shot"]
    for cost in check.prompting:
        assert cost.answers == len(task.test) and cost.dollars is None
        assert cost.seconds is not None and cost.seconds > 0
        assert cost.tokens_per_second is not None and cost.tokens_per_second > 0
    # <s>, 20 bytes, a space and the label's letter.
    assert check.tokens_per_epoch == 23 * len(task.train)
    assert set(check.minutes_per_epoch) == {"lora", "full"} and min(check.minutes_per_epoch.values()) > 0
    assert check.same_but_last == [("a", "b")]  # each a space and a letter
