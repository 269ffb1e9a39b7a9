"""The table of results that a climb prints in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tercet.ladder.formats import money, p_value, percent, points, seconds
from tercet.ladder.result import Report
from tercet.progress import duration, size

if TYPE_CHECKING:
    from rich.table import Table


def table(report: Report) -> Table:
    """Return the results for the terminal: one row for each rung, a mark at the recommended one, failures below."""
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
    # The columns fit into the 80 characters of a plain terminal.
    result.add_column("rung", overflow="fold", min_width=12)
    for name in (
        "score",
        "95%\ninterval",
        "vs best\ncheaper",
        "p",
        "time per\nanswer",
        "setup\ntime",
        "size on\ndisk",
    ):
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
        # Text and not str, because a rung's name is not markup.
        result.add_row(*(Text(cell) for cell in cells), style=style)
    return result
