"""``tercet plan build``: what a run would be and take, before it is made."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.pretrain.estimate import Estimate

EXAMPLE = "tercet plan build --data builtin:python-docs --minutes 30 --fit"


def plan(
    level: Annotated[str, typer.Argument(metavar="build", help="What to plan.")],
    data: Annotated[list[str], typer.Option("--data", metavar="PATH", help="As for tercet build.")],
    minutes: Annotated[float | None, typer.Option(metavar="N", help="Budget in minutes; default 5.")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Budget in tokens instead.")] = None,
    flops: Annotated[float | None, typer.Option(metavar="N", help="Budget in operations instead.")] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Layers, with --width.")] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Hidden size, with --layers.")] = None,
    vocab_size: Annotated[int | None, typer.Option(metavar="N", help="Tokens in the vocabulary.")] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens the model reads at once; default: by the budget.")
    ] = None,
    read_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="Bytes of text to read at most, as for tercet build.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Train four tiny models and predict the loss from them.")
    ] = False,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DOLLARS", help="An hour of h100, h200, a100, l4 or 4090, for the cost."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a build would be: shape, tokens, time, memory, cost and expected loss."""
    if level != "build":
        raise UserError(f"tercet plan knows build, not {level!r}")
    from tercet.files import dump_json
    from tercet.pretrain.estimate import estimate

    prices = _prices(price or [])
    found = estimate(
        data,
        minutes=minutes,
        tokens=tokens,
        flops=flops,
        layers=layers,
        width=width,
        vocab_size=vocab_size,
        context=context,
        read_bytes=read_bytes,
        fit_law=fit,
        prices=prices,
    )
    if json:
        sys.stdout.write(dump_json(asdict(found)))
    else:
        _show(found)


def _prices(given: list[str]) -> dict[str, float]:
    from tercet.pretrain.hardware import HARDWARE

    found = {}
    for one in given:
        name, _, amount = one.partition("=")
        try:
            found[name.lower()] = float(amount)
        except ValueError:
            raise UserError(f"--price {one}: give NAME=DOLLARS, for example h100=2.50") from None
        if name.lower() not in HARDWARE:
            raise UserError(f"--price {one}: known names are {', '.join(HARDWARE)}")
    return found


def _show(found: Estimate) -> None:
    from rich.console import Console
    from rich.table import Table

    from tercet.progress import duration

    table = Table(box=None, show_header=False)
    for rule in found.rules:
        table.add_row(rule["name"], f"{rule['value']}\n[dim]{rule['why']}[/dim]")
    size = f"{found.corpus_bytes / 1e6:,.1f} MB"
    whole = f"{size}, about {found.passes:.2f} passes over it"
    table.add_row("corpus", whole if found.corpus_complete else f"more than the {size} that are enough")
    table.add_row("here", f"{duration(found.seconds)} of training at {found.tokens_per_second:,.0f} tokens/s")
    table.add_row("memory", f"{found.memory_bytes / 1e6:,.0f} MB at the peak")
    if found.bits_per_byte is None:
        table.add_row("expected", "no scaling law is known for this corpus; --fit makes one")
    else:
        error = found.law["error"] if found.law else 0.0
        table.add_row(
            "expected",
            f"{found.bits_per_byte:.3f} bits per byte (the law misses its own points by {100 * error:.1f}%)",
        )
    for one in found.hardware:
        cost = "" if one["cost"] is None else f", ${one['cost']:,.2f}"
        table.add_row(one["name"], f"{duration(one['seconds'])}{cost}")
    Console(highlight=False).print(table)
