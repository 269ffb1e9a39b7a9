"""The report: its content, its safety as one self-contained file, and unusual tasks."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tercet.errors import UserError
from tercet.evaluate.measure import score_interval
from tercet.evaluate.metrics import load_metric
from tercet.evaluate.result import Prediction
from tercet.ladder.comparison import add_differences
from tercet.ladder.confusion import Confusion
from tercet.ladder.disagreement import disagreements
from tercet.ladder.formats import money, p_value, points, seconds
from tercet.ladder.recommend import recommend
from tercet.ladder.report import Axis, page, read_report, write_report
from tercet.ladder.result import Level, Report, RungResult, Step
from tercet.ladder.table import table
from tercet.progress import size

AREAS = [
    "networking",
    "concurrency",
    "text",
    "files",
    "archives and formats",
    "debugging and testing",
    "runtime",
    "html",
]
LADDER: list[tuple[str, Level, float]] = [
    ("majority", "baseline", 0.14),
    ("tfidf-logreg", "baseline", 0.81),
    ("zero-shot", "prompt", 0.31),
    ("few-shot", "prompt", 0.45),
    ("lora", "tune", 0.83),
    ("full", "tune", 0.88),
    ("scratch", "build", 0.70),
]


Climb = tuple[Report, dict[str, list[Prediction]], dict[str, str]]


def fake_climb(
    labels: Sequence[str] | None = AREAS, n: int = 586, cost: float | None = None, evil: str = ""
) -> Climb:
    """Return a deterministic climb whose rungs reach about the scores of LADDER; shared, so not to be changed."""
    return made_climb(None if labels is None else tuple(labels), n, cost, evil)


@cache
def made_climb(names: tuple[str, ...] | None, n: int, cost: float | None, evil: str) -> Climb:
    labels = None if names is None else list(names)
    draw = random.Random(0)
    pool = labels or [json.dumps({"city": city}) for city in ("Bern", "Rome", "Oslo")]
    metric = load_metric("accuracy", labels)
    targets = [draw.choice(pool) for _ in range(n)]
    hard = [draw.random() for _ in range(n)]
    predictions: dict[str, list[Prediction]] = {}
    rungs: list[RungResult] = []
    for name, level, skill in LADDER:
        answers = []
        for i, target in enumerate(targets):
            right = 0.7 * hard[i] + 0.3 * draw.random() < skill
            text = (
                pool[0] if name == "majority" else target if right else draw.choice([*pool, "no idea" + evil])
            )
            answers.append(
                Prediction(
                    f"{i:016x}", text, target, float(text == target), 90, draw.uniform(0.02, 0.06), cost
                )
            )
        predictions[name] = answers
        score, low, high = score_interval(metric, answers)
        rungs.append(
            RungResult(
                name, level, score=score, low=low, high=high, seconds=41.0, setup_seconds=12 * skill,
                latency_p50=0.0384, latency_p95=0.0581, prompt_tokens=80 * n, completion_tokens=3 * n,
                size_bytes=int(3.1e7 * skill), cost_per_thousand=cost, details={"shots": 8},
            )
        )  # fmt: skip
    rungs.append(
        RungResult("preference", "tune", "failed", reason="2 rows of train have no 'rejected'" + evil)
    )
    add_differences(rungs, predictions, metric)
    chosen, reason = recommend(rungs)
    report = Report(
        task="docs-routing" + evil, seed=0, metric="accuracy", n_train=2936, n_dev=410, n_test=n, rungs=rungs,
        recommended=chosen, reason=reason, labels=labels, prompt="Documentation:\n{text}\nArea:" + evil,
        description="Which area of the Python library reference a docstring belongs to." + evil,
        decontamination={"documents that are a test example": 586, "near copies": 41, "documents kept": 31_337},
        base={"path": "runs/demo/base/model", "parameters": 3_412_992, "tokens": 11_534_336, "bits_per_byte": 1.8734},
        machine={"processor": "x86_64, 2 cores", "memory": "8 GB"}, versions={"tercet": "0.1.0", "torch": "2.11.0"},
        notes=["439 of 5,574 rows repeat another one and were merged." + evil],
        next_steps=[Step("Talk to the model that was built.", "tercet chat runs/demo/rungs/full/model"),
                    Step("Climb a task of your own.", "tercet climb task.yaml --model runs/demo/base/model" + evil)],
    )  # fmt: skip
    inputs = {
        f"{i:016x}": f"Return the thing number {i} that was asked for, or None.{evil}" for i in range(n)
    }
    return report, predictions, inputs


class Reader(HTMLParser):
    """Collects opening and closing tags, the text, and every attribute that could load a resource."""

    VOID = ("meta", "br", "col", "line", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            f"{tag} {name}={value}"
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = page(*fake_climb())
    reader = Reader(html)
    assert reader.open == []
    assert reader.loads == []
    assert "script" not in reader.tags and "link" not in reader.tags and "iframe" not in reader.tags
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)


def test_the_page_holds_what_was_measured() -> None:
    report, predictions, inputs = fake_climb()
    text = " ".join(Reader(page(report, predictions, inputs)).text.split())
    for rung in report.rungs:
        assert rung.name in text
        if rung.ok:
            assert f"{100 * rung.score:.1f}%" in text  # type: ignore[operator]
    assert report.reason in text and report.rule in text
    assert "McNemar exact" in text
    assert "2 rows of train have no 'rejected'" in text
    assert "near copies 41" in text and "bits per byte 1.873" in text
    assert "tercet chat runs/demo/rungs/full/model" in text


def test_everything_that_users_wrote_is_escaped() -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}\"'"
    report, predictions, inputs = fake_climb([*AREAS[:3], "<b>bold</b>"], evil=evil)
    reader = Reader(page(report, predictions, inputs))
    assert reader.open == []
    assert not {"script", "img", "b/"} & set(reader.tags)
    assert "<b>bold</b>" in reader.text and "alert(1)" in reader.text and "{{ 7*7 }}" in reader.text


def test_a_written_report_is_read_back(tmp_path: Path) -> None:
    report, predictions, inputs = fake_climb()
    path = write_report(report, predictions, tmp_path, inputs)
    assert path == tmp_path / "report.html"
    assert read_report(tmp_path) == report
    value = json.loads((tmp_path / "report.json").read_text())
    assert next(iter(value)) == "version" and value["version"] == 1
    assert {"name", "level", "status", "score", "low", "high", "seconds"} <= set(value["rungs"][0])


def test_the_same_climb_gives_the_same_page() -> None:
    again = made_climb.__wrapped__(tuple(AREAS), 586, None, "")
    assert again[0] is not fake_climb()[0]
    assert page(*fake_climb()) == page(*again)


def test_an_open_task_has_no_confusion() -> None:
    text = Reader(page(*fake_climb(None))).text
    assert "mistaken" not in text
    assert '{"city": "Oslo"}' in text


def test_costs_are_shown_if_prices_are_known() -> None:
    assert "$1.20" in Reader(page(*fake_climb(cost=1.2))).text
    assert "$" not in Reader(page(*fake_climb())).text


def test_a_hundred_long_labels_become_a_list() -> None:
    labels = [f"label {i} " + "of a most unreasonable length " * 3 for i in range(100)]
    labels = [label.strip() for label in labels]
    html = page(*fake_climb(labels))
    assert "Most often mistaken for" in html and labels[99] in html
    assert len(html) < 1_000_000


def test_only_failed_rungs_still_make_a_page() -> None:
    rungs = [
        RungResult("majority", "baseline", "failed", reason="no rows"),
        RungResult("lora", "tune", "failed", reason="no memory"),
    ]
    name, reason = recommend(rungs)
    report = Report("t", 0, "accuracy", 1, 1, 1, rungs, name, reason, labels=["a", "b"])
    text = Reader(page(report, {}, {})).text
    assert "No recommendation" in text and "no memory" in text
    assert "no memory" in _terminal(report)


def test_confusion_counts_by_hand() -> None:
    pairs = [("a", "a"), ("a", "b"), ("a", "b"), ("b", "b"), ("b", "what?")]
    predictions = [
        Prediction(str(i), text, target, float(text == target)) for i, (target, text) in enumerate(pairs)
    ]
    confusion = Confusion.of(["a", "b", "c"], predictions)
    assert [row.counts for row in confusion.rows] == [(1, 2, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0)]
    assert [row.recall for row in confusion.rows] == [1 / 3, 1 / 2, None]
    assert [row.precision for row in confusion.rows] == [1.0, 1 / 3, None]
    assert [row.confused for row in confusion.rows] == [("b", 2), ("no label", 1), None]
    assert confusion.other


def test_disagreements_begin_with_the_most_divided_example_and_leave_out_agreement() -> None:
    rungs = [
        RungResult(name, "baseline", score=0.5, low=0.4, high=0.6) for name in ("one", "two", "three", "four")
    ]
    right = {"x": (1, 1, 1, 1), "y": (1, 0, 0, 0), "z": (1, 1, 0, 0)}
    predictions = {
        rung.name: [Prediction(key, "a" if row[i] else "b", "a", float(row[i])) for key, row in right.items()]
        for i, rung in enumerate(rungs)
    }
    report = Report("t", 0, "accuracy", 1, 1, 3, rungs, "one", "because")
    cases = disagreements(report, predictions, {"y": "why", "z": "zed"})
    assert [case.input for case in cases] == ["zed", "why"]
    assert [(answer.text, answer.rungs) for answer in cases[1].answers] == [
        ("a", ("one",)),
        ("b", ("two", "three", "four")),
    ]


def test_the_axis_has_round_ends_around_all_intervals() -> None:
    axis = Axis.over([RungResult("r", "baseline", score=0.82, low=0.787, high=0.851)])
    assert (axis.low, axis.high) == (0.78, 0.86) and axis.ticks == (0.78, 0.8, 0.82, 0.84, 0.86)
    assert axis.at(0.82) == "50.00%"
    whole = Axis.over([RungResult("r", "baseline", score=1.0, low=0.0, high=1.0)])
    assert (whole.low, whole.high) == (0.0, 1.0)
    point = Axis.over([RungResult("r", "baseline", score=1.0, low=1.0, high=1.0)])
    assert point.low < point.high <= 1.0
    assert point.at(1.0) == "100.00%"


def _terminal(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table(report))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_table_marks_the_recommended_rung(width: int) -> None:
    report, _, _ = fake_climb()
    text = _terminal(report, width)
    assert f"> {report.recommended}" in text
    assert all(f"{100 * rung.score:.1f}%" in text for rung in report.rungs if rung.score is not None)
    assert "preference failed: 2 rows of train" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_terminal_table_takes_no_markup_from_names() -> None:
    report, _, _ = fake_climb(evil="[red]x[/nonsense]")
    assert "[red]x[/nonsense]" in _terminal(report, 200)


def test_numbers_for_people() -> None:
    assert [points(0.042), points(-0.0004), points(-0.1)] == ["+4.2", "0.0", "\N{MINUS SIGN}10.0"]
    assert [p_value(0.0004), p_value(0.0312), p_value(0.5), p_value(1.0)] == [
        "< 0.001",
        "0.031",
        "0.50",
        "1.00",
    ]
    assert [seconds(0.00001), seconds(0.0004), seconds(0.0384), seconds(1.236)] == [
        "< 0.1 ms",
        "0.4 ms",
        "38 ms",
        "1.24 s",
    ]
    assert [size(0), size(999), size(12_345), size(3_400_000), size(5_200_000_000)] == [
        "0 B",
        "999 B",
        "12 kB",
        "3.4 MB",
        "5.2 GB",
    ]
    assert [money(1.2), money(0.00042), money(0.0), money(None)] == ["$1.20", "$0.00042", "$0.00", ""]


def test_a_report_of_another_version_or_with_other_fields_is_refused(tmp_path: Path) -> None:
    report, predictions, inputs = fake_climb(n=30)
    write_report(report, predictions, tmp_path, inputs)
    value = json.loads((tmp_path / "report.json").read_text())
    for change, message in (
        ({"version": 2}, "this Tercet reads version 1"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"rungs": [{"name": "x"}]}, "no field 'level'"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(value | change))
        with pytest.raises(UserError, match=message):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="no field 'version'"):
        read_report(tmp_path)
