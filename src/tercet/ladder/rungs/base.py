"""What a rung is: fit on train and dev, then answer inputs. All rungs are measured the same way."""

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
    """Where and how a rung works."""

    task: Task
    directory: Path  # the rung's own; what it keeps there survives a kill
    seed: int = 0
    minutes: float | None = None  # for training


class Rung(Protocol):
    """One way to solve a task.

    ``fit`` may use train and dev, never test. It finds its own unfinished work in the setting's
    directory. ``predict`` gives one answer an example, in order, and may be called many times.
    """

    name: str
    level: Level

    def fit(self, setting: Setting) -> None: ...

    def predict(self, examples: Sequence[Example]) -> list[Answer]: ...

    def size_bytes(self) -> int | None:
        """What has to be kept on disk to answer; None for a hosted model."""

    @property
    def details(self) -> dict[str, Any]:
        """What the report should tell besides the measurements."""
