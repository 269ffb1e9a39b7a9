"""The report page of a training run: facts, the loss curve, samples. It opens from disk without a network."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.files import write_atomic

LABELS = {"bits_per_byte": "held-out bits per byte", "loss": "held-out loss (nats per token)"}


def write_training_report(
    directory: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, Any]],
    heldout: str,
    samples: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Write ``directory/report.html`` from ``directory/metrics.jsonl`` and the held-out evaluations.

    Args:
        directory: The run directory.
        title: The page's title.
        facts: Names and values of the table.
        history: The held-out evaluations.
        heldout: The measurement of ``history`` to plot, a key of `LABELS`.
        samples: Generated texts, each with ``prompt`` and ``continuation``.

    Returns:
        The path of the page.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    rows = [
        json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    environment = Environment(loader=PackageLoader("tercet.train", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        facts=facts,
        samples=samples,
        history=history,
        plot=Markup(loss_plot(rows, history, heldout)),
    )
    path = directory / "report.html"
    write_atomic(path, page)
    return path


def loss_plot(rows: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], heldout: str) -> str:
    """Plot the training loss (smoothed, with the raw values behind it) and held-out values as inline SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    gray, strong, accent = "#8a8f98", "#3b74c4", "#c4603b"  # readable on white and on near-black
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    rows = [row for row in rows if row.get("loss") is not None]  # rows of steps, not of evaluations
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
    axes.plot(steps, losses, color=strong, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=strong, linewidth=1.6, label="training loss (nats per token)")
    if history:
        axes.plot(
            [point["step"] for point in history],
            [point[heldout] for point in history],
            color=accent,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=LABELS[heldout],
        )
    axes.set_xlabel("step", color=gray)
    axes.tick_params(colors=gray)
    axes.legend(frameon=False, labelcolor=gray)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(gray)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    buffer = io.StringIO()
    # No date and a fixed salt, so that the same run gives the same file.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "tercet", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
