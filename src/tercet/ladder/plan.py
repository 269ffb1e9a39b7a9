"""Plan a climb: the model of each rung, and how the time is shared, by speeds that are measured before the first rung."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tercet.errors import UserError
from tercet.evaluate.task import Task
from tercet.files import read_json, write_json
from tercet.finetune.estimate import SMALLEST_BATCH, Estimate, estimate
from tercet.finetune.settings import Method
from tercet.ladder.base_model import BaseModel
from tercet.ladder.rungs.baselines import Majority, TfidfLogistic
from tercet.ladder.rungs.nearest import Nearest
from tercet.ladder.rungs.prompting import FewShot, ZeroShot
from tercet.ladder.rungs.rung import Rung
from tercet.ladder.rungs.tuning import Tuned, local_start, training_rows, untrained
from tercet.ladder.speed import PromptCosts
from tercet.model.checkpoint import read_config
from tercet.model.tokenizer import Tokenizer
from tercet.progress import duration
from tercet.prompt.llm import LLM

BASELINES = ("majority", "tfidf", "nearest")
PROMPTED = ("zero-shot", "few-shot")
TRAINED = ("lora", "full", "scratch")
BASE = "base"  # the stage that pre-trains the base model

# Shares of the time that remains after what every rung must do: answer the test examples. A rung that was not
# requested gives its share to the others.
SHARES_WITHOUT_MODEL = {
    "base": 0.5,
    "zero-shot": 0.03,
    "few-shot": 0.08,
    "lora": 0.13,
    "full": 0.13,
    "scratch": 0.13,
}
SHARES_WITH_MODEL = {
    "zero-shot": 0.06,
    "few-shot": 0.14,
    "lora": 0.32,
    "full": 0.22,
    "base": 0.16,
    "scratch": 0.1,
}
LEAST = 0.3  # of the time that is shared, where answering the test examples leaves less
# Rough seconds of stages on two cores that are not measured.
TYPICAL_SECONDS = {"majority": 1.0, "tfidf": 4.0, "nearest": 3.0, "zero-shot": 15.0, "few-shot": 40.0}
LOAD_SECONDS = 5.0  # packing a tuned model's weights for answering
LATENCIES = 30  # single answers that are timed for each rung
UNMEASURED_TOKENS = (
    60_000  # for choices on dev, where the speed is not known; a model built in minutes is small
)
MEASURED_EXAMPLES = 128  # training examples whose mean length is taken for the estimate of training
FEWEST_STEPS = 8  # of training; a model barely changes in fewer
EPOCHS = {"lora": 6.0, "full": 6.0, "scratch": 12.0}
EPOCHS_OF_GIVEN_MODEL = 3  # a pre-trained model needs fewer than a base built in minutes

Makers = dict[str, Callable[[], Rung]]


@dataclass(frozen=True)
class Share:
    """The time of one stage.

    Attributes:
        seconds: of the whole stage, estimated.
        minutes: that training may take; None for a stage that trains nothing.
        tokens: that choices on dev may take.
        answering: seconds of answering the test examples; 0 where that is not measured.
        training: what the minutes are enough for, in words; "" where that is not measured.
        refused: why the rung is not even started; None where it is.
    """

    seconds: float
    minutes: float | None = None
    tokens: int = UNMEASURED_TOKENS
    answering: float = 0.0
    training: str = ""
    refused: str | None = None


@dataclass
class Plan:
    """The stages of a climb.

    Attributes:
        rungs: makes each requested rung, in the order of the ladder.
        shares: the time of each stage.
        base: the base model to build first; None if a model was given or no rung needs one.
        speed: prompt tokens a second; None where it was not measured.
    """

    rungs: Makers
    shares: dict[str, Share] = field(default_factory=dict)
    base: BaseModel | None = None
    speed: float | None = None

    @property
    def stages(self) -> list[str]:
        """The stages in the order in which they run: baselines, base model, other rungs."""
        baselines = [name for name in self.rungs if name in BASELINES]
        others = [name for name in self.rungs if name not in BASELINES]
        return [*baselines, *([BASE] if self.base is not None else []), *others]

    def estimated_seconds(self, stages: Sequence[str]) -> float:
        """Return the seconds that stages take, about."""
        return sum(self.shares[stage].seconds for stage in stages)

    def lines(self, minutes: float) -> list[str]:
        """Return the plan for the terminal: what each stage will do with its time, and what will not fit."""
        known = "" if self.speed is None else f" at {self.speed:,.0f} prompt tokens/s"
        lines = [f"plan for {duration(60 * minutes)}{known}:"]
        for stage in self.stages:
            share = self.shares[stage]
            parts = []
            if share.refused is not None:
                lines.append(f"    {stage}: not run: {share.refused}")
                continue
            if share.minutes is not None:
                detail = f": {share.training}" if share.training else ""
                parts.append(f"training {duration(60 * share.minutes)}{detail}")
            elif stage in PROMPTED and self.speed is not None:
                parts.append(f"choices on dev {duration(share.tokens / self.speed)}")
            if share.answering:
                parts.append(f"answering the test examples {duration(share.answering)}")
            about = duration(share.seconds)
            lines.append(f"    {stage}: {about}{' (' + ', '.join(parts) + ')' if parts else ''}")
        total = self.estimated_seconds(self.stages)
        if total > 60 * minutes * 1.05:
            answering = duration(sum(share.answering for share in self.shares.values()))
            lines.append(
                f"    that is {duration(total)}, {answering} of it to answer the test examples. Fewer rungs, or a "
                "smaller test_size of the task, take less"
            )
        return lines


def plan_climb(
    task: Task, llm: LLM | None, names: Sequence[str], minutes: float, seed: int, out: Path
) -> Plan:
    """Plan the requested rungs. A stored plan is repeated, so that a resumed climb makes the same choices.

    Args:
        task: to measure.
        llm: the model to prompt and tune; None: a base model is built on the task's corpus.
        names: of the rungs, in the order of the ladder.
        minutes: the time budget of the climb.
        seed: of training.
        out: the run directory of the climb, where the plan is stored.
    """
    needs_base = llm is None and any(name not in BASELINES for name in names)
    stages = [*names, BASE] if needs_base or (llm is not None and "scratch" in names) else list(names)
    path = out / "plan.json"
    if path.is_file():
        stored = read_json(path)
        shares = {name: Share(**values) for name, values in stored["shares"].items()}
        speed = stored["prompt_tokens_per_second"]
    else:
        asked = any(name not in BASELINES for name in names)  # otherwise the model is not even loaded
        costs = PromptCosts.measure(llm, task) if llm is not None and llm.is_local and asked else None
        estimates = {} if llm is None else _training_estimates(task, llm, names)
        shares = _shares(task, stages, 60 * minutes, costs, estimates, model_given=llm is not None)
        speed = None if costs is None else costs.speed
        write_json(path, _stored(shares, speed))
    base_minutes = shares[BASE].minutes if BASE in shares else 0.0
    base = BaseModel(task, out / "base", base_minutes or 0.0, seed)
    makers: Makers = {"majority": Majority, "tfidf": TfidfLogistic, "nearest": Nearest}
    makers |= _rungs_on_base(base, seed, out) if llm is None else _rungs_on_model(llm, base)
    return Plan({name: makers[name] for name in names}, shares, base if needs_base else None, speed)


def share_time(
    task: Task, stages: Sequence[str], seconds: float, costs: PromptCosts | None, *, model_given: bool
) -> dict[str, Share]:
    """Share the time of a climb among its stages.

    First comes what must be done: every rung answers the test examples. The rest is for training and for choices
    on dev.

    Args:
        task: to measure.
        stages: requested rungs, and the base.
        seconds: of the climb.
        costs: of prompts to the given model; None: no model was given, or it is hosted.
        model_given: whether the climb measures a given model.
    """
    weights = SHARES_WITH_MODEL if model_given else SHARES_WITHOUT_MODEL
    answers = len(task.test) + LATENCIES
    answering: dict[str, float] = {}
    if costs is not None:
        tokens = {
            "zero-shot": costs.zero_shot,
            "few-shot": costs.few_shot,
            "lora": costs.plain,
            "full": costs.plain,
        }
        answering = {name: answers * count / costs.speed for name, count in tokens.items() if name in stages}
    fixed = sum(answering.values()) + LOAD_SECONDS * sum(name in TRAINED for name in stages)
    fixed += sum(TYPICAL_SECONDS[name] for name in stages if name in BASELINES)
    free = max(seconds - fixed, LEAST * seconds)
    total = sum(weights[name] for name in stages if name in weights)
    shares = {}
    for name in stages:
        own = free * weights[name] / total if name in weights else 0.0
        if name in BASELINES:
            shares[name] = Share(TYPICAL_SECONDS[name])
        elif name in PROMPTED:
            tokens_free = UNMEASURED_TOKENS if costs is None else int(own * costs.speed)
            whole = own + answering[name] if name in answering else max(own, TYPICAL_SECONDS[name])
            shares[name] = Share(whole, tokens=tokens_free, answering=answering.get(name, 0.0))
        else:
            load = LOAD_SECONDS if name in TRAINED and costs is not None else 0.0
            shares[name] = Share(
                own + load + answering.get(name, 0.0), own / 60, answering=answering.get(name, 0.0)
            )
    if model_given and BASE in shares and "scratch" in shares:
        # Built inside the rung that is trained from it.
        shares["scratch"] = _joined(shares["scratch"], shares[BASE])
    return shares


def _training_estimates(task: Task, llm: LLM, names: Sequence[str]) -> dict[str, Estimate]:
    """Measure the training of the rungs that tune a given model. A model that can't be tuned fails in its rung."""
    methods: list[Method] = [method for method in ("lora", "full") if method in names]
    try:
        start = local_start(llm)
        tokenizer, limit = Tokenizer.load(start), read_config(start).max_positions
        step = max(1, len(task.train) // MEASURED_EXAMPLES)
        rows = training_rows(task, task.train[::step], tokenizer, limit)
        return {method: estimate(start, rows, method, examples=len(task.train)) for method in methods}
    except UserError:
        return {}


def _shares(
    task: Task,
    stages: Sequence[str],
    seconds: float,
    costs: PromptCosts | None,
    estimates: Mapping[str, Estimate],
    *,
    model_given: bool,
) -> dict[str, Share]:
    """Share the time, without the rungs whose share is too short for training."""
    shares = share_time(task, stages, seconds, costs, model_given=model_given)
    refused: dict[str, Share] = {}
    for name, measured in estimates.items():
        minutes = shares[name].minutes or 0.0
        steps = measured.steps(minutes, SMALLEST_BATCH)
        if steps < FEWEST_STEPS:
            more = FEWEST_STEPS / max(measured.steps(1000.0, SMALLEST_BATCH), 1) * 1000.0
            reason = (
                f"{duration(60 * minutes)} are enough for {steps} steps of {SMALLEST_BATCH} examples on this machine; "
                f"{FEWEST_STEPS} take {duration(60 * more)}. Give more `minutes`, request fewer `rungs`, or take a "
                "smaller model"
            )
            refused[name] = Share(0.0, refused=reason)
    if refused:
        others = [name for name in stages if name not in refused]
        shares = share_time(task, others, seconds, costs, model_given=model_given) | refused
    for name, measured in estimates.items():
        if name not in refused:
            shares[name] = replace(shares[name], training=_described(measured, shares[name].minutes or 0.0))
    return shares


def _described(measured: Estimate, minutes: float) -> str:
    batch = measured.batch_size(minutes)
    whole = measured.examples * EPOCHS_OF_GIVEN_MODEL / batch
    steps = min(measured.steps(minutes, batch), round(whole))
    epochs = steps * batch / measured.examples
    text = f"{steps} steps of {batch} examples, {epochs:.2g} epochs"
    if steps < round(whole):
        text += f"; {EPOCHS_OF_GIVEN_MODEL} epochs take {duration(60 * measured.minutes(EPOCHS_OF_GIVEN_MODEL, batch))}"
    return text


def _joined(rung: Share, base: Share) -> Share:
    return Share(rung.seconds + base.seconds, rung.minutes, rung.tokens, rung.answering)


def _stored(shares: Mapping[str, Share], speed: float | None) -> dict[str, Any]:
    return {
        "prompt_tokens_per_second": speed,
        "shares": {name: asdict(share) for name, share in shares.items()},
    }


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
