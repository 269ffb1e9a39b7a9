"""``tercet export``: write a model for other programs, as a GGUF file or as a checkpoint directory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tercet.cli.command import Json

EXAMPLE = "tercet export runs/mine --format gguf --type q8_0 --out mine.gguf"


def export(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Any local model reference: a directory, a GGUF file, builtin:smollm2, org/name, ...",
        ),
    ],
    format: Annotated[
        str,
        typer.Option(metavar="hf|gguf", help="A checkpoint directory (hf), or a file for llama.cpp (gguf)."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Directory or file to write.")],
    type: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Type of the weights. gguf: f16 (the default), q8_0, f32 or bf16. hf: f32, bf16 or f16; default: "
            "the stored type, or f32 if an adapter is merged.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a model for llama.cpp, transformers or vLLM.

    Adapters are merged into the weights.
    """
    from tercet.files import dump_json
    from tercet.model.export import export as run
    from tercet.progress import duration, say, size

    exported = run(ref, format, out, type)
    for note in exported.notes:
        say(f"note: {note}")
    say(
        f"{exported.path}: {exported.parameters:,} parameters as {exported.type}, {size(exported.bytes)}, "
        f"in {duration(exported.seconds)}"
    )
    say(f"next: {next_command(exported.format, exported.path)}")
    if json:
        sys.stdout.write(dump_json(asdict(exported)))


def next_command(format: str, path: str) -> str:
    """Return a command that runs the exported model."""
    import shlex

    quoted = shlex.quote(path)
    if format == "gguf":
        return f"llama-cli -m {quoted} -p 'Once upon a time' -n 64 --temp 0"
    return f"tercet prompt {quoted} 'Once upon a time'"
