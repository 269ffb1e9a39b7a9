"""``tercet export``: a model for other programs, as one GGUF file or as a checkpoint directory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "tercet export runs/mine --format gguf --type q8_0 --out mine.gguf"


def export(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="Checkpoint, adapter or run directory, or org/name.")
    ],
    format: Annotated[
        str,
        typer.Option(metavar="hf|gguf", help="A checkpoint directory, or one file for llama.cpp."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The directory or file to write.")],
    type: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Of the weights. gguf: f16 (the default), q8_0, f32 or bf16. hf: f32, bf16 or f16; "
            "default as they are stored, f32 where an adapter is merged.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for llama.cpp (gguf), or for transformers and vLLM (hf); adapters are merged."""
    from tercet.files import dump_json
    from tercet.model.export import export as run
    from tercet.progress import duration, say, size

    done = run(ref, format, out, type)
    for note in done.notes:
        say(f"note: {note}")
    say(
        f"{done.path}: {done.parameters:,} parameters as {done.type}, {size(done.bytes)}, "
        f"in {duration(done.seconds)}"
    )
    say(f"next: {next_command(done.format, done.path)}")
    if json:
        sys.stdout.write(dump_json(asdict(done)))


def next_command(format: str, path: str) -> str:
    """The command that tries what was written."""
    import shlex

    quoted = shlex.quote(path)
    if format == "gguf":
        return f"llama-cli -m {quoted} -p 'Once upon a time' -n 64 --temp 0"
    return f"tercet prompt {quoted} 'Once upon a time'"
