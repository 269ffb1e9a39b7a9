"""Turn the results of a climb into its report: recommendation, conditions and next steps."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tercet.evaluate.task import Task
from tercet.host import available_cores, processor_name
from tercet.ladder.base_model import base_facts
from tercet.ladder.outlook import outlook
from tercet.ladder.recommend import recommend
from tercet.ladder.result import Report, RungResult, Step


def conclude(task: Task, results: list[RungResult], *, model_given: bool, seed: int, out: Path) -> Report:
    """Return the report of a climb.

    Args:
        task: that was measured.
        results: of all requested rungs, with their differences, in the order of the ladder.
        model_given: whether the climb measured a given model and not a base model that it built.
        seed: of the climb.
        out: the run directory of the climb.
    """
    import sklearn
    import torch

    from tercet import __version__

    recommended, reason = recommend(results)
    base = base_facts(out / "base")
    counts = base.pop("decontamination") if base else {}
    return Report(
        task=task.name, seed=seed, metric=task.metric.name,
        n_train=len(task.train), n_dev=len(task.dev), n_test=len(task.test),
        rungs=results, recommended=recommended, reason=reason,
        description=task.description, prompt=task.prompt.text, labels=task.labels,
        decontamination={name: value for name, value in counts.items() if isinstance(value, int)},
        base=base,
        machine={"processor": processor_name(), "cores": available_cores(), "system": platform.platform()},
        versions={
            "tercet": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
            "scikit-learn": sklearn.__version__, "numpy": np.__version__,
        },
        notes=[*task.notes, *_shortened_training(base, results)],
        next_steps=_next_steps(task, base, results, recommended, model_given, out),
        outlook=outlook(results, recommended, len(task.test), len(task.train)),
    )  # fmt: skip


def _shortened_training(base: dict[str, Any] | None, results: list[RungResult]) -> list[str]:
    """Return a note if training ended early to keep the time budget."""
    names = ["base"] if base and base["shortened"] else []
    names += [result.name for result in results if result.details.get("shortened by the time limit")]
    if not names:
        return []
    return [
        f"Training ended early to keep the time budget, because the machine became slower ({', '.join(names)}). "
        "Another run may give different numbers."
    ]


def _next_steps(
    task: Task,
    base: dict[str, Any] | None,
    results: list[RungResult],
    recommended: str | None,
    model_given: bool,
    out: Path,
) -> list[Step]:
    steps = []
    reference = shlex.quote(task.reference or "TASK.yaml")
    if base is not None:
        chat = f"tercet chat {shlex.quote(base['path'])}"
        steps.append(Step("Try the base model that this climb built (it continues a text)", chat))
    best = _best_trained(results, recommended)
    if best is not None:
        run = shlex.quote(str(out / "rungs" / best / "run"))
        example = task.render(task.dev[0].fields) if task.dev else ""
        if 0 < len(example) < 200 and "\n" not in example and not task.system:
            prompt = f"tercet prompt {run} {shlex.quote(example)} --temperature 0"
            steps.append(Step(f"Prompt the tuned model ({best})", prompt))
        else:
            evaluation = f"tercet eval {run} {reference}"
            steps.append(Step(f"Measure the tuned model ({best}) again", evaluation))
    own_task = "Measure your own task (docs/climb.md and examples/README.md describe the task file)"
    steps.append(Step(own_task, "tercet climb TASK.yaml"))
    if not model_given:
        with_model = f"tercet climb {reference} --model REF"
        steps.append(Step("Prompt and tune a model of your choice instead of the base model", with_model))
    return steps


def _best_trained(results: list[RungResult], recommended: str | None) -> str | None:
    """Return the name of the recommended rung if it was trained, else of the trained rung with the best score."""
    trained = {
        result.name: result.score or 0
        for result in results
        if result.ok and result.level in ("tune", "build")
    }
    return recommended if recommended in trained else max(trained, key=trained.__getitem__, default=None)
