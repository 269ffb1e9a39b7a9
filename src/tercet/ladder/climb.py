"""The climb: measure every rung of the ladder on one task, in the same way, and recommend one."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.errors import UserError
from tercet.evaluate.measure import measure
from tercet.evaluate.result import Prediction
from tercet.evaluate.task import Task
from tercet.files import fingerprint, read_json, read_jsonl, write_atomic, write_json, write_jsonl
from tercet.ladder.base_model import base_facts, describe_base
from tercet.ladder.comparison import add_differences
from tercet.ladder.conclusions import conclude
from tercet.ladder.plan import BASE, Plan, plan_climb
from tercet.ladder.report import write_report
from tercet.ladder.result import Report, RungResult, failure_reason
from tercet.ladder.rungs.rung import Rung, Setting
from tercet.ladder.settings import ClimbSettings
from tercet.ladder.table import table
from tercet.model.checkpoint import weights_identity
from tercet.progress import duration, say
from tercet.run_directory import open_run
from tercet.settings import keyword_form
from tercet.train.calibrate import use_all_cores

if TYPE_CHECKING:
    from tercet.prompt.llm import LLM


def climb_with(settings: ClimbSettings) -> Report:
    """Measure every level on one task and write ``report.html`` and ``report.json`` to ``out``.

    The parameters are the fields of `ClimbSettings`. Training gets most of the time budget. A rung that fails
    is reported, and the climb continues with the next. The same call resumes an interrupted climb.

    Returns:
        The report: scores with intervals, differences between rungs, cost and the recommendation.

    Raises:
        UserError: a wrong task, model or setting.
        KeyboardInterrupt: interrupted; the same call resumes the climb.
    """
    from tercet.prompt.llm import LLM

    task = settings.task if isinstance(settings.task, Task) else Task.load(settings.task)
    names, minutes, seed = settings.rung_names, settings.minutes, settings.seed
    llm = LLM(settings.model) if isinstance(settings.model, str | Path) else settings.model
    out = Path(settings.out) if settings.out is not None else Path("runs") / task.name
    config = {
        "task": task.reference or task.name, "definition": task.summary(), "model": llm.name if llm is not None else None,
        "rungs": names, "minutes": minutes, "seed": seed,
    }  # fmt: skip
    key = fingerprint([config, task.fingerprint, None if llm is None else _identity(llm)])
    with open_run(out, "climb", key, config):
        start = time.monotonic()
        _announce(task, out)
        use_all_cores()
        plan = plan_climb(task, llm, names, minutes, seed, out)
        for line in plan.lines(minutes):
            say(line)
        results = _climb_rungs(task, plan, seed, out)
        predictions = {
            result.name: [Prediction.from_json(row) for row in read_jsonl(out / str(result.predictions))]
            for result in results
            if result.ok
        }
        add_differences(results, predictions, task.metric, seed)
        report = conclude(task, results, model_given=llm is not None, seed=seed, out=out)
        inputs = {example.id: task.input_text(example.fields) for example in task.test}
        page = write_report(report, predictions, out, inputs)
        _say_conclusions(report, page, time.monotonic() - start)
    return report


climb = keyword_form(ClimbSettings, climb_with, "climb")


def _announce(task: Task, out: Path) -> None:
    say(
        f"{task.name}: {len(task.train):,} training, {len(task.dev):,} dev and {len(task.test):,} locked test examples; "
        f"metric {task.metric.name}"
    )
    for note in task.notes:
        say(note)
    say(f"writing to {out}; the same command resumes an interrupted climb")


def _identity(llm: LLM) -> list[Any]:
    """Return what decides a model's answers and their cost, without reading its weights."""
    price = astuple(llm.price) if llm.price else None
    return [None if llm.directory is None else weights_identity(llm.directory), price]


def _climb_rungs(task: Task, plan: Plan, seed: int, out: Path) -> list[RungResult]:
    """Run the stages of a climb and return the results of its rungs. Stored results are not measured again."""
    stages = plan.stages
    results: dict[str, RungResult] = {}
    for index, name in enumerate(stages):
        remaining = duration(plan.estimated_seconds(stages[index:]))
        say(f"[{index + 1}/{len(stages)}] {name}: about {remaining} left for the climb")
        if name == BASE:
            assert plan.base is not None
            # If this fails, the rungs that need the base model fail for the same reason; the baselines do not.
            say(f"    {_built_base(plan.base.directory, out)}")
            continue
        directory = out / "rungs" / name
        stored = directory / "result.json"
        if stored.is_file():
            results[name] = RungResult.from_json(read_json(stored))
            say(f"    already measured: {_score(results[name])}")
            continue
        share = plan.shares[name]
        if share.refused is not None:
            results[name] = RungResult(name, plan.rungs[name]().level, "failed", reason=share.refused)
            say(f"    {_score(results[name])}")
            continue
        setting = Setting(task, directory, seed, share.minutes, share.tokens)
        results[name] = _climb_rung(plan.rungs[name], name, setting, out)
        say(f"    {_score(results[name])}")
        write_jsonl(out / "metrics.jsonl", [result.to_json() for result in results.values()])
    return [results[name] for name in plan.rungs]


def _built_base(build: Callable[[], Path], out: Path) -> str:
    """Build the base model and return a line about it, or about the failure."""
    try:
        build()
    except Exception as problem:
        return f"failed: {failure_reason(problem)}"
    return describe_base(base_facts(out / "base") or {})


def _climb_rung(make: Callable[[], Rung], name: str, setting: Setting, out: Path) -> RungResult:
    """Fit and measure one rung. A failure is a result too, so that the other rungs are still measured."""
    start = time.monotonic()
    rung = make()
    directory = setting.directory
    try:
        use_all_cores()  # for scoring on dev; training chooses its own number
        rung.fit(setting)
        setup = time.monotonic() - start
        measurement, predictions = measure(
            rung.name, rung.predict, setting.task, setting.task.test, setting.seed
        )
        measurement.size_bytes = rung.size_bytes()
        measurement.details = {**rung.details, **measurement.details}
    except Exception as problem:
        reason = failure_reason(problem)
        if not isinstance(problem, UserError):
            write_atomic(directory / "error.txt", traceback.format_exc())
            reason += f" (details in {directory / 'error.txt'})"
        # The result is not stored, so the same command tries this rung again.
        return RungResult(name, rung.level, "failed", reason=reason, seconds=time.monotonic() - start)
    result = RungResult.measured(rung.level, measurement)
    # Training in an earlier, killed process counts too.
    result.setup_seconds = round(max(setup, float(rung.details.get("training seconds", 0))), 3)
    result.seconds = round(time.monotonic() - start, 3)
    result.predictions = str((directory / "predictions.jsonl").relative_to(out))
    write_jsonl(directory / "predictions.jsonl", [prediction.to_json() for prediction in predictions])
    write_json(directory / "result.json", result.to_json())
    return result


def _score(result: RungResult) -> str:
    if not result.ok:
        return f"failed: {result.reason}"
    return (
        f"{result.score:.3f} (95% interval {result.low:.3f} to {result.high:.3f}), {duration(result.seconds)}"
    )


def _say_conclusions(report: Report, page: Path, seconds: float) -> None:
    from rich.console import Console

    # A log file has no width of its own, and the table must not be cut in it.
    Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(table(report))
    say(f"recommended: {report.recommended or 'none'}. {report.reason}")
    for line in report.outlook:
        say(f"what would change it: {line}")
    say(f"report: {page} ({duration(seconds)})")
    say("next:")
    for step in report.next_steps:
        say(f"  {step.what}:\n    {step.command}")
