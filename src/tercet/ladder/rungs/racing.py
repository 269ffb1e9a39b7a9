"""Choose among ways to prompt by their scores on dev: a race in which the slower half drops out of each round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tercet.evaluate.answer import Answerer
from tercet.evaluate.calibration import (
    Calibration,
    Floats,
    batch_offsets,
    contextual_offsets,
    frequency_offsets,
    label_frequencies,
    normalised,
)
from tercet.evaluate.task import Example, Task

FEWEST = 12  # dev examples of the first round; with fewer the choice is luck
MOST = 1_000_000  # dev examples of the first round, where tokens are not limited
SAMPLE = 8  # dev examples whose prompts are counted to estimate a contender's cost


@dataclass
class Contender:
    """A way to prompt, with its results on the dev examples so far.

    Attributes:
        choice: what distinguishes it, for the report.
        answerer: answers in this way, without offsets.
    """

    choice: str
    answerer: Answerer
    seen: list[Example] = field(default_factory=list)
    label_scores: list[Floats] = field(default_factory=list)  # of a closed task whose labels are scored
    answers: list[str] = field(default_factory=list)  # of any other task

    @property
    def task(self) -> Task:
        """The task."""
        return self.answerer.task

    def run(self, examples: Sequence[Example]) -> None:
        """Answer the examples that were not seen yet."""
        new = list(examples)[len(self.seen) :]
        if not new:
            return
        if self.answerer.scores_labels:
            self.label_scores.append(self.answerer.label_scores(new))
        else:
            self.answers += [answer.text for answer in self.answerer.answer(new)]
        self.seen += new

    def calibrated(self, count: int | None = None) -> tuple[float, Calibration, list[float] | None]:
        """Return the best score on the first examples seen, with the calibration that gives it and its offsets.

        Among equal scores the simplest calibration is kept.

        Args:
            count: of the examples; None: all.
        """
        examples = self.seen[:count]
        if not self.answerer.scores_labels:
            return dev_score(self.task, examples, self.answers[:count]), "none", None
        scores = np.concatenate(self.label_scores)[:count]
        shares = normalised(scores)
        labels = self.task.labels or []
        best: tuple[float, Calibration, list[float] | None] = (-1.0, "none", None)
        for name, offsets in self._offsets(scores):
            answers = [labels[index] for index in (shares + offsets).argmax(axis=1)]
            score = dev_score(self.task, examples, answers)
            if score > best[0]:
                best = (score, name, None if name == "none" else offsets.tolist())
        return best

    @cached_property
    def tokens(self) -> float:
        """The tokens that an answer takes: those of the prompt, and of all labels or the longest answer."""
        llm, task = self.answerer.llm, self.task
        prompts, _ = self.answerer.prompts(task.dev[:SAMPLE])
        shots = self.answerer.shots
        shared = 0  # the beginning that all prompts share is computed once
        if shots is not None and shots.fixed:
            shared = sum(llm.count_tokens(shot.input + shot.target) for shot in shots.choose())
        mean = sum(llm.count_tokens(prompt) for prompt in prompts) / len(prompts) - shared
        if self.answerer.scores_labels:
            return mean + sum(llm.count_tokens(label) for label in task.labels or ())
        return mean + task.max_tokens

    def _offsets(self, scores: Floats) -> list[tuple[Calibration, Floats]]:
        """Return the calibrations and their offsets; the inputs seen are the batch."""
        frequencies = label_frequencies(
            [example.target for example in self.task.train], self.task.labels or []
        )
        found: list[tuple[Calibration, Floats]] = [
            ("none", np.zeros(scores.shape[1])),
            ("batch", batch_offsets(scores)),
            ("frequencies", frequency_offsets(scores, frequencies)),
        ]
        shots = self.answerer.shots
        # An input without content has no nearest examples.
        if shots is None or shots.fixed:
            found.append(("contextual", contextual_offsets(self._content_free)))
        return found

    @cached_property
    def _content_free(self) -> Floats:
        return self.answerer.content_free_scores()


def dev_score(task: Task, examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Return the task's metric of answers to examples; 0 for none."""
    if not examples:
        return 0.0
    scores = [
        task.metric.score(answer, example.target, example.fields)
        for answer, example in zip(answers, examples, strict=True)
    ]
    targets = [example.target for example in examples]
    return float(task.metric.aggregate(task.metric.values(answers, targets, scores)))


def race(
    contenders: Sequence[Contender], dev: Sequence[Example], tokens: float
) -> tuple[Contender, list[dict[str, Any]]]:
    """Return the contender with the best dev score, and a row for each contender that ran.

    This is successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all contenders answer some examples,
    the better half answers twice as many, and so on. Among equal scores the earlier contender is kept. Where the
    tokens are too few for `FEWEST` examples each, the last contenders do not run.

    Args:
        contenders: at least one; the first is the default.
        dev: examples to choose on, in random order.
        tokens: that the race may take; with 0 the first contender is returned, and none runs.
    """
    if tokens <= 0:
        return contenders[0], []
    running = list(contenders)
    first = _first_round(running, tokens)
    while len(running) > 1 and first < min(FEWEST, len(dev)):
        running.pop()
        first = _first_round(running, tokens)
    if len(running) == 1 and not running[0].seen and first < FEWEST:
        return running[0], []
    ran = list(running)
    count = min(first, len(dev))
    while True:
        for contender in running:
            contender.run(dev[:count])
        # A contender of an earlier race has seen more, but all are compared on the same examples. The sort is
        # stable, so ties keep their order.
        running.sort(key=lambda contender: -contender.calibrated(count)[0])
        if count >= len(dev) or len(running) <= 2:
            return running[0], [_row(contender) for contender in ran]
        running = running[: math.ceil(len(running) / 2)]
        count = min(2 * count, len(dev))


def _first_round(contenders: Sequence[Contender], tokens: float) -> int:
    """Return the examples of the first round with which the whole race takes about ``tokens``."""
    rounds = max(1, math.ceil(math.log2(len(contenders))))
    # Each later round has half the contenders and as many new examples as there were before.
    work = sum(contender.tokens for contender in contenders) * (1 + (rounds - 1) / 2)
    return int(min(tokens / max(work, 1), MOST))


def _row(contender: Contender) -> dict[str, Any]:
    score, calibration, _ = contender.calibrated()
    row: dict[str, Any] = {
        "choice": contender.choice,
        "dev examples": len(contender.seen),
        "dev score": round(score, 4),
    }
    if contender.answerer.scores_labels:
        row["calibration"] = calibration
    return row
