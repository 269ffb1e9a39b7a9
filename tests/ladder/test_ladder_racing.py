"""The race of ways to prompt, with contenders whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tercet.evaluate.answer import Answer
from tercet.evaluate.task import Example, Task
from tercet.ladder.rungs.racing import Contender, dev_score, race

ROWS = [{"text": f"{label} {number}", "label": label} for number in range(60) for label in ("yes", "no")]
TASK = Task.from_rows("words", ROWS, prompt="{text}:", target="label", labels=["yes", "no"], dev_size=40)


class Scripted:
    """Answers a share of the examples correctly, by label scores or by text."""

    shots = None

    def __init__(self, share: float, scored: bool = True, bias: float = 0.0) -> None:
        self.share, self.scores_labels, self.bias = share, scored, bias
        self.task, self.llm, self.asked = TASK, Words(), 0

    def prompts(self, examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
        return [TASK.render(example.fields) for example in examples], [False] * len(examples)

    def label_scores(self, examples: Sequence[Example]) -> Any:
        self.asked += len(examples)
        rows = []
        for example in examples:
            right = int(str(example.fields["text"]).split()[1]) / 60 < self.share
            rows.append([1.0 * (right == (label == example.target)) for label in ("yes", "no")])
        return np.array(rows) + np.array([self.bias, 0.0])

    def content_free_scores(self) -> Any:
        return np.array([[self.bias, 0.0]])

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        self.asked += len(examples)
        return [Answer(example.target if self.share > 0.5 else "?") for example in examples]


class Words:
    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())


def contender(name: str, *args: Any) -> Contender:
    return Contender(name, Scripted(*args))  # type: ignore[arg-type]


def test_the_best_contender_wins_and_the_worst_answer_few_examples() -> None:
    contenders = [contender(name, share) for name, share in (("a", 0.5), ("b", 0.9), ("c", 0.3), ("d", 0.7))]
    winner, rows = race(contenders, TASK.dev, tokens=4 * 12 * 5 * 2)
    assert winner.choice == "b"
    seen = {row["choice"]: row["dev examples"] for row in rows}
    assert seen["b"] == seen["d"] > seen["c"] == seen["a"] >= 12


def test_ties_keep_the_earlier_contender_and_the_simplest_calibration() -> None:
    winner, rows = race([contender("default", 0.8), contender("other", 0.8)], TASK.dev, 10_000)
    assert winner.choice == "default"
    assert rows[0]["calibration"] == "none" and rows[0]["dev examples"] == 40


@pytest.mark.parametrize("bias", [5.0, -5.0])
def test_a_preference_for_one_label_is_calibrated_away(bias: float) -> None:
    winner, [row] = race([contender("biased", 1.0, True, bias)], TASK.dev, 10_000)
    score, calibration, offsets = winner.calibrated()
    assert score == 1.0 and calibration != "none" and offsets is not None
    assert row["calibration"] == calibration
    labels = winner.answerer.label_scores(TASK.dev)
    uncalibrated = [("yes", "no")[index] for index in labels.argmax(axis=1)]
    assert dev_score(TASK, TASK.dev, uncalibrated) < 0.7


def test_without_tokens_the_default_does_not_run() -> None:
    contenders = [contender("default", 0.1), contender("better", 1.0)]
    winner, rows = race(contenders, TASK.dev, 0)
    assert winner.choice == "default" and rows == [] and winner.seen == []
    assert all(entry.answerer.asked == 0 for entry in contenders)  # type: ignore[attr-defined]


def test_with_few_tokens_the_last_contenders_do_not_run() -> None:
    contenders = [contender(name, 0.5) for name in "abcdef"]
    _, rows = race(contenders, TASK.dev, 2 * 12 * 5)
    assert [row["choice"] for row in rows] == ["a", "b"]


def test_a_contender_of_an_earlier_race_answers_nothing_twice() -> None:
    first = contender("first", 0.9)
    race([first, contender("second", 0.5)], TASK.dev, 10_000)
    asked = first.answerer.asked  # type: ignore[attr-defined]
    winner, _ = race([first, contender("third", 0.6)], TASK.dev, 10_000)
    assert winner is first and first.answerer.asked == asked == 40  # type: ignore[attr-defined]


def test_generated_answers_race_by_the_metric() -> None:
    winner, rows = race([contender("bad", 0.1, False), contender("good", 0.9, False)], TASK.dev, 10_000)
    assert winner.choice == "good" and "calibration" not in rows[0]
