"""``tercet export``: write a model for other programs, as a GGUF file or as a checkpoint directory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli.command import Json

if TYPE_CHECKING:
    from tercet.conversion.check import Check

EXAMPLE = "tercet export runs/mine --format gguf --type q4_k_m --out mine.gguf"


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
        typer.Option(
            metavar="hf|gguf|gguf-lora",
            help="A checkpoint directory (hf), a file for llama.cpp (gguf), or a file of an adapter alone (gguf-lora).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Directory or file to write.")],
    type: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Type of the weights. gguf: f32, f16 (the default), bf16, q8_0, q6_k, q5_k_m, q5_1, q5_0, q4_k_m, "
            "q4_1 or q4_0. gguf-lora: f32 (the default) or f16. hf: f32, bf16 or f16; default: the stored type, or "
            "f32 if an adapter is merged.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure activations on; quantisation keeps the columns exact that they make important.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare a GGUF file with the checkpoint after writing it; --no-check saves the time for a huge model.",
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Write a model for llama.cpp, Ollama, transformers or vLLM, and check the file.

    Adapters are merged into the weights, except with --format gguf-lora. A GGUF file that is further from the model
    than its type explains is removed, and the exit status is 1.
    """
    from tercet.cli.command import in_options
    from tercet.conversion.check import CheckFailed
    from tercet.conversion.export import export as run
    from tercet.files import dump_json
    from tercet.progress import duration, say, size

    try:
        exported = run(ref, format, out, type, calibrate=calibrate, check=check)
    except CheckFailed as problem:
        say(f"error: the check of {out} failed, so it was removed: {in_options(str(problem), [])}")
        raise typer.Exit(1) from problem
    for note in exported.notes:
        say(f"note: {note}")
    if exported.check is not None:
        say(check_line(exported.check))
    elif exported.format != "hf":
        say("not compared with the checkpoint (--no-check)")
    say(
        f"{exported.path}: {exported.parameters:,} parameters as {exported.type}, {size(exported.bytes)}, "
        f"in {duration(exported.seconds)}"
    )
    say(f"next: {next_command(exported.format, exported.path)}")
    if json:
        sys.stdout.write(dump_json(asdict(exported)))


def check_line(check: Check) -> str:
    """Return a line with the figures of a check."""
    strings = f"; {check.strings} texts get the same tokens" if check.strings else ""
    return (
        f"check: {check.kl:.2g} nats a token from the checkpoint (limit {check.kl_limit:g}), the likeliest token agrees "
        f"after {check.top_token:.1%} of {check.tokens:,} tokens of {check.text}{strings}"
    )


def next_command(format: str, path: str) -> str:
    """Return a command that runs the exported model."""
    import shlex

    quoted = shlex.quote(path)
    if format == "gguf":
        return f"llama-cli -m {quoted} -p 'Once upon a time' -n 64 --temp 0"
    if format == "gguf-lora":
        return f"llama-cli -m BASE.gguf --lora {quoted} -p 'Once upon a time' -n 64 --temp 0"
    return f"tercet prompt {quoted} 'Once upon a time'"
