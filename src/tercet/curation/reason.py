"""The reason for which a rule drops a document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A rule, and the measurement that breaks it."""

    rule: str
    detail: str
