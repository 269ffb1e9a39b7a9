"""``tercet eval REF TASK``: one model on one task."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tercet.cli import options

EXAMPLE = "tercet eval runs/mine builtin:docs-routing --split dev"


def eval(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task file (YAML) or builtin:docs-routing.")],
    shots: Annotated[int, typer.Option(metavar="N", help="Solved examples of train in the prompt.")] = 0,
    split: Annotated[str, typer.Option(metavar="S", help="test or dev.")] = "test",
    tuned: Annotated[
        bool | None,
        typer.Option(
            "--tuned/--as-is", help="Whether it was tuned on this task; default: seen from its run."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the shots.")] = 0,
    price: options.PriceOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on a task: its score with a 95% interval, latency, tokens and cost."""
    from tercet.climb.evaluate import evaluate
    from tercet.files import dump_json
    from tercet.progress import duration
    from tercet.prompt.llm import LLM
    from tercet.prompt.prices import parse_price

    llm = LLM(ref, price=parse_price(price) if price is not None else None)
    result = evaluate(llm, task, shots=shots, split=split, tuned=tuned, seed=seed)
    if json:
        sys.stdout.write(dump_json(result.to_json()))
        return
    print(
        f"{result.score:.3f} (95% {result.low:.3f} to {result.high:.3f}) on {result.details['examples']} examples"
    )
    print(f"latency p50 {duration(result.latency_p50 or 0)}, p95 {duration(result.latency_p95 or 0)}")
    print(f"{result.prompt_tokens:,} prompt and {result.completion_tokens:,} answer tokens")
    if result.cost_per_thousand is not None:
        print(f"${result.cost_per_thousand:.4g} per thousand calls")
