"""The records that measuring a model produces.

They hold plain values only, so that what is read back from JSON equals what was written.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self

from tercet.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """The answer to one example, with its score: a row of predictions.jsonl (see docs/report-json.md)."""

    id: str  # of the example
    text: str
    target: str
    score: float  # of this answer alone, 0 to 1
    tokens: int = 0  # prompt and completion together; 0 without a language model
    seconds: float = 0.0
    cost: float | None = None  # USD; None if the price is unknown

    def to_json(self) -> dict[str, Any]:
        """Return a row of predictions.jsonl."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read a row of predictions.jsonl. Raises UserError if a field is missing or unknown."""
        return cls(**checked_fields(cls, row, "a prediction"))


@dataclass
class Measurement:
    """The score, speed, size and cost of one way to answer a task."""

    name: str  # of the rung, or "3-shot"
    score: float
    low: float  # 95% interval of the score
    high: float
    latency_p50: float  # seconds of one answer, requested alone
    latency_p95: float
    prompt_tokens: int  # over all examples
    completion_tokens: int
    cost_per_thousand: float | None = None  # USD for 1,000 answers; None if the price is unknown
    size_bytes: int | None = None  # of the files that answering needs; None for a hosted model
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``tercet eval`` prints: an entry of ``rungs`` in report.json.

        The fields of training and of comparisons between rungs hold their defaults.
        """
        return {
            "name": self.name, "level": "prompt", "status": "ok", "reason": None,
            "score": self.score, "low": self.low, "high": self.high, "differences": [], "difference": None,
            "seconds": 0.0, "setup_seconds": 0.0, "latency_p50": self.latency_p50, "latency_p95": self.latency_p95,
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "size_bytes": self.size_bytes, "cost_per_thousand": self.cost_per_thousand,
            "predictions": None, "details": self.details,
        }  # fmt: skip


def checked_fields(kind: type[Any], value: Any, noun: str) -> dict[str, Any]:
    """Return a copy of a JSON object whose keys are the fields of a dataclass.

    Args:
        kind: the dataclass.
        value: the object.
        noun: what the object should be, for error messages.

    Raises:
        UserError: not an object, an unknown field, or a field without a default that is missing.
    """
    if not isinstance(value, dict):
        raise UserError(f"not {noun}: it must be an object, not {type(value).__name__}")
    known = {entry.name: entry for entry in fields(kind)}
    for key in value:
        if key not in known:
            raise UserError(f"not {noun}: unknown field {key!r}")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"not {noun}: it has no field {name!r}")
    return dict(value)
