"""``tercet climb TASK``: measure every level on one task and say which one is worth it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tercet.cli import options

EXAMPLE = "tercet climb builtin:docs-routing --minutes 10"


def climb(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task file (YAML) or builtin:docs-routing.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="REF",
            help="Model for the prompt and tune rungs; without it a base is built first.",
        ),
    ] = None,
    rungs: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Rungs to climb: majority,tfidf,zero-shot,few-shot,lora,full,scratch."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="N", help="Time for everything.")] = 10.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, same numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory; default runs/TASK.")] = None,
    price: options.PriceOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json on standard output.")] = False,
) -> None:
    """Climb the ladder: baselines, prompting, tuning and building, measured on one task."""
    from tercet.files import dump_json
    from tercet.ladder.climb import climb as run
    from tercet.prompt.llm import LLM
    from tercet.prompt.prices import parse_price

    llm = None
    if model is not None:
        llm = LLM(model, price=parse_price(price) if price is not None else None)
    elif price is not None:
        from tercet.errors import UserError

        raise UserError("--price is of the model given with --model; there is none")
    names = None if rungs is None else [name.strip() for name in rungs.split(",") if name.strip()]
    report = run(task, model=llm, rungs=names, minutes=minutes, seed=seed, out=out)
    if json:
        sys.stdout.write(dump_json(report.to_json()))
