"""What a climb leaves behind: predictions, one result a rung, the report, and the rule that recommends.

These are the types of ``report.json`` and ``predictions.jsonl`` (see docs/report-json.md). They hold
plain values only, so that what is written and what is read back are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, Self, get_args

from tercet.errors import UserError
from tercet.evaluate.result import Measurement, checked_fields

VERSION = 1

Level = Literal["baseline", "prompt", "tune", "build"]
Status = Literal["ok", "failed"]

RULE = (
    "Walk the ladder from the cheapest rung to the dearest and start with the first. A dearer rung takes the "
    "place of the one held so far only if it is better on the same test examples: the 95% interval of the paired "
    "difference lies above zero and p is below 0.05. A tie goes to the cheaper rung; failed rungs are passed over."
)


@dataclass(frozen=True)
class Difference:
    """How much better a rung is than a cheaper one, on the same examples."""

    to: str  # the cheaper rung
    difference: float  # this rung's score minus the cheaper rung's
    low: float  # 95% interval, paired bootstrap
    high: float
    p: float  # two-sided
    test: str  # which test gave p: "McNemar exact" or "paired bootstrap"

    @property
    def better(self) -> bool:
        """As ``RULE`` means it. With very few examples the interval alone is too easily convinced."""
        return self.low > 0 and self.p < 0.05


@dataclass
class RungResult:
    """One rung of the ladder, measured or failed."""

    name: str
    level: Level
    status: Status = "ok"
    reason: str | None = None  # why it failed, in one line
    score: float | None = None
    low: float | None = None  # 95% interval of the score
    high: float | None = None
    differences: list[Difference] = field(default_factory=list)  # to every cheaper rung that is ok
    difference: Difference | None = None  # the one of them to the best cheaper rung
    seconds: float = 0.0  # the whole rung: setting up and predicting
    setup_seconds: float = 0.0  # training, choosing examples, loading
    latency_p50: float | None = None  # seconds an answer, one at a time
    latency_p95: float | None = None
    prompt_tokens: int = 0  # over all test examples
    completion_tokens: int = 0
    size_bytes: int | None = None  # what has to be kept to answer
    cost_per_thousand: float | None = None  # USD for 1,000 calls
    predictions: str | None = None  # path relative to the report
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"rung {self.name}: level is {self.level!r}, not one of {get_args(Level)}")
        if self.status not in get_args(Status):
            raise ValueError(f"rung {self.name}: status is {self.status!r}, not one of {get_args(Status)}")
        if self.status == "ok" and (self.score is None or self.low is None or self.high is None):
            raise ValueError(f"rung {self.name} is ok but has no score with an interval")
        if self.status == "failed" and not self.reason:
            raise ValueError(f"rung {self.name} failed without a reason")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @classmethod
    def measured(cls, level: Level, measurement: Measurement) -> Self:
        """Return the result of a rung that succeeded."""
        fields = {entry.name: getattr(measurement, entry.name) for entry in dataclass_fields(measurement)}
        return cls(level=level, **fields)

    def to_json(self) -> dict[str, Any]:
        """An entry of ``rungs`` in report.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of ``to_json``. UserError when a field is missing or unknown."""
        known = checked_fields(cls, value, "a rung of a climb report")
        known["differences"] = [_difference(entry) for entry in known.get("differences", [])]
        if known.get("difference") is not None:
            known["difference"] = _difference(known["difference"])
        try:
            return cls(**known)
        except ValueError as problem:
            raise UserError(f"not a climb report: {problem}") from problem


@dataclass(frozen=True)
class Step:
    """Something to try next: what it is for, and the command."""

    what: str
    command: str


@dataclass
class Report:
    """Everything in report.json. ``rungs`` stand in the order of the ladder, cheapest first."""

    task: str
    seed: int
    metric: str
    n_train: int
    n_dev: int
    n_test: int
    rungs: list[RungResult]
    recommended: str | None
    reason: str
    rule: str = RULE
    description: str | None = None
    prompt: str | None = None  # the task's template
    labels: list[str] | None = None  # None: an open task
    decontamination: dict[str, int] = field(default_factory=dict)  # counts, by what was counted
    base: dict[str, Any] | None = None  # the base that was built: path, parameters, tokens, bits_per_byte
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    next_steps: list[Step] = field(default_factory=list)
    version: int = VERSION

    def rung(self, name: str) -> RungResult:
        """The rung of that name. UserError naming those there are."""
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise UserError(
            f"the report has no rung {name!r}; it has {', '.join(rung.name for rung in self.rungs)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The content of report.json, ``version`` first."""
        value = asdict(self)
        return {"version": value.pop("version"), **value}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of ``to_json``.

        Raises:
            UserError: another version, a missing or an unknown field.
        """
        if not isinstance(value, dict) or "version" not in value:
            raise UserError("not a climb report: it has no field 'version'")
        if value["version"] != VERSION:
            raise UserError(
                f"the report is version {value['version']!r}; this Tercet reads version {VERSION}"
            )
        known = checked_fields(cls, value, "a climb report")
        known["rungs"] = [RungResult.from_json(rung) for rung in known["rungs"]]
        known["next_steps"] = [
            Step(**checked_fields(Step, step, "a step of a climb report"))
            for step in known.get("next_steps", [])
        ]
        return cls(**known)


def _difference(value: dict[str, Any]) -> Difference:
    return Difference(**checked_fields(Difference, value, "a difference of a climb report"))


def recommend(rungs: Sequence[RungResult]) -> tuple[str | None, str]:
    """Which rung to use, by ``RULE``, and why in a sentence.

    Everything it needs is in the results (``differences`` to every cheaper rung), so a reader of
    report.json can check it. The choice is made on the test examples: with many rungs in the ladder
    the score of the chosen one is a little optimistic.

    Returns:
        (name, reason); the name is None when no rung succeeded.
    """
    done = [rung for rung in rungs if rung.ok]
    if not done:
        return None, "No rung succeeded, so there is nothing to recommend; each one says why it failed."
    if len(done) == 1:
        only = done[0]
        return (
            only.name,
            f"{only.name} is the only rung that succeeded ({_percent(only)}); nothing stands beside it.",
        )
    choice = done[0]
    step: Difference | None = None
    for rung in done[1:]:
        gain = next((entry for entry in rung.differences if entry.to == choice.name), None)
        if gain is not None and gain.better:
            choice, step = rung, gain
    return choice.name, _reason(done, choice, step)


def _reason(done: list[RungResult], choice: RungResult, step: Difference | None) -> str:
    dearer = done[done.index(choice) + 1 :]
    if step is None:
        opening = f"No other rung is measurably better than {choice.name}, the cheapest ({_percent(choice)})"
        if choice.name == "majority":
            opening += ": nothing here beats always giving the commonest answer"
    else:
        opening = (
            f"{choice.name} scores {_percent(choice)}, {_points(step.difference)} above {step.to} "
            f"(95% interval {100 * step.low:.1f} to {_points(step.high)})"
        )
    if not dearer:
        return opening + "."
    best = max(dearer, key=lambda rung: rung.score or 0.0)
    gap = next((entry for entry in best.differences if entry.to == choice.name), None)
    if step is None or gap is None:
        return opening + "."
    if gap.difference > 0:
        tail = f"the best dearer rung, {best.name}, adds {_points(gap.difference)}, which this test cannot tell from none"
    else:
        tail = "no dearer rung scores higher"
    return f"{opening}; {tail}."


def _percent(rung: RungResult) -> str:
    return f"{100 * (rung.score or 0.0):.1f}%"


def _points(share: float) -> str:
    """A difference of two scores in percentage points, as people say it."""
    return f"{100 * share:.1f} points"
