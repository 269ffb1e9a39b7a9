"""The interface of a rung. Every rung is fitted and measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tercet.evaluate.answer import Answer
from tercet.evaluate.task import Example, Task
from tercet.ladder.result import Level


@dataclass
class Setting:
    """The task, directory, seed and time that a rung is fitted with."""

    task: Task
    directory: Path  # for this rung only; files in it survive a kill
    seed: int = 0
    minutes: float | None = None  # for training; None: no limit
    tokens: int = 60_000  # that choices on dev may take, prompts and labels together


class Rung(Protocol):
    """One way to answer a task."""

    name: str
    level: Level

    def fit(self, setting: Setting) -> None:
        """Prepare for answering. Training and dev examples may be used, test examples never.

        Unfinished work in the setting's directory is resumed.
        """

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example, in order. It may be called many times."""

    def size_bytes(self) -> int | None:
        """Return the size of the files that answering needs; None for a hosted model."""

    @property
    def details(self) -> dict[str, Any]:
        """Facts for the report besides the measurements."""
