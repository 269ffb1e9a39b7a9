"""Report progress on stderr: a bar with rate and remaining time in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


def say(message: str) -> None:
    """Write a line to stderr; standard output is for results."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Format a duration for readers: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds == float("inf"):
        return "unknown time"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds < 2 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return a number of bytes for people, as ``12 kB`` or ``3.4 MB``: decimal units, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


class Progress:
    """The progress of work with a known total.

    Use it as ``with Progress("training", 1000, "tokens") as bar: bar.advance(10)``. Work that ends within
    ``quiet`` seconds shows nothing. Outside a terminal a plain line is written every ``every`` seconds
    instead of a bar, to keep logs readable.

    Args:
        title: the name of the work.
        total: the amount of work, in ``unit``.
        unit: plural of the unit; "steps" if empty.
        done: the amount that an earlier run completed; it does not count in the rate.
        quiet: seconds before anything is shown.
        every: seconds between two plain lines.
    """

    def __init__(
        self,
        title: str,
        total: float,
        unit: str = "",
        *,
        done: float = 0,
        quiet: float = 2,
        every: float = 15,
    ) -> None:
        self.title, self.total, self.unit, self.quiet, self.every = title, total, unit, quiet, every
        self.first = self.completed = float(done)
        self.started = time.monotonic()
        self._last_line = self.started
        self._note = ""
        self._bar: Any = None
        self._task: Any = None
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Add ``amount`` to the completed work; ``note`` (a loss, a score) is shown beside it."""
        self.completed += amount
        if note is not None:
            self._note = note
        now = time.monotonic()
        if now - self.started < self.quiet:
            return
        if self._terminal:
            self._draw()
        elif now - self._last_line >= self.every:
            self._last_line = now
            self._line(now)

    @property
    def left(self) -> float:
        """Remaining seconds at the average rate so far, in which resumed work does not count."""
        elapsed = time.monotonic() - self.started
        rate = (self.completed - self.first) / elapsed if elapsed > 0 else 0.0
        return (self.total - self.completed) / rate if rate > 0 else float("inf")

    def _line(self, now: float) -> None:
        rate = (self.completed - self.first) / max(now - self.started, 1e-9)
        share = 100 * self.completed / max(self.total, 1e-9)
        note = f", {self._note}" if self._note else ""
        say(
            f"{self.title}: {share:.0f}%, {rate:,.0f} {self.unit or 'steps'}/s, {duration(self.left)} left{note}"
        )

    def _draw(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.title, total=self.total, state="")
            self._bar.start()
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = (self.completed - self.first) / elapsed
        state = f"{rate:,.0f} {self.unit or 'steps'}/s, {duration(self.left)} left"
        state += f", {self._note}" if self._note else ""
        self._bar.update(self._task, completed=self.completed, total=self.total, state=state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
