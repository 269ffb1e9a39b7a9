"""Minimal pairs as a task: how often a model finds the grammatical sentence the likelier one.

Any local reference is measured, through the engine that also answers with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tercet.data.minimal_pairs import BAD, GOOD, Pair, read_pairs
from tercet.errors import UserError
from tercet.evaluate.statistics import wilson_interval
from tercet.evaluate.task import open_task_file
from tercet.evaluate.task_file import MINIMAL_PAIRS, TaskFile
from tercet.progress import Progress
from tercet.prompt.llm import LLM

CALL = 512  # pairs in one call of the engine: enough to fill its batches, few enough for a bar to move


@dataclass(frozen=True)
class PairTask:
    """Minimal pairs under a name. Make one with ``load``."""

    name: str
    pairs: list[Pair]
    description: str | None = None

    @classmethod
    def load(cls, reference: str | Path | TaskFile) -> Self:
        """The task of a YAML file of ``kind: minimal_pairs``; its paths are relative to the file.

        Raises:
            UserError: one line naming the file, the line or row, and what is wrong with it.
        """
        file = reference if isinstance(reference, TaskFile) else open_task_file(Path(reference))
        if file.kind != MINIMAL_PAIRS:
            raise UserError(f"{file.path} is a task of {file.kind}, not of {MINIMAL_PAIRS}")
        directory, values = file.path.resolve().parent, file.values
        sample = values.get("sample")
        if sample is not None and sample < 1:
            raise UserError(f"{file.at('sample')}: sample is {sample}; it must be 1 or more")
        try:
            pairs = read_pairs(
                [directory / path for path in file.paths()],
                good=values.get("good", GOOD),
                bad=values.get("bad", BAD),
                group=values.get("group"),
                sample=sample,
            )
        except UserError as problem:
            raise UserError(f"{file.at('data')}: {problem}") from problem
        return cls(values.get("name", file.path.stem), pairs, values.get("description"))


@dataclass(frozen=True)
class GroupScore:
    """Accuracy on one group, with its 95% interval (Wilson)."""

    group: str
    pairs: int
    correct: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, group: str, right: Sequence[bool]) -> Self:
        correct = sum(right)
        low, high = wilson_interval(correct, len(right))
        return cls(group, len(right), correct, correct / len(right), low, high)


@dataclass(frozen=True)
class PairResult:
    """One model on one task of minimal pairs. ``score`` is the accuracy over all pairs, 0.5 is chance."""

    task: str
    model: str
    score: float
    low: float  # 95% interval, Wilson
    high: float
    pairs: int
    correct: int
    seconds: float
    pairs_per_second: float
    groups: list[GroupScore]  # in the order of the data

    def to_json(self) -> dict[str, Any]:
        """What ``tercet eval --json`` prints."""
        return {"kind": MINIMAL_PAIRS, "metric": "accuracy", **asdict(self)}


def evaluate_pairs(llm: LLM, task: PairTask) -> PairResult:
    """Accuracy of ``llm`` on all pairs and on each group of them.

    A pair is right where the whole of the grammatical sentence has the higher log-probability
    (Warstadt et al. 2020, arXiv:1912.00582), the first token being predicted from BOS, or from the
    end-of-text token where a tokenizer has no BOS. A tie is wrong.

    Raises:
        UserError: a hosted model; a sentence that is longer than the model's context.
    """
    if not llm.is_local:
        raise UserError(
            f"{llm.name} is hosted, and minimal pairs need the log-probability of every token of given sentences, "
            "the first one too, which servers don't tell; use a model that runs here"
        )
    began = time.monotonic()
    right: dict[str, list[bool]] = {}
    with Progress(f"minimal pairs of {task.name}", len(task.pairs), "pairs") as bar:
        for start in range(0, len(task.pairs), CALL):
            some = task.pairs[start : start + CALL]
            scores = llm.choose([""] * len(some), [[pair.good, pair.bad] for pair in some])
            for pair, (good, bad) in zip(some, scores, strict=True):
                right.setdefault(pair.group, []).append(good > bad)
            bar.advance(len(some))
    seconds = time.monotonic() - began
    every = GroupScore.of("", [one for rows in right.values() for one in rows])
    return PairResult(
        task=task.name,
        model=llm.name,
        score=every.score,
        low=every.low,
        high=every.high,
        pairs=every.pairs,
        correct=every.correct,
        seconds=seconds,
        pairs_per_second=every.pairs / max(seconds, 1e-9),
        groups=[GroupScore.of(group, rows) for group, rows in right.items()],
    )
