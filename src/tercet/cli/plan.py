"""``tercet plan build``: estimate a build before it is made."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli.command import Json, command
from tercet.pretrain.settings import EstimateSettings

if TYPE_CHECKING:
    from tercet.pretrain.estimate import Estimate

EXAMPLE = "tercet plan build --data builtin:python-docs --minutes 30 --fit"


# The settings that change an estimate.
ESTIMATED = (
    "data", "minutes", "tokens", "flops", "layers", "width", "vocab_size", "context", "batch_tokens", "optimizer",
    "learning_rate", "embedding_rate", "weight_decay", "read_bytes", "allow_partial", "chat", "device", "fit", "prices",
)  # fmt: skip


@command(EstimateSettings, only=ESTIMATED)
def plan(
    settings: EstimateSettings,
    level: Annotated[str, typer.Argument(metavar="build", help="What to plan.")],
    json: Json = False,
) -> None:
    """Estimate a build before it is made.

    Prints shape, tokens, time, memory, cost and expected loss.
    """
    from tercet.errors import UserError
    from tercet.files import dump_json
    from tercet.pretrain.estimate import estimate_with

    if level != "build":
        raise UserError(f"tercet plan can plan a build, not {level!r}; write tercet plan build")
    estimate = estimate_with(settings)
    if json:
        sys.stdout.write(dump_json(asdict(estimate)))
    else:
        _show(estimate)


def _show(estimate: Estimate) -> None:
    from rich.console import Console
    from rich.table import Table

    from tercet.progress import duration

    table = Table(box=None, show_header=False)
    for rule in estimate.rules:
        table.add_row(rule["name"], f"{rule['value']}\n[dim]{rule['why']}[/dim]")
    size = f"{estimate.corpus_bytes / 1e6:,.1f} MB"
    whole = f"{size}, about {estimate.passes:.2f} epochs"
    table.add_row("corpus", whole if estimate.corpus_complete else f"at least {size}, enough for this run")
    table.add_row(
        "here", f"{duration(estimate.seconds)} of training at {estimate.tokens_per_second:,.0f} tokens/s"
    )
    table.add_row("memory", f"{estimate.memory_bytes / 1e6:,.0f} MB at the peak")
    if estimate.bits_per_byte is None:
        table.add_row("expected", "no scaling law is known for this corpus; --fit fits one")
    else:
        error = estimate.law["error"] if estimate.law else 0.0
        table.add_row(
            "expected",
            f"{estimate.bits_per_byte:.3f} bits per byte (the law's error on its own points is {100 * error:.1f}%)",
        )
    for hardware in estimate.hardware:
        cost = "" if hardware["cost"] is None else f", ${hardware['cost']:,.2f}"
        table.add_row(hardware["name"], f"{duration(hardware['seconds'])}{cost}")
    Console(highlight=False).print(table)
