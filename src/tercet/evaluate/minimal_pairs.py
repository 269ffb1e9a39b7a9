"""Minimal pairs as a task: the share of pairs of which a model finds the grammatical sentence likelier.

Any local model can be measured; the engine that generates text also scores the sentences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tercet.data.minimal_pairs import BAD, GOOD, Pair, read_pairs
from tercet.errors import UserError
from tercet.evaluate.language_model import LanguageModel
from tercet.evaluate.statistics import wilson_interval
from tercet.evaluate.task import open_task_file
from tercet.evaluate.task_file import MINIMAL_PAIRS, TaskFile
from tercet.progress import Progress

CALL = 512  # pairs in one call of the engine: fills its batches, and the progress bar still moves


@dataclass(frozen=True)
class PairTask:
    """A named set of minimal pairs. ``load`` makes it from a task file."""

    name: str
    pairs: list[Pair]
    description: str | None = None

    @classmethod
    def load(cls, reference: str | Path | TaskFile) -> Self:
        """Load a YAML file of ``kind: minimal_pairs``; its paths are relative to the file.

        Raises:
            UserError: a mistake in the file or its data; the message names the file and the line or row.
        """
        file = reference if isinstance(reference, TaskFile) else open_task_file(Path(reference))
        if file.kind != MINIMAL_PAIRS:
            raise UserError(f"{file.path} is a task of kind {file.kind}, not {MINIMAL_PAIRS}")
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
    """The accuracy on one group of pairs, with its 95% interval (Wilson)."""

    group: str
    pairs: int
    correct: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, group: str, right: Sequence[bool]) -> Self:
        """Count the correct pairs of a group."""
        correct = sum(right)
        low, high = wilson_interval(correct, len(right))
        return cls(group, len(right), correct, correct / len(right), low, high)


@dataclass(frozen=True)
class PairResult:
    """The result of one model. ``score`` is the accuracy over all pairs; guessing gives 0.5."""

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
        """Return the JSON object that ``tercet eval`` prints."""
        return {"kind": MINIMAL_PAIRS, "metric": "accuracy", **asdict(self)}


def evaluate_pairs(llm: LanguageModel, task: PairTask) -> PairResult:
    """Measure the accuracy of a model on all pairs, and on each group of pairs.

    A pair is correct if the whole grammatical sentence has the higher log-probability (Warstadt et
    al. 2020, arXiv:1912.00582). The first token is predicted from BOS, or from the end-of-text token
    if the tokenizer has no BOS. A tie is wrong.

    Raises:
        UserError: a hosted model; a sentence that is longer than the model's context.
    """
    if not llm.is_local:
        raise UserError(
            f"{llm.name} is hosted, and minimal pairs need the log-probability of every token of a given sentence, "
            "including the first, which servers do not report; use a local model"
        )
    start_time = time.monotonic()
    correct: dict[str, list[bool]] = {}
    with Progress(f"minimal pairs of {task.name}", len(task.pairs), "pairs") as bar:
        for start in range(0, len(task.pairs), CALL):
            batch = task.pairs[start : start + CALL]
            scores = llm.choose([""] * len(batch), [[pair.good, pair.bad] for pair in batch])
            for pair, (good, bad) in zip(batch, scores, strict=True):
                correct.setdefault(pair.group, []).append(good > bad)
            bar.advance(len(batch))
    seconds = time.monotonic() - start_time
    total = GroupScore.of("", [value for values in correct.values() for value in values])
    return PairResult(
        task=task.name,
        model=llm.name,
        score=total.score,
        low=total.low,
        high=total.high,
        pairs=total.pairs,
        correct=total.correct,
        seconds=seconds,
        pairs_per_second=total.pairs / max(seconds, 1e-9),
        groups=[GroupScore.of(group, values) for group, values in correct.items()],
    )
