"""The types of report.json: the result of each rung, and the report (see docs/report-json.md).

They hold plain values only, so that what is read back equals what was written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, Self, get_args

from tercet.errors import UserError
from tercet.evaluate.result import Measurement, checked_fields

VERSION = 1

Level = Literal["baseline", "prompt", "tune", "build"]
Status = Literal["ok", "failed"]

RULE = (
    "The rungs are compared in order, from the cheapest to the most expensive. The first one is chosen to begin with. "
    "A more expensive rung replaces the chosen one only if it is significantly better on the same test examples: the "
    "95% interval of the difference in score lies above zero, and p is below 0.05. A tie goes to the cheaper rung. "
    "Failed rungs are skipped."
)


@dataclass(frozen=True)
class Difference:
    """The difference in score between a rung and a cheaper one, on the same examples."""

    to: str  # the cheaper rung
    difference: float  # this rung's score minus the cheaper rung's
    low: float  # 95% interval, paired bootstrap
    high: float
    p: float  # two-sided
    test: str  # that p comes from: "McNemar exact" or "paired bootstrap"

    @property
    def better(self) -> bool:
        """Whether the rung is significantly better, as in `RULE`. With few examples the interval alone is too narrow."""
        return self.low > 0 and self.p < 0.05


@dataclass
class RungResult:
    """The result of one rung of the ladder, measured or failed."""

    name: str
    level: Level
    status: Status = "ok"
    reason: str | None = None  # why it failed, in one line
    score: float | None = None
    low: float | None = None  # 95% interval of the score
    high: float | None = None
    differences: list[Difference] = field(default_factory=list)  # to every cheaper rung that is ok
    difference: Difference | None = None  # the one of them to the best cheaper rung
    seconds: float = 0.0  # the whole rung: set-up and predictions
    setup_seconds: float = 0.0  # training, choosing examples, loading
    latency_p50: float | None = None  # seconds of one answer, requested alone
    latency_p95: float | None = None
    prompt_tokens: int = 0  # over all test examples
    completion_tokens: int = 0
    size_bytes: int | None = None  # of the files that answering needs
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
        """Whether the rung was measured."""
        return self.status == "ok"

    @classmethod
    def measured(cls, level: Level, measurement: Measurement) -> Self:
        """Return the result of a rung that succeeded."""
        fields = {entry.name: getattr(measurement, entry.name) for entry in dataclass_fields(measurement)}
        return cls(level=level, **fields)

    def to_json(self) -> dict[str, Any]:
        """Return an entry of ``rungs`` in report.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read an entry of ``rungs`` in report.json. Raises UserError if a field is missing or unknown."""
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
    """A command to try next."""

    what: str  # the command is for
    command: str


@dataclass
class Report:
    """The content of report.json. ``rungs`` are in the order of the ladder, cheapest first."""

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
    decontamination: dict[str, int] = field(default_factory=dict)  # counts by name
    base: dict[str, Any] | None = None  # the base that was built: path, parameters, tokens, bits_per_byte
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    next_steps: list[Step] = field(default_factory=list)
    outlook: list[str] = field(default_factory=list)  # what would change the verdict
    version: int = VERSION

    def rung(self, name: str) -> RungResult:
        """Return the rung of that name. Raises UserError if there is none."""
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise UserError(
            f"the report has no rung {name!r}; it has {', '.join(rung.name for rung in self.rungs)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of report.json, ``version`` first."""
        value = asdict(self)
        return {"version": value.pop("version"), **value}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the content of report.json.

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


def failure_reason(problem: Exception) -> str:
    """Return the reason why a rung failed, in one line."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text[:300]}"
