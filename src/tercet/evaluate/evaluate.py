"""One model on one split of a task: what ``tercet eval`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.data.fewshot import ShotSelector
from tercet.errors import UserError, check_seed
from tercet.evaluate.measure import measure_rung
from tercet.evaluate.minimal_pairs import PairTask
from tercet.evaluate.task import Example, Task, open_task_file
from tercet.evaluate.task_file import MINIMAL_PAIRS
from tercet.ladder.result import Level, RungResult
from tercet.ladder.rungs.base import Answer, directory_size
from tercet.ladder.rungs.prompting import Answerer, as_shots
from tercet.prompt.llm import LLM


class _Given:
    """A model as a rung that needs no fitting."""

    level: Level = "prompt"

    def __init__(self, answerer: Answerer, name: str) -> None:
        self.answerer, self.name = answerer, name
        self.details: dict[str, Any] = {}

    def fit(self, setting: object) -> None:
        """Nothing to do."""

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        return self.answerer.answer(examples)

    def size_bytes(self) -> int | None:
        directory = self.answerer.llm.directory
        return directory_size(directory) if directory is not None else None


def load_task(reference: str | Path) -> Task | PairTask:
    """The task of a YAML file, of whatever kind, or of ``builtin:NAME``. Raises UserError as these do."""
    if str(reference).startswith("builtin:"):
        return Task.load(reference)
    if open_task_file(Path(reference)).kind == MINIMAL_PAIRS:
        return PairTask.load(reference)
    return Task.load(reference)


def run_lm_eval(reference: str, tasks: Sequence[str], quantize: str | None, **options: Any) -> dict[str, Any]:
    """`tercet.evaluate.lm_eval.evaluate_lm_eval` for a reference. UserError where the harness isn't installed."""
    try:
        from tercet.evaluate.lm_eval import evaluate_lm_eval, load_local
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] == "tercet":
            raise
        raise UserError(
            f"--lm-eval needs lm-evaluation-harness ({problem.name} is not installed): pip install 'tercet[lm-eval]'"
        ) from problem
    return evaluate_lm_eval(load_local(reference, quantize=quantize), tasks, **options)


def evaluate(
    llm: LLM,
    task: Task | str | Path,
    *,
    shots: int = 0,
    split: str = "test",
    tuned: bool | None = None,
    seed: int = 0,
) -> RungResult:
    """Score ``llm`` on a split of ``task``, with ``shots`` examples of train in the prompt.

    tuned: whether it learned to end its answers with a stop token, which is then part of a label's
        score; by default true for the product of a `tune` run.

    Raises:
        UserError: an unknown split, or more shots than there are training examples.
    """
    check_seed(seed)
    if not isinstance(task, Task):
        task = Task.load(task)
    if split not in ("test", "dev"):
        raise UserError(f"--split is {split!r}; it must be test or dev")
    if shots < 0:
        raise UserError(f"--shots is {shots}; it must be 0 or more")
    if tuned is None:
        tuned = llm.directory is not None and _is_tuned(llm.directory)
    chosen = ShotSelector(as_shots(task, task.train), shots, task.labels, seed).choose() if shots else []
    answerer = Answerer(llm, task, shots=chosen, tuned=tuned)
    examples = task.test if split == "test" else task.dev
    if not examples:
        raise UserError(f"the {split} split of {task.name} is empty")
    result, _ = measure_rung(_Given(answerer, f"{shots}-shot"), task, seed, examples)
    result.details |= {
        "model": llm.name,
        "split": split,
        "examples": len(examples),
        "shots": shots,
        "tuned": tuned,
    }
    return result


def _is_tuned(directory: Path) -> bool:
    """Whether the checkpoint is the product of a tune run of ours, which leaves its mark beside it."""
    from tercet.files import read_json

    marker = directory.parent / "run.json"
    return marker.is_file() and read_json(marker).get("command") == "tune"
