"""The climb: every rung of the ladder on one task, measured the same way, and which one is worth it."""

from __future__ import annotations

import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.errors import UserError
from tercet.evaluate.measure import measure
from tercet.evaluate.result import Prediction
from tercet.evaluate.task import Task
from tercet.files import fingerprint, read_json, read_jsonl, write_atomic, write_json, write_jsonl
from tercet.ladder.comparison import add_differences
from tercet.ladder.report import table, write_report
from tercet.ladder.result import Report, RungResult, Step, recommend
from tercet.ladder.rungs.base import Rung, Setting
from tercet.ladder.rungs.baselines import Majority, TfidfLogistic
from tercet.ladder.rungs.prompting import FewShot, ZeroShot
from tercet.ladder.rungs.tuning import Tuned, local_start, untrained
from tercet.ladder.settings import ClimbSettings
from tercet.model.checkpoint import weights_identity
from tercet.progress import duration, say
from tercet.run_directory import open_run
from tercet.settings import keyword_form
from tercet.train.calibrate import use_all_cores

if TYPE_CHECKING:
    from tercet.prompt.llm import LLM


# Shares of the minutes. What is left over goes to the prompting rungs, measuring and the report.
WITHOUT_MODEL = {"base": 0.5, "lora": 0.12, "full": 0.12, "scratch": 0.12}
WITH_MODEL = {"lora": 0.25, "full": 0.25, "base": 0.2, "scratch": 0.1}
# What the other steps take on two cores, roughly; for the time left only.
GUESSED_SECONDS = {"majority": 1, "tfidf": 4, "zero-shot": 15, "few-shot": 40}
# Of the base: a task needs room for its examples.
CONTEXT = 512
EPOCHS = {"lora": 6.0, "full": 6.0, "scratch": 12.0}


@dataclass
class Ladder:
    """The rungs to climb, and where the models on them come from."""

    rungs: dict[str, Callable[[], Rung]]
    minutes: dict[str, float]
    base: Callable[[], Path] | None = None  # builds the base, when no model was given


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
    asked = {
        "task": task.reference or task.name, "definition": task.summary(), "model": llm.name if llm is not None else None,
        "rungs": names, "minutes": minutes, "seed": seed,
    }  # fmt: skip
    key = fingerprint([asked, task.fingerprint, None if llm is None else _identity(llm)])
    with open_run(out, "climb", key, asked):
        begun = time.monotonic()
        _announce(task, out)
        ladder = _ladder(task, llm, names, minutes, seed, out)
        results = _climb_rungs(task, ladder, names, seed, out)
        predictions = {
            result.name: [Prediction.from_json(row) for row in read_jsonl(out / str(result.predictions))]
            for result in results
            if result.ok
        }
        add_differences(results, predictions, task.metric, seed)
        report = _report(task, llm, ladder, results, seed, out)
        inputs = {example.id: task.input_text(example.fields) for example in task.test}
        page = write_report(report, predictions, out, inputs)
        _finish(report, page, time.monotonic() - begun)
    return report


climb = keyword_form(ClimbSettings, climb_with, "climb")


def _announce(task: Task, out: Path) -> None:
    say(
        f"{task.name}: {len(task.train):,} train, {len(task.dev):,} dev, {len(task.test):,} locked test examples; "
        f"metric {task.metric.name}"
    )
    for note in task.notes:
        say(note)
    say(f"writing to {out}; if this is stopped, the same command goes on from there")


def _ladder(
    task: Task, llm: LLM | None, names: Sequence[str], minutes: float, seed: int, out: Path
) -> Ladder:
    """Which model each rung works with, and how many minutes it gets."""
    from tercet.prompt.llm import LLM

    shares = WITHOUT_MODEL if llm is None else WITH_MODEL
    failed: list[str] = []  # why the base could not be built; it is not tried again for every rung

    @cache
    def base() -> Path:
        from tercet.pretrain.pretrain import pretrain
        from tercet.pretrain.settings import BuildSettings

        if failed:
            raise UserError(f"the base could not be built: {failed[0]}")
        try:
            made = pretrain(
                BuildSettings(
                    task.corpus,
                    out / "base",
                    minutes=minutes * shares["base"],
                    context=CONTEXT,
                    seed=seed,
                    exclude=task.test_texts,
                )
            )
        except Exception as problem:
            failed.append(_one_line(problem))
            raise
        return Path(made.model)

    if llm is None:

        def model() -> Any:
            return LLM(str(base()))

        def scratch() -> Path:
            return untrained(base(), out / "rungs" / "scratch" / "start", seed + 1)

        makers: dict[str, Callable[[], Rung]] = {
            "zero-shot": lambda: ZeroShot(cached_model),
            "few-shot": lambda: FewShot(cached_model),
            "lora": lambda: Tuned("lora", base, method="lora", epochs=EPOCHS["lora"]),
            "full": lambda: Tuned("full", base, method="full", epochs=EPOCHS["full"]),
            "scratch": lambda: Tuned(
                "scratch", scratch, method="full", epochs=EPOCHS["scratch"], level="build"
            ),
        }
    else:

        def model() -> Any:
            return llm

        makers = {
            "zero-shot": lambda: ZeroShot(cached_model),
            "few-shot": lambda: FewShot(cached_model),
            "lora": lambda: Tuned("lora", lambda: local_start(llm), method="lora", epochs=3),
            "full": lambda: Tuned("full", lambda: local_start(llm), method="full", epochs=3),
            # Built from scratch: a base from the corpus, then all of its weights tuned on the task.
            "scratch": lambda: Tuned(
                "scratch",
                base,
                method="full",
                epochs=EPOCHS["full"],
                level="build",
            ),
        }
    cached_model = cache(model)
    makers |= {"majority": Majority, "tfidf": TfidfLogistic}
    needs_base = llm is None and any(name not in ("majority", "tfidf") for name in names)
    return Ladder(
        rungs={name: makers[name] for name in names},
        minutes={name: share * minutes for name, share in shares.items()},
        base=base if needs_base else None,
    )


def _climb_rungs(task: Task, ladder: Ladder, names: Sequence[str], seed: int, out: Path) -> list[RungResult]:
    stages = [name for name in names if name in ("majority", "tfidf")]
    stages += ["base"] if ladder.base is not None else []
    stages += [name for name in names if name not in stages]
    guesses = {name: 60 * ladder.minutes.get(name, GUESSED_SECONDS.get(name, 10) / 60) for name in stages}
    results: dict[str, RungResult] = {}
    for number, name in enumerate(stages, start=1):
        left = sum(guesses[stage] for stage in stages[number - 1 :])
        say(f"[{number}/{len(stages)}] {name}: about {duration(left)} left in all")
        if name == "base":
            assert ladder.base is not None
            # The rungs that need it will fail with the same reason; the baselines stand.
            if reason := _attempt(ladder.base):
                say(f"    failed: {reason}")
            else:
                say(f"    {_base(out)}")
            continue
        directory = out / "rungs" / name
        stored = directory / "result.json"
        if stored.is_file():
            results[name] = RungResult.from_json(read_json(stored))
            say(f"    done before: {_score(results[name])}")
            continue
        results[name] = _climb_one(ladder.rungs[name], name, task, ladder, directory, seed, out)
        say(f"    {_score(results[name])}")
        write_jsonl(out / "metrics.jsonl", [result.to_json() for result in results.values()])
    return [results[name] for name in names]


def _attempt(action: Callable[[], Any]) -> str | None:
    """Run ``action``; the reason, in one line, if it fails."""
    try:
        action()
    except Exception as problem:
        return _one_line(problem)
    return None


def _climb_one(
    make: Callable[[], Rung], name: str, task: Task, ladder: Ladder, directory: Path, seed: int, out: Path
) -> RungResult:
    begun = time.monotonic()
    rung = make()
    try:
        use_all_cores()  # for what is scored on dev; training chooses for itself
        setting = Setting(task, directory, seed, ladder.minutes.get(name))
        rung.fit(setting)
        setup = time.monotonic() - begun
        measurement, predictions = measure(rung.name, rung.predict, task, task.test, seed)
        measurement.size_bytes = rung.size_bytes()
        measurement.details = {**rung.details, **measurement.details}
        result = RungResult.measured(rung.level, measurement)
    except Exception as problem:  # one rung's failure must not cost the others
        reason = _one_line(problem)
        if not isinstance(problem, UserError):
            write_atomic(directory / "error.txt", traceback.format_exc())
            reason += f" (details in {directory / 'error.txt'})"
        # Not stored: the same command tries again.
        return RungResult(name, rung.level, "failed", reason=reason, seconds=time.monotonic() - begun)
    # Training of an earlier, killed process counts too.
    result.setup_seconds = round(max(setup, float(rung.details.get("training seconds", 0))), 3)
    result.seconds = round(time.monotonic() - begun, 3)
    result.predictions = str((directory / "predictions.jsonl").relative_to(out))
    write_jsonl(directory / "predictions.jsonl", [prediction.to_json() for prediction in predictions])
    write_json(directory / "result.json", result.to_json())
    return result


def _one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text[:300]}"


def _base_facts(out: Path) -> dict[str, Any]:
    """What the base of this climb turned out to be; nothing where none was built."""
    from tercet.pretrain.result import read_result

    if not (out / "base" / "result.json").is_file():
        return {}
    made = read_result(out / "base" / "result.json")
    return {
        "path": made.model, "parameters": made.parameters, "tokens": made.tokens, "seconds": made.seconds,
        "bits_per_byte": round(made.bits_per_byte, 4), "corpus_bytes": made.corpus.bytes,
        "shortened": made.shortened, "decontamination": made.corpus.decontamination or {},
    }  # fmt: skip


def _base(out: Path) -> str:
    facts = _base_facts(out)
    removed = facts["decontamination"]
    return (
        f"{facts['parameters']:,} parameters, {facts['bits_per_byte']:.3f} bits per byte, {duration(facts['seconds'])}; "
        f"{removed['passages_removed']:,} passages taken out of the corpus, which held {removed['test_examples_found']:,} "
        f"of {removed['test_examples']:,} test examples or near-copies"
    )


def _identity(llm: LLM) -> list[Any]:
    """What decides a given model's answers and their cost, without reading its weights."""
    price = astuple(llm.price) if llm.price else None
    return [None if llm.directory is None else weights_identity(llm.directory), price]


def _score(result: RungResult) -> str:
    if not result.ok:
        return f"failed: {result.reason}"
    return f"{result.score:.3f} (95% {result.low:.3f} to {result.high:.3f}), {duration(result.seconds)}"


def _report(
    task: Task, llm: LLM | None, ladder: Ladder, results: list[RungResult], seed: int, out: Path
) -> Report:
    import sklearn
    import torch

    from tercet import __version__
    from tercet.host import available_cores, processor_name

    recommended, reason = recommend(results)
    base = _base_facts(out) or None
    counts = base.pop("decontamination", {}) if base else {}
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
        notes=[*task.notes, *_cut_short(base, results)],
        next_steps=_next_steps(task, llm, base, results, recommended, out),
    )  # fmt: skip


def _cut_short(base: dict[str, Any] | None, results: list[RungResult]) -> list[str]:
    names = ["base"] if base and base["shortened"] else []
    names += [result.name for result in results if result.details.get("cut short by the clock")]
    if not names:
        return []
    return [
        f"The machine became slower while it trained ({', '.join(names)}), so training ended early to keep to the "
        f"time; a rerun may give other numbers."
    ]


def _next_steps(
    task: Task,
    llm: LLM | None,
    base: dict[str, Any] | None,
    results: list[RungResult],
    recommended: str | None,
    out: Path,
) -> list[Step]:
    steps = []
    if base is not None:
        steps.append(Step("Talk to the model that was just built (a base model: it continues your text)",
                          f"tercet chat {shlex.quote(base['path'])}"))  # fmt: skip
    tuned = {result.name for result in results if result.ok and result.level in ("tune", "build")}
    best = recommended if recommended in tuned else max(
        tuned, key=lambda name: next(r.score or 0 for r in results if r.name == name), default=None
    )  # fmt: skip
    if best is not None:
        run = shlex.quote(str(out / "rungs" / best / "run"))
        example = task.render(task.dev[0].fields) if task.dev else ""
        if 0 < len(example) < 200 and "\n" not in example and not task.system:
            steps.append(Step(f"Ask the tuned model ({best})",
                              f"tercet prompt {run} {shlex.quote(example)} --temperature 0"))  # fmt: skip
        else:
            steps.append(Step(f"Measure the tuned model ({best}) again",
                              f"tercet eval {run} {shlex.quote(_reference(task))}"))  # fmt: skip
    steps.append(
        Step("Climb your own task (CONTRIBUTING.md and examples/ show the file)", "tercet climb TASK.yaml")
    )
    if llm is None:
        steps.append(Step("Climb with a model of yours on the prompt and tune rungs",
                          f"tercet climb {_reference(task)} --model REF"))  # fmt: skip
    return steps


def _reference(task: Task) -> str:
    return task.reference or "TASK.yaml"


def _finish(report: Report, page: Path, seconds: float) -> None:
    from rich.console import Console

    # A log file has no width of its own, and a table must not be cut there.
    Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(table(report))
    say(f"recommended: {report.recommended or 'none'}. {report.reason}")
    say(f"report: {page} ({duration(seconds)})")
    say("next:")
    for step in report.next_steps:
        say(f"  {step.what}:\n    {step.command}")
