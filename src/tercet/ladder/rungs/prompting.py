"""Rungs that use a model without changing it: zero-shot and few-shot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import ShotSelector, separator
from tercet.evaluate.answer import Answer, Answerer, as_shots
from tercet.evaluate.task import Example
from tercet.ladder.result import Level
from tercet.ladder.rungs.rung import Setting
from tercet.prompt.llm import LLM

SHOT_DRAWS = 3  # sets of shots that are compared on dev
SHOT_DEV = 60  # dev examples that they are compared on
SHOT_SHARE = 0.7  # of the tokens of a prompt that shots may use; the rest is for the input


class ZeroShot:
    """The model with the task's prompt.

    Args:
        model: returns the model when it is needed.
    """

    name = "zero-shot"
    level: Level = "prompt"

    def __init__(self, model: Callable[[], LLM]) -> None:
        self._model = model
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        """Load the model."""
        self.answerer = Answerer(self._model(), setting.task)
        method = "labels scored by log-probability" if self.answerer.scores_labels else "generation"
        self.details = {"model": self.answerer.llm.name, "answers by": method}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example."""
        return self.answerer.answer(examples)

    def size_bytes(self) -> int | None:
        """Return the size of the model's files; None for a hosted model."""
        return self.answerer.size_bytes()


class FewShot(ZeroShot):
    """The model with the task's prompt, after solved examples of the training split.

    The choice of the examples has a large effect (Lu et al. 2022, arXiv:2104.08786), so a few random
    choices are compared on dev.
    """

    name = "few-shot"

    def fit(self, setting: Setting) -> None:
        """Choose the shots with the best score on dev."""
        llm, task = self._model(), setting.task
        train = as_shots(task, task.train)
        count, train = _fitting_shots(Answerer(llm, task), train, min(task.few_shot, len(train)))
        draws = SHOT_DRAWS if llm.is_local else 1  # a hosted model's tokens cost money
        candidates = [
            Answerer(llm, task, shots=ShotSelector(train, count, task.labels, setting.seed + draw).choose())
            for draw in range(draws)
        ]
        self.answerer = candidates[0]
        if draws > 1:
            scores = [_dev_score(answerer, task.dev[:SHOT_DEV]) for answerer in candidates]
            self.answerer = candidates[max(range(draws), key=scores.__getitem__)]
        self.details = {"model": llm.name, "shots": count, "draws compared on dev": draws}
        if count < task.few_shot:
            self.details["note"] = f"{count} of the {task.few_shot} shots of the task fit the model's context"


def _dev_score(answerer: Answerer, dev: Sequence[Example]) -> float:
    """Return the mean score of the answers to dev examples."""
    scores = [
        answerer.task.metric.score(answer.text, example.target, example.fields)
        for answer, example in zip(answerer.answer(dev), dev, strict=True)
    ]
    return sum(scores) / len(scores)


def _fitting_shots(answerer: Answerer, train: list[Shot], count: int) -> tuple[int, list[Shot]]:
    """Return the number of shots, at most ``count``, and the shots that are short enough for that number.

    Together the shots use up to `SHOT_SHARE` of the prompt's room. The input has the rest; a longer input is
    shortened and counted. The number of shots is reduced until at least a quarter of the training examples is
    short enough.
    """
    room = answerer.room
    if room is None:
        return count, train
    lengths = [
        answerer.llm.count_tokens(shot.input + separator(shot.input) + shot.target + "\n\n") for shot in train
    ]
    for number in range(count, 1, -1):
        fitting = [
            shot for shot, length in zip(train, lengths, strict=True) if length * number <= SHOT_SHARE * room
        ]
        if len(fitting) >= max(number, len(train) / 4):
            return number, fitting
    shortest = sorted(zip(lengths, range(len(train)), strict=True))[: max(1, len(train) // 4)]
    return 1, [train[index] for _, index in shortest]
