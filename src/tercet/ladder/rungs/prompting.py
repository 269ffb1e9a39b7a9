"""Rungs that use a model as it is: zero-shot and few-shot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import ShotSelector, separator
from tercet.evaluate.answer import Answer, Answerer, as_shots
from tercet.evaluate.task import Example
from tercet.ladder.result import Level
from tercet.ladder.rungs.base import Setting
from tercet.prompt.llm import LLM

SHOT_DRAWS = 3  # sets of shots that are compared on dev
SHOT_DEV = 60  # dev examples they are compared on


class ZeroShot:
    """The model and the prompt, nothing else."""

    name = "zero-shot"
    level: Level = "prompt"

    def __init__(self, model: Callable[[], LLM]) -> None:
        self._model = model
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        self.answerer = Answerer(self._model(), setting.task)
        how = "labels scored by log-probability" if self.answerer.scores_labels else "generation"
        self.details = {"model": self.answerer.llm.name, "answers by": how}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        return self.answerer.answer(examples)

    def size_bytes(self) -> int | None:
        return self.answerer.size_bytes()


class FewShot(ZeroShot):
    """The model, the prompt and solved examples of train before it.

    Which examples are shown matters more than most think (Lu et al. 2022, arXiv:2104.08786), so a few
    draws are compared on dev.
    """

    name = "few-shot"

    def fit(self, setting: Setting) -> None:
        llm, task = self._model(), setting.task
        train = as_shots(task, task.train)
        count, train = _fitting_shots(Answerer(llm, task), train, min(task.few_shot, len(train)))
        dev = task.dev[:SHOT_DEV]
        best: tuple[float, Answerer] | None = None
        draws = SHOT_DRAWS if llm.is_local else 1  # a hosted model's tokens cost money
        for draw in range(draws):
            shots = ShotSelector(train, count, task.labels, setting.seed + draw).choose()
            answerer = Answerer(llm, task, shots=shots)
            if draws == 1:
                best = (0.0, answerer)
                break
            answers = answerer.answer(dev)
            right = [
                task.metric.score(answer.text, example.target, example.fields)
                for answer, example in zip(answers, dev, strict=True)
            ]
            score = sum(right) / len(right)
            if best is None or score > best[0]:
                best = (score, answerer)
        assert best is not None
        self.answerer = best[1]
        self.details = {"model": llm.name, "shots": count, "draws compared on dev": draws}
        if count < task.few_shot:
            self.details["note"] = f"{task.few_shot} shots were asked for; {count} fit the model's context"


def _fitting_shots(answerer: Answerer, train: list[Shot], wanted: int) -> tuple[int, list[Shot]]:
    """How many shots to show, and those of ``train`` that are short enough for that many to fit.

    Together they take up to 0.7 of what the answer leaves; the query has the rest (longer ones are shortened,
    and counted). Fewer shots are shown rather than only from the shortest quarter of train.
    """
    room = answerer.room
    if room is None:
        return wanted, train
    lengths = [
        answerer.llm.count_tokens(shot.input + separator(shot.input) + shot.target + "\n\n") for shot in train
    ]
    for count in range(wanted, 1, -1):
        fitting = [shot for shot, length in zip(train, lengths, strict=True) if length * count <= 0.7 * room]
        if len(fitting) >= max(count, len(train) / 4):
            return count, fitting
    shortest = sorted(zip(lengths, range(len(train)), strict=True))[: max(1, len(train) // 4)]
    return 1, [train[index] for _, index in shortest]
