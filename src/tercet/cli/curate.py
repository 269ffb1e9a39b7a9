"""``tercet curate``: raw text into a corpus to build from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "tercet curate --data corpus/ --data books.jsonl.gz --weight books.jsonl.gz=2 --out runs/corpus"


def curate(
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="File, directory or Hub data set; may be repeated."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run directory; the corpus is DIR/data.")],
    rules: Annotated[
        str, typer.Option("--rules", metavar="PRESET", help="Quality rules: none, light or web.")
    ] = "web",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=N", help="Change a number of a rule; may be repeated."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE", help="Keep only this language; may be repeated."),
    ] = None,
    mask_personal_data: Annotated[
        bool, typer.Option("--mask-personal-data", help="Replace e-mail addresses, numbers and the like.")
    ] = False,
    near_duplicates: Annotated[
        bool, typer.Option(help="Take out near-copies too; exact ones go in any case.")
    ] = True,
    bands: Annotated[int, typer.Option(metavar="N", help="MinHash bands: more find more near-copies.")] = 14,
    rows: Annotated[int, typer.Option(metavar="N", help="Values in a band: more are stricter.")] = 8,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Take out the test texts of a task, or of a file (text, prompt or question); may be repeated.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=W",
            help="How often a source is written (2, 0.5), or its share of the corpus (30%); may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order and the sample.")] = 0,
    shard_mb: Annotated[float, typer.Option(metavar="N", help="Megabytes of text in a file.")] = 100,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Processes; as many as cores by default.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work on Ray Data: the cluster of RAY_ADDRESS, or this machine.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Curate raw text: filter, mask, remove copies and test texts, mix, shuffle, write parquet."""
    from dataclasses import asdict

    from tercet.curation.mixture import parse_weight
    from tercet.curation.pipeline import curate as run
    from tercet.curation.report import share
    from tercet.files import dump_json
    from tercet.progress import duration, say, size

    made = run(
        data,
        out,
        preset=rules,
        languages=language or None,
        rules=dict(_number(text) for text in set_ or ()),
        mask_personal_data=mask_personal_data,
        near_duplicates=near_duplicates,
        bands=bands,
        rows=rows,
        decontaminate=_test_texts(decontaminate or ()),
        weights=dict(parse_weight(text) for text in weight or ()),
        seed=seed,
        shard_mb=shard_mb,
        processes=processes,
        engine="ray" if ray else "local",
    )
    for reason, documents in made.dropped.items():
        say(f"  {documents:>9,}  {share(documents, made.documents_read):>6}  {reason}")
    for reason, count in made.skipped.items():
        say(f"  {count:>9,}  not read: {reason}")
    rate = f", {size(made.bytes_per_second)}/s" if made.bytes_per_second else ""
    say(
        f"{made.documents:,} of {made.documents_read:,} documents, {size(made.bytes)} of {size(made.bytes_read)} "
        f"in {duration(made.seconds)}{rate}"
    )
    if not made.documents:
        say("nothing is left; the report says which rules took it")
    say(
        f"corpus: {made.data}   report: {made.report}   next: tercet build --data {made.data} --out runs/mine"
    )
    if json:
        sys.stdout.write(dump_json(asdict(made)))


def _number(text: str) -> tuple[str, float]:
    from tercet.errors import UserError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--set {text}: write NAME=NUMBER") from None


def _test_texts(names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The test texts of tasks (YAML files and built-in ones) and of other files."""
    from tercet.curation.contamination import read_test_texts

    texts: dict[str, Sequence[str]] = {}
    for name in names:
        if name.startswith("builtin:") or Path(name).suffix.lower() in (".yaml", ".yml"):
            from tercet.evaluate.task import Task

            texts[name] = Task.load(name).test_texts
        else:
            texts[name] = read_test_texts(name)
    return texts
