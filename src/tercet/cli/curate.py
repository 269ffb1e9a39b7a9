"""``tercet curate``: clean raw text into a corpus to build from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.cli.command import Json, command
from tercet.curation.settings import CurateSettings

if TYPE_CHECKING:
    from tercet.curation.pipeline import Curated

EXAMPLE = "tercet curate --data corpus/ --data books.jsonl.gz --weight books.jsonl.gz=2 --out runs/corpus"


@command(CurateSettings)
def curate(settings: CurateSettings, json: Json = False) -> None:
    """Clean raw text into a corpus.

    Filters, masks personal data, removes copies and test texts, mixes, shuffles and writes parquet.
    """
    from tercet.curation.pipeline import curate_with
    from tercet.files import dump_json

    tests = _test_texts([str(name) for name in settings.decontaminate])
    curated = curate_with(replace(settings, decontaminate=tests))
    _show(curated)
    if json:
        sys.stdout.write(dump_json(asdict(curated)))


def _show(curated: Curated) -> None:
    from tercet.curation.report import share
    from tercet.progress import duration, say, size

    for reason, documents in curated.dropped.items():
        say(f"  {documents:>9,}  {share(documents, curated.documents_read):>6}  {reason}")
    for reason, count in curated.skipped.items():
        say(f"  {count:>9,}  not read: {reason}")
    rate = f", {size(curated.bytes_per_second)}/s" if curated.bytes_per_second else ""
    say(
        f"kept {curated.documents:,} of {curated.documents_read:,} documents, {size(curated.bytes)} of "
        f"{size(curated.bytes_read)}, in {duration(curated.seconds)}{rate}"
    )
    if not curated.documents:
        say("no document is left; the report says which rules dropped them")
    say(
        f"corpus: {curated.data}   report: {curated.report}   "
        f"next: tercet build --data {curated.data} --out runs/mine"
    )


def _test_texts(names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the test texts of tasks (YAML files and built-in ones) and of other files, by name."""
    from tercet.curation.contamination import read_test_texts

    texts: dict[str, Sequence[str]] = {}
    for name in names:
        if name.startswith("builtin:") or Path(name).suffix.lower() in (".yaml", ".yml"):
            from tercet.evaluate.task import Task

            texts[name] = Task.load(name).test_texts
        else:
            texts[name] = read_test_texts(name)
    return texts
