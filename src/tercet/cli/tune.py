"""``tercet tune REF``: fine-tune a model on your examples."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tercet.cli.command import Json, command
from tercet.finetune.settings import TuneSettings

EXAMPLE = "tercet tune runs/mine --data train.jsonl --out runs/tuned"


@command(TuneSettings, optional=("out",))
def tune(
    settings: TuneSettings,
    show_mask: Annotated[
        bool,
        typer.Option(
            "--show-mask", help="Show which tokens of the first examples the loss covers, and exit."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune a model on your examples.

    Trains a LoRA adapter, or all weights.
    """
    from tercet.errors import UserError
    from tercet.files import dump_json
    from tercet.finetune.sft import tune_with
    from tercet.progress import duration, say

    if show_mask:
        from tercet.cli.mask import print_masks

        print_masks(settings)
        return
    if settings.out is None:
        raise UserError("`out` is missing: the directory to write the tuned model to")
    tuned = tune_with(settings)
    say(f"held-out loss {tuned.loss:.4f} after step {tuned.best_step}, {duration(tuned.seconds)}")
    report = Path(settings.out) / "report.html"
    say(f"model: {tuned.model}   report: {report}   next: tercet chat {tuned.model}")
    if json:
        sys.stdout.write(dump_json(asdict(tuned)))
