"""What was chosen for prompting a task: wording, shots and calibration, stored so that it can be used again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import Method, Order, ShotSelector, separator
from tercet.errors import UserError
from tercet.evaluate.answer import Answerer, as_shots
from tercet.evaluate.calibration import Calibration
from tercet.evaluate.language_model import LanguageModel
from tercet.evaluate.result import checked_fields
from tercet.evaluate.task import Task
from tercet.evaluate.wording import Form, Place, Wording
from tercet.files import read_json, write_json

SHOT_SHARE = 0.7  # of the tokens of a prompt that shots may use; the rest is for the input


@dataclass(frozen=True)
class PromptChoices:
    """How a model is asked: the content of ``choices.json`` in the directory of a rung.

    Attributes:
        task: name of the task, for messages.
        form: see `Wording`.
        list_of_labels: see `Wording`.
        shots: number of solved examples; 0: none.
        method: how they are selected; None without shots.
        order: where the nearest stands.
        seed: of a random selection.
        calibration: the name of the correction of label scores.
        labels: of the task, in the order of ``offsets``; None for an open task.
        offsets: added to the log-probability of each label; None: nothing is added.
        tuned: whether the model was tuned on the task.
    """

    FILE: ClassVar[str] = "choices.json"

    task: str
    form: Form
    list_of_labels: Place
    shots: int = 0
    method: Method | None = None
    order: Order = "nearest last"
    seed: int = 0
    calibration: Calibration = "none"
    labels: list[str] | None = None
    offsets: list[float] | None = None
    tuned: bool = False

    @classmethod
    def of(cls, answerer: Answerer, calibration: Calibration) -> Self:
        """Return the choices of an answerer."""
        shots, task = answerer.shots, answerer.task
        return cls(
            task.name,
            answerer.wording.form,
            answerer.wording.labels,
            shots=0 if shots is None else shots.k,
            method=None if shots is None else shots.method,
            order="nearest last" if shots is None else shots.order,
            seed=0 if shots is None else shots.seed,
            calibration=calibration,
            labels=task.labels,
            offsets=None if answerer.offsets is None else list(answerer.offsets),
            tuned=answerer.tuned,
        )

    def answerer(self, llm: LanguageModel, task: Task) -> Answerer:
        """Return what answers a task in this way.

        Raises:
            UserError: the choices are for other labels, or the task has too few training examples.
        """
        if self.labels != task.labels:
            raise UserError(
                f"the choices were made for the labels of {self.task} ({_listed(self.labels)}); "
                f"{task.name} has {_listed(task.labels)}"
            )
        shots = None
        if self.method is not None:
            pool = ShotPool(llm, task).short(self.shots)
            shots = ShotSelector(pool, self.shots, task.labels, self.seed, self.method, self.order, llm.embed)
        wording = Wording(self.form, self.list_of_labels)
        return Answerer(llm, task, shots=shots, wording=wording, offsets=self.offsets, tuned=self.tuned)

    def save(self, path: Path) -> None:
        """Write the choices as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read choices. Raises UserError if the file is missing or holds something else."""
        return cls(**checked_fields(cls, read_json(path), f"choices of a prompt ({path})"))


def _listed(labels: list[str] | None) -> str:
    if labels is None:
        return "no labels"
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


def tuned_choices(llm: LanguageModel, task: Task) -> PromptChoices | None:
    """Return the choices beside a model that a climb has tuned on a task with the same labels; None without any."""
    path = None if llm.directory is None else llm.directory.parent / PromptChoices.FILE
    if path is None or not path.is_file():
        return None
    choices = PromptChoices.load(path)
    return choices if choices.labels == task.labels else None


class ShotPool:
    """The training examples that are short enough to be shots.

    Together the shots use up to `SHOT_SHARE` of the prompt's room. The input has the rest; a longer input is
    shortened and counted.
    """

    def __init__(self, llm: LanguageModel, task: Task) -> None:
        self._shots = as_shots(task, task.train)
        self._room = Answerer(llm, task).room
        self._lengths: list[int] = []
        if self._room is not None:
            self._lengths = [
                llm.count_tokens(shot.input + separator(shot.input) + shot.target + "\n\n")
                for shot in self._shots
            ]

    @property
    def tokens(self) -> int:
        """The tokens of all shots; 0 if the model's context is unknown."""
        return sum(self._lengths)

    def most(self, count: int) -> int:
        """Return the largest number of shots, at most ``count``, with a quarter of the examples short enough."""
        for number in range(count, 1, -1):
            if len(self._fitting(number)) >= max(number, len(self._shots) / 4):
                return number
        return 1

    def short(self, count: int) -> list[Shot]:
        """Return the shots that are short enough to be among ``count``; the shortest quarter if none is."""
        fitting = self._fitting(count)
        if len(fitting) >= count:
            return fitting
        order = sorted(range(len(self._shots)), key=lambda index: (self._lengths[index], index))
        return [self._shots[index] for index in order[: max(count, len(self._shots) // 4)]]

    def _fitting(self, count: int) -> list[Shot]:
        if self._room is None:
            return self._shots
        limit = SHOT_SHARE * self._room / count
        return [shot for shot, length in zip(self._shots, self._lengths, strict=True) if length <= limit]
