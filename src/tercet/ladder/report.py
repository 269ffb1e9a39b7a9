"""The pages a climb leaves: report.json, a self-contained report.html, and a table for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.evaluate.result import Prediction
from tercet.files import read_json, write_atomic, write_json
from tercet.ladder.result import Report, RungResult
from tercet.progress import duration, size

if TYPE_CHECKING:
    from rich.table import Table

DISAGREEMENTS = 30  # examples shown; a reader rarely gets through more
MATRIX_LABELS = 20  # above, a matrix no longer fits a screen and the labels are listed instead
_SHOWN = 700  # characters of an input or an answer

Predictions = Mapping[str, Sequence[Prediction]]


def write_report(
    report: Report, predictions: Predictions, directory: str | Path, inputs: Mapping[str, str]
) -> Path:
    """Write ``report.json`` and ``report.html``; the path of the page is returned.

    Args:
        predictions: of every rung that is ok, by its name.
        inputs: what is shown as the input of each test example, by the example's id.
    """
    directory = Path(directory)
    write_json(directory / "report.json", report.to_json())
    path = directory / "report.html"
    write_atomic(path, page(report, predictions, inputs))
    return path


def read_report(directory: str | Path) -> Report:
    """The report of a climb's directory. UserError when there is none or it is of another version."""
    return Report.from_json(read_json(Path(directory) / "report.json"))


def page(report: Report, predictions: Predictions, inputs: Mapping[str, str]) -> str:
    """The HTML page. It needs no other file, no network and no script."""
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
        plain=_plain,
    )
    done = [rung for rung in report.rungs if rung.ok]
    order = sorted(done, key=lambda rung: rung.name != report.recommended)  # the recommended one first
    return environment.get_template("report.html.jinja").render(
        report=report,
        done=done,
        failed=[rung for rung in report.rungs if not rung.ok],
        chosen=report.rung(report.recommended) if report.recommended else None,
        axis=Axis.over(done),
        matrix_labels=MATRIX_LABELS,
        confusions=[
            (rung, Confusion.of(report.labels, predictions[rung.name]))
            for rung in order
            if report.labels is not None
        ],
        disagreements=disagreements(report, predictions, inputs),
        tests=list(dict.fromkeys(rung.difference.test for rung in done if rung.difference)),
        has_cost=any(rung.cost_per_thousand is not None for rung in done),
    )


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of the interval plot, on round ends with at most six ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, rungs: Sequence[RungResult]) -> Axis:
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
        """Where a score stands between the ends, as a percentage that SVG understands."""
        return f"{100 * (share - self.low) / (self.high - self.low):.2f}%"


@dataclass(frozen=True)
class LabelRow:
    """How the examples of one label fared."""

    label: str
    n: int
    counts: tuple[int, ...]  # predictions of each label, in order, and last of what is no label
    recall: float | None  # of the examples with this label, the share that was given it
    precision: float | None  # of the examples given this label, the share that has it
    confused: tuple[str, int] | None  # the wrong answer that was given most often

    @property
    def missed(self) -> int:
        return self.n - round(self.n * (self.recall or 0.0))


@dataclass(frozen=True)
class Confusion:
    """Target by prediction, [labels, labels + 1]."""

    rows: tuple[LabelRow, ...]
    other: bool  # whether any prediction was no label

    @classmethod
    def of(cls, labels: Sequence[str], predictions: Sequence[Prediction]) -> Confusion:
        known = set(labels)
        named = [(p.target.strip(), p.text.strip() if p.text.strip() in known else None) for p in predictions]
        pairs = Counter(named)
        given = Counter(answer for _, answer in named)
        rows = []
        for label in labels:
            counts = [pairs[label, answer] for answer in (*labels, None)]
            n, right = sum(counts), pairs[label, label]
            wrong = [
                (count, answer)
                for answer, count in zip((*labels, "no label"), counts, strict=True)
                if answer != label
            ]
            most = max(wrong, key=lambda entry: entry[0])
            rows.append(
                LabelRow(
                    label,
                    n,
                    tuple(counts),
                    right / n if n else None,
                    right / given[label] if given[label] else None,
                    (most[1], most[0]) if most[0] else None,
                )
            )
        return cls(tuple(rows), given[None] > 0)


@dataclass(frozen=True)
class Answer:
    """What some of the rungs said, all alike."""

    text: str
    score: float
    rungs: tuple[str, ...]


@dataclass(frozen=True)
class Disagreement:
    """One test example that the rungs do not all get equally right."""

    id: str
    input: str
    target: str
    answers: tuple[Answer, ...]  # best first


def disagreements(report: Report, predictions: Predictions, inputs: Mapping[str, str]) -> list[Disagreement]:
    """The examples whose scores differ between rungs: those that split the rungs most evenly first.

    The order is by spread of the scores, then by id, so that it is the same in every run.
    """
    done = [rung.name for rung in report.rungs if rung.ok]
    by_id: dict[str, dict[str, Prediction]] = {}
    for name in done:
        for prediction in predictions[name]:
            by_id.setdefault(prediction.id, {})[name] = prediction
    spread: list[tuple[float, str]] = []
    for key, said in by_id.items():
        scores = [prediction.score for prediction in said.values()]
        middle = sum(scores) / len(scores)
        variance = sum((score - middle) ** 2 for score in scores) / len(scores)
        if max(scores) - min(scores) > 1e-9:
            spread.append((round(-variance, 9), key))
    result = []
    for _, key in sorted(spread)[:DISAGREEMENTS]:
        groups: dict[tuple[float, str], list[str]] = {}
        for name, prediction in by_id[key].items():
            groups.setdefault((prediction.score, prediction.text.strip()), []).append(name)
        answers = [Answer(_cut(text), score, tuple(names)) for (score, text), names in groups.items()]
        answers.sort(key=lambda answer: -answer.score)
        target = next(iter(by_id[key].values())).target
        result.append(Disagreement(key, _cut(inputs.get(key, "")), _cut(target), tuple(answers)))
    return result


def table(report: Report) -> Table:
    """The results for the terminal: one row a rung, the recommended one marked, reasons of failures below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    done = [rung for rung in report.rungs if rung.ok]
    has_cost = any(rung.cost_per_thousand is not None for rung in done)
    failed = [f"{rung.name} failed: {rung.reason}" for rung in report.rungs if not rung.ok]
    result = Table(
        title=Text(f"{report.task}: {report.metric} on {report.n_test:,} test examples"),
        caption=Text("\n".join(failed)) if failed else None,
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    # Narrow enough for the 80 columns of a plain terminal.
    result.add_column("rung", overflow="fold", min_width=12)
    for name in ("score", "95%\ninterval", "vs best\ncheaper", "p", "answer\nin", "set up\nin", "on disk"):
        result.add_column(name, justify="right", no_wrap=True)
    if has_cost:
        result.add_column("$ for\n1,000", justify="right", no_wrap=True)
    for rung in report.rungs:
        mark = "> " if rung.name == report.recommended else "  "
        style = "bold" if rung.name == report.recommended else "" if rung.ok else "dim"
        cells = [mark + rung.name]
        if rung.ok:
            cells += [
                percent(rung.score),
                f"{100 * (rung.low or 0):.1f}\N{EN DASH}{100 * (rung.high or 0):.1f}",
                points(rung.difference.difference) if rung.difference else "",
                p_value(rung.difference.p) if rung.difference else "",
                seconds(rung.latency_p50),
                duration(rung.setup_seconds),
                "" if rung.size_bytes is None else size(rung.size_bytes),
            ]
            cells += [money(rung.cost_per_thousand)] if has_cost else []
        else:
            cells += ["failed"]
        # Text, not str: a rung's name is no markup.
        result.add_row(*(Text(cell) for cell in cells), style=style)
    return result


def percent(share: float | None) -> str:
    """``82.3%``"""
    return "" if share is None else f"{100 * share:.1f}%"


def points(share: float) -> str:
    """``+4.2`` percentage points; zero has no sign."""
    value = round(100 * share, 1)
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if value else "0.0"


def p_value(p: float) -> str:
    """``0.031``, ``< 0.001``"""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(value: float | None) -> str:
    """``0.4 ms``, ``38 ms``, ``1.24 s``: a latency."""
    if value is None:
        return ""
    if value < 0.01:
        return f"{1000 * value:.2g} ms" if value >= 5e-5 else "< 0.1 ms"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 60 else duration(value)


def money(dollars: float | None) -> str:
    """``$0.42``; two digits that count below a cent."""
    if dollars is None:
        return ""
    return f"${dollars:,.2f}" if dollars >= 0.01 or dollars == 0 else f"${dollars:.2g}"


def _plain(value: Any) -> str:
    """A value of a free-form mapping, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + " ..."
