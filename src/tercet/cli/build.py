"""``tercet build``: from raw text to a model of one's own."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "tercet build --data builtin:python-docs --out runs/mine --minutes 5"


def build(
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="PATH", help="File, directory or builtin:python-docs; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run directory; the model is DIR/model.")],
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", help="Time for everything at most; default 5. Size and schedule follow."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens to train on instead: the same run on any machine.")
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="N", help="Floating point operations to train for instead, as 1e15."),
    ] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Layers, with --width.")] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Hidden size, with --layers.")] = None,
    vocab_size: Annotated[int | None, typer.Option(metavar="N", help="Tokens in the vocabulary.")] = None,
    digits: Annotated[
        str, typer.Option(metavar="one|three|all", help="Digits of a number that may be one token.")
    ] = "one",
    whitespace: Annotated[
        str, typer.Option(metavar="word|apart", help="A space goes with the word behind it, or apart.")
    ] = "word",
    compare_tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Compare compression with this model's tokenizer; may be repeated."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens the model reads at once; default: by the budget.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens an optimizer step.")] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="D", help="cuda, cuda:1, mps or cpu; default: a GPU if there is one."),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(metavar="ddp|fsdp", help="Under torchrun: whole weights in each process, or shared."),
    ] = None,
    curate: Annotated[
        str | None,
        typer.Option(metavar="RULES", help="Clean the data first: none (copies only), light or web rules."),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Minimal pairs (sentence_good, sentence_bad) to measure grammar on; may be repeated.",
        ),
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Conversations ({messages}) to tune the base on, so that it answers."
        ),
    ] = None,
    chat_epochs: Annotated[
        float | None, typer.Option(metavar="N", help="Passes over the conversations; default 3.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(metavar="muon|adamw", help="For the matrices of the blocks.")
    ] = "muon",
    learning_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Peak rate of the matrices (AdamW: of everything).")
    ] = None,
    embedding_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Peak rate of the embedding.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="W", help="On matrices.")] = None,
    z_loss: Annotated[float, typer.Option(metavar="W", help="Keeps the softmax's normaliser near 1.")] = 0.0,
    read_bytes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bytes of text to read; default: what the budget has use for."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights and data order.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Build a model from raw text: tokenizer, network, training, checkpoint, report."""
    from tercet.files import dump_json
    from tercet.pretrain.pretrain import build as run
    from tercet.progress import duration, say

    built = run(
        data,
        out,
        minutes=minutes,
        tokens=tokens,
        flops=flops,
        layers=layers,
        width=width,
        vocab_size=vocab_size,
        digits=digits,
        whitespace=whitespace,
        compare_tokenizers=compare_tokenizer or (),
        context=context,
        batch_tokens=batch_tokens,
        device=device,
        parallel=parallel,
        curate=curate,
        pairs=pairs or (),
        chat=chat,
        chat_epochs=chat_epochs,
        optimizer=optimizer,
        learning_rate=learning_rate,
        embedding_rate=embedding_rate,
        weight_decay=weight_decay,
        read_bytes=read_bytes,
        z_loss=z_loss,
        seed=seed,
    )
    if int(os.environ.get("RANK", "0")):
        return  # one of several processes; the first tells what came of it
    say(
        f"{built.parameters:,} parameters, {built.tokens:,} tokens in {duration(built.seconds)}, "
        f"{built.bits_per_byte:.3f} bits per byte on held-out text"
    )
    say(f"model: {built.model}   report: {out / 'report.html'}   next: tercet chat {built.model}")
    if json:
        sys.stdout.write(dump_json(asdict(built)))
