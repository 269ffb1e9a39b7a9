"""Measure one model on one split of a task: what ``tercet eval`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.data.fewshot import ShotSelector
from tercet.errors import UserError, check_seed
from tercet.evaluate.answer import Answerer, as_shots
from tercet.evaluate.choices import PromptChoices, tuned_choices
from tercet.evaluate.language_model import LanguageModel
from tercet.evaluate.measure import measure
from tercet.evaluate.minimal_pairs import PairTask
from tercet.evaluate.result import Measurement
from tercet.evaluate.task import Task, open_task_file
from tercet.evaluate.task_file import MINIMAL_PAIRS
from tercet.files import read_json


def load_task(reference: str | Path) -> Task | PairTask:
    """Load a task of either kind from a YAML file, or the task ``builtin:NAME``.

    Raises:
        UserError: as ``Task.load`` and ``PairTask.load``.
    """
    if str(reference).startswith("builtin:"):
        return Task.load(reference)
    if open_task_file(Path(reference)).kind == MINIMAL_PAIRS:
        return PairTask.load(reference)
    return Task.load(reference)


def run_lm_eval(reference: str, tasks: Sequence[str], quantize: str | None, **options: Any) -> dict[str, Any]:
    """Run `tercet.evaluate.lm_eval.evaluate_lm_eval` on the model of a reference.

    Raises:
        UserError: lm-evaluation-harness is not installed; a hosted model; as ``evaluate_lm_eval``.
    """
    try:
        from tercet.evaluate.lm_eval import TercetLM, evaluate_lm_eval
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] == "tercet":
            raise
        raise UserError(
            f"`lm_eval` needs lm-evaluation-harness ({problem.name} is not installed): pip install 'tercet[lm-eval]'"
        ) from problem
    return evaluate_lm_eval(TercetLM(reference, quantize=quantize), tasks, **options)


def evaluate(
    llm: LanguageModel,
    task: Task | str | Path,
    *,
    shots: int = 0,
    split: str = "test",
    tuned: bool | None = None,
    seed: int = 0,
    choices: str | Path | None = None,
) -> Measurement:
    """Measure a model on a split of a task.

    Args:
        llm: the model.
        task: a task, or the argument of ``Task.load``.
        shots: solved examples of the training split in the prompt.
        split: "test" or "dev".
        tuned: whether the model learned to end its answers with a stop token, which is then scored
            with a label; None: true for the product of a ``tune`` run.
        seed: of the choice of shots, and of the bootstrap.
        choices: the ``choices.json`` of a climb's rung, with its wording, shots and calibration; None: the default
            prompt, and for a model that a climb has tuned on this task the choices beside it.

    Raises:
        UserError: an unknown or empty split, more shots than there are training examples, or choices that were made
            for another task.
    """
    check_seed(seed)
    if not isinstance(task, Task):
        task = Task.load(task)
    if split not in ("test", "dev"):
        raise UserError(f"`split` is {split!r}; it must be test or dev")
    if shots < 0:
        raise UserError(f"`shots` is {shots}; it must be 0 or more")
    if tuned is None:
        tuned = llm.directory is not None and _is_tuned(llm.directory)
    stored = None if choices is None else PromptChoices.load(Path(choices))
    if tuned and not shots and stored is None:
        stored = tuned_choices(llm, task)
    if stored is not None:
        if shots:
            raise UserError(f"`shots` is {shots}, but `choices` set the shots too; leave out one of them")
        answerer, shots = stored.answerer(llm, task), stored.shots
    else:
        selector = ShotSelector(as_shots(task, task.train), shots, task.labels, seed) if shots else None
        answerer = Answerer(llm, task, shots=selector, tuned=tuned)
    examples = task.test if split == "test" else task.dev
    if not examples:
        raise UserError(f"the {split} split of {task.name} is empty")
    measurement, _ = measure(f"{shots}-shot", answerer.answer, task, examples, seed)
    measurement.size_bytes = answerer.size_bytes()
    measurement.details |= {
        "model": llm.name,
        "split": split,
        "examples": len(examples),
        "shots": shots,
        "tuned": answerer.tuned,
        "wording": str(answerer.wording),
        "calibration": "none" if stored is None else stored.calibration,
    }
    return measurement


def _is_tuned(directory: Path) -> bool:
    """Return whether the run directory around a checkpoint is that of a ``tune`` run."""
    marker = directory.parent / "run.json"
    return marker.is_file() and read_json(marker).get("command") == "tune"
