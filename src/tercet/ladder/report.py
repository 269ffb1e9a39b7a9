"""Write the report of a climb: report.json, and report.html, a page that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tercet.files import read_json, write_atomic, write_json
from tercet.ladder.confusion import Confusion
from tercet.ladder.disagreement import Predictions, disagreements
from tercet.ladder.formats import money, p_value, percent, plain, points, seconds
from tercet.ladder.result import Report, RungResult
from tercet.progress import duration, size

MATRIX_LABELS = 20  # with more, a confusion matrix does not fit a screen, and the labels are listed instead

# What each rung does, in words that follow its name.
DESCRIPTIONS = {
    "majority": "always gives the most frequent answer of the training examples",
    "tfidf": "word statistics (TF-IDF), no language model",
    "nearest": "the answer of the most similar training examples, no language model",
    "zero-shot": "the model with the task's prompt",
    "few-shot": "the model with the prompt and solved examples",
    "lora": "the model with a trained LoRA adapter",
    "full": "the model with all its weights trained on the task",
    "scratch": "a network trained from random weights",
}


def write_report(
    report: Report, predictions: Predictions, directory: str | Path, inputs: Mapping[str, str]
) -> Path:
    """Write ``report.json`` and ``report.html``, and return the path of the page.

    Args:
        report: the content.
        predictions: of each measured rung, by its name.
        directory: to write to.
        inputs: the text to show for each test example, by the example's id.
    """
    directory = Path(directory)
    write_json(directory / "report.json", report.to_json())
    path = directory / "report.html"
    write_atomic(path, page(report, predictions, inputs))
    return path


def read_report(directory: str | Path) -> Report:
    """Read the report in a climb's directory. Raises UserError if there is none or its version differs."""
    return Report.from_json(read_json(Path(directory) / "report.json"))


def page(report: Report, predictions: Predictions, inputs: Mapping[str, str]) -> str:
    """Return the HTML page. It needs no other file, no network and no script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tercet.ladder", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        points=points,
        seconds=seconds,
        size=size,
        money=money,
        p_value=p_value,
        duration=duration,
        count=lambda number: f"{number:,}",
        plain=plain,
    )
    done = [rung for rung in report.rungs if rung.ok]
    recommended_first = sorted(done, key=lambda rung: rung.name != report.recommended)
    return environment.get_template("report.html.jinja").render(
        report=report,
        done=done,
        failed=[rung for rung in report.rungs if not rung.ok],
        chosen=report.rung(report.recommended) if report.recommended else None,
        axis=Axis.over(done),
        descriptions=DESCRIPTIONS,
        matrix_labels=MATRIX_LABELS,
        confusions=[
            (rung, Confusion.of(report.labels, predictions[rung.name]))
            for rung in recommended_first
            if report.labels is not None
        ],
        disagreements=disagreements(report, predictions, inputs),
        tests=list(dict.fromkeys(rung.difference.test for rung in done if rung.difference)),
        is_table=_is_table,
        has_cost=any(rung.cost_per_thousand is not None for rung in done),
    )


def _is_table(value: Any) -> bool:
    """Return whether a detail is a list of rows with the same columns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and list(row) == list(value[0]) for row in value)
    )


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of the interval plot, with round ends and at most six ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, rungs: Sequence[RungResult]) -> Self:
        """Choose an axis that holds the intervals of all rungs."""
        lows = [rung.low for rung in rungs if rung.low is not None]
        highs = [rung.high for rung in rungs if rung.high is not None]
        if not lows or not highs:
            return cls(0.0, 1.0, (0.0, 0.5, 1.0))
        low, high = min(lows), max(highs)
        step = next(step for step in (1, 2, 5, 10, 20) if (high - low) * 100 / step <= 5 or step == 20)
        last = math.ceil(round(100 * high / step, 6))
        first = min(math.floor(round(100 * low / step, 6)), 100 // step - 1)
        ticks = [index * step / 100 for index in range(first, max(last, first + 1) + 1)]
        return cls(ticks[0], ticks[-1], tuple(ticks))

    def at(self, share: float) -> str:
        """Return the position of a score between the ends, as a percentage for SVG."""
        return f"{100 * (share - self.low) / (self.high - self.low):.2f}%"
