"""Plan a climb: the model of each rung, and the time of each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tercet.evaluate.task import Task
from tercet.ladder.base_model import BaseModel
from tercet.ladder.rungs.baselines import Majority, TfidfLogistic
from tercet.ladder.rungs.nearest import Nearest
from tercet.ladder.rungs.prompting import FewShot, ZeroShot
from tercet.ladder.rungs.rung import Rung
from tercet.ladder.rungs.tuning import Tuned, local_start, untrained
from tercet.prompt.llm import LLM

BASELINES = ("majority", "tfidf", "nearest")
BASE = "base"  # the stage that pre-trains the base model

# Shares of the time budget. The rest is for the prompting rungs, measuring and the report.
SHARES_WITHOUT_MODEL = {"base": 0.5, "lora": 0.12, "full": 0.12, "scratch": 0.12}
SHARES_WITH_MODEL = {"lora": 0.25, "full": 0.25, "base": 0.2, "scratch": 0.1}
# Rough seconds of the other stages on two cores, only for the estimate of the remaining time.
TYPICAL_SECONDS = {"majority": 1, "tfidf": 4, "nearest": 3, "zero-shot": 15, "few-shot": 40}
EPOCHS = {"lora": 6.0, "full": 6.0, "scratch": 12.0}
EPOCHS_OF_GIVEN_MODEL = 3  # a pre-trained model needs fewer than a base built in minutes

Makers = dict[str, Callable[[], Rung]]


@dataclass
class Plan:
    """The stages of a climb.

    Attributes:
        rungs: makes each requested rung, in the order of the ladder.
        minutes: time budget of each stage that trains.
        base: the base model to build first; None if a model was given or no rung needs one.
    """

    rungs: Makers
    minutes: dict[str, float]
    base: BaseModel | None = None

    @property
    def stages(self) -> list[str]:
        """The stages in the order in which they run: baselines, base model, other rungs."""
        baselines = [name for name in self.rungs if name in BASELINES]
        others = [name for name in self.rungs if name not in BASELINES]
        return [*baselines, *([BASE] if self.base is not None else []), *others]

    def estimated_seconds(self, stages: Sequence[str]) -> float:
        """Return the seconds that stages take, about."""
        return sum(60 * self.minutes.get(stage, TYPICAL_SECONDS.get(stage, 10) / 60) for stage in stages)


def plan_climb(
    task: Task, llm: LLM | None, names: Sequence[str], minutes: float, seed: int, out: Path
) -> Plan:
    """Plan the requested rungs.

    Args:
        task: to measure.
        llm: the model to prompt and tune; None: a base model is built on the task's corpus.
        names: of the rungs, in the order of the ladder.
        minutes: the time budget of the climb.
        seed: of training.
        out: the run directory of the climb.
    """
    shares = SHARES_WITHOUT_MODEL if llm is None else SHARES_WITH_MODEL
    base = BaseModel(task, out / "base", minutes * shares["base"], seed)
    makers: Makers = {"majority": Majority, "tfidf": TfidfLogistic, "nearest": Nearest}
    makers |= _rungs_on_base(base, seed, out) if llm is None else _rungs_on_model(llm, base)
    needs_base = llm is None and any(name not in BASELINES for name in names)
    return Plan(
        rungs={name: makers[name] for name in names},
        minutes={name: share * minutes for name, share in shares.items()},
        base=base if needs_base else None,
    )


def _rungs_on_base(base: BaseModel, seed: int, out: Path) -> Makers:
    """Return the rungs that prompt and tune the base model; "scratch" tunes its shape with random weights."""

    @cache
    def model() -> LLM:
        return LLM(str(base.directory()))

    def random_start() -> Path:
        return untrained(base.directory(), out / "rungs" / "scratch" / "start", seed + 1)

    return {
        "zero-shot": lambda: ZeroShot(model),
        "few-shot": lambda: FewShot(model),
        "lora": lambda: Tuned("lora", base.directory, method="lora", epochs=EPOCHS["lora"]),
        "full": lambda: Tuned("full", base.directory, method="full", epochs=EPOCHS["full"]),
        "scratch": lambda: Tuned(
            "scratch", random_start, method="full", epochs=EPOCHS["scratch"], level="build"
        ),
    }


def _rungs_on_model(llm: LLM, base: BaseModel) -> Makers:
    """Return the rungs that prompt and tune a given model; "scratch" builds a base model and tunes that."""

    def start() -> Path:
        return local_start(llm)

    return {
        "zero-shot": lambda: ZeroShot(lambda: llm),
        "few-shot": lambda: FewShot(lambda: llm),
        "lora": lambda: Tuned("lora", start, method="lora", epochs=EPOCHS_OF_GIVEN_MODEL),
        "full": lambda: Tuned("full", start, method="full", epochs=EPOCHS_OF_GIVEN_MODEL),
        "scratch": lambda: Tuned(
            "scratch", base.directory, method="full", epochs=EPOCHS["full"], level="build"
        ),
    }
