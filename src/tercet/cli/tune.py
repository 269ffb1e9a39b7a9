"""``tercet tune REF``: change a model's weights for your task."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "tercet tune runs/mine --data train.jsonl --out runs/tuned"


def tune(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="Checkpoint or run directory, or org/name on the Hub.")
    ],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="PATH", help="Rows with messages, or prompt and completion, or text."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run directory; the result is DIR/model.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Held-out rows; default: a twentieth of the data.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="M", help="lora or full.")] = "lora",
    epochs: Annotated[float, typer.Option(metavar="N", help="Passes over the data.")] = 3.0,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="At most this long: fewer steps where needed.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Peak rate; default by size and method.")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="LoRA rank; default 16.")] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="LoRA alpha; default twice the rank.")
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Rank-stabilised scale, alpha / sqrt(rank).")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a merged checkpoint, not an adapter.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Longest example; default what the model reads."),
    ] = None,
    over_length: Annotated[
        str, typer.Option(metavar="P", help="Longer examples: drop, truncate or error.")
    ] = "drop",
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Jinja template for messages.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="D", help="cuda, cuda:1, mps or cpu; default: a GPU if there is one."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the adapter and the data order.")] = 0,
    show_mask: Annotated[
        bool, typer.Option("--show-mask", help="Show what the loss covers in the first examples, and leave.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Fine-tune a model on your examples: an adapter (LoRA) or all weights."""
    from tercet.errors import UserError
    from tercet.files import dump_json
    from tercet.finetune.sft import tune as run
    from tercet.progress import duration, say

    if show_mask:
        from tercet.cli.mask import print_masks

        print_masks(ref, data, max_tokens, over_length, chat_template)
        return
    if out is None:
        raise UserError("--out DIR is missing: where the tuned model should be written")
    tuned = run(
        ref,
        data,
        out,
        dev=dev,
        chat_template=chat_template,
        method=method,
        epochs=epochs,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        alpha=alpha,
        rank_stabilised=rslora,
        merge=merge,
        max_tokens=max_tokens,
        over_length=over_length,
        device=device,
        seed=seed,
    )
    say(f"held-out loss {tuned.loss:.4f} after step {tuned.best_step}, {duration(tuned.seconds)}")
    say(f"model: {tuned.model}   report: {out / 'report.html'}   next: tercet chat {tuned.model}")
    if json:
        sys.stdout.write(dump_json(asdict(tuned)))
