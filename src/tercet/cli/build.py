"""``tercet build``: train a tokenizer and a network on raw text."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from tercet.cli.command import Json, command
from tercet.pretrain.settings import BuildSettings

EXAMPLE = "tercet build --data builtin:python-docs --out runs/mine --minutes 5"


@command(BuildSettings)
def build(settings: BuildSettings, json: Json = False) -> None:
    """Build a model from raw text.

    Trains a tokenizer and a network, and writes a checkpoint and a report.
    """
    from tercet.compose import build_with
    from tercet.files import dump_json
    from tercet.progress import duration, say

    built = build_with(settings)
    if int(os.environ.get("RANK", "0")):
        return  # one of several processes; the first one reports
    say(
        f"{built.parameters:,} parameters, {built.tokens:,} tokens in {duration(built.seconds)}, "
        f"{built.bits_per_byte:.3f} bits per byte on held-out text"
    )
    report = Path(settings.out) / "report.html"
    say(f"model: {built.model}   report: {report}   next: tercet chat {built.model}")
    if json:
        sys.stdout.write(dump_json(asdict(built)))
