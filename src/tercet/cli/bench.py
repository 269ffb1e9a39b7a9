"""``tercet bench REF``: the speed and memory of a model, compared with the limit of the machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli.command import Json

if TYPE_CHECKING:
    from tercet.engine.bench import Report

EXAMPLE = "tercet bench runs/mine --quantize int8 --threads 2"
GIB, GB = 1 << 30, 1e9


def bench(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Any local model reference: a directory, a GGUF file, builtin:smollm2, org/name, ...",
        ),
    ],
    quantize: Annotated[
        str | None,
        typer.Option(metavar="Q", help="Weights: int8, int4, bf16 or none; default: as for tercet prompt."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Length of the prompt of random tokens; default: 512, or less for a shorter context.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Number of tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(metavar="N", help="Number of sequences in the batch.")] = 1,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Number of threads; default: one for each core.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(metavar="N", help="Number of repetitions, after a warm-up that is not counted.")
    ] = 3,
    json: Json = False,
) -> None:
    """Measure the speed and memory of a local model."""
    from tercet.engine.bench import Settings
    from tercet.engine.bench import bench as run
    from tercet.files import dump_json
    from tercet.progress import Progress

    settings = Settings(prompt_tokens, new_tokens, batch, repeat)
    with Progress("measuring", settings.work, "tokens") as bar:
        report = run(ref, settings, quantize=quantize, threads=threads, advance=bar.advance)
    if json:
        sys.stdout.write(dump_json(report.to_json()))
    else:
        _show(report)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from tercet.progress import duration

    print(
        f"{report.model}: {_count(report.parameters)} parameters, {report.quantization}, {report.backend}, "
        f"{_threads(report)}"
    )
    table = Table()
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("slowest", justify="right")
    for name, median, worst in (
        (
            f"prefill of {report.prompt_tokens} tokens",
            report.prefill_tokens_per_second,
            report.prefill_tokens_per_second_min,
        ),
        (
            f"decoding {report.new_tokens} tokens",
            report.decode_tokens_per_second,
            report.decode_tokens_per_second_min,
        ),
    ):
        label = name if report.batch == 1 else f"{name}, batch of {report.batch}"
        table.add_row(label, f"{median:,.1f} tokens/s", f"{worst:,.1f}")
    table.add_row("time to first token", f"{1000 * report.time_to_first_token:,.0f} ms", "")
    table.add_row("loading", duration(report.load_seconds), "")
    table.add_row("weights", _bytes(report.weight_bytes), "")
    table.add_row("peak memory", _bytes(report.peak_memory_bytes), "")
    Console(file=sys.stdout).print(table)
    print(limit(report))


def limit(report: Report) -> str:
    """Return a sentence on the limit of the decoding speed, and on the share of it that was reached."""
    bandwidth = report.bandwidth_bytes_per_second
    if bandwidth is None:
        return "Memory bandwidth is measured only for models on the CPU."
    memory = f"{_threads(report)} can read {bandwidth / GB:.1f} GB/s"
    if report.fraction_of_limit is None:
        return (
            f"A step reads the weights once for all {report.batch} sequences ({memory}), so arithmetic may be "
            "the limit."
        )
    bound = report.decode_tokens_per_second / report.fraction_of_limit
    return (
        f"Decoding a token reads all weights and the cached keys and values once; {memory}, "
        f"so the limit is {bound:,.1f} tokens/s, and this run reached {100 * report.fraction_of_limit:.0f}% of it."
    )


def _threads(report: Report) -> str:
    return f"{report.threads} thread{'' if report.threads == 1 else 's'}"


def _bytes(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / (1 << 20):,.1f} MiB"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
