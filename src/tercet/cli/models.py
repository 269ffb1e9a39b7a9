"""``tercet models``: the models on this machine."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tercet.cli.command import Json

if TYPE_CHECKING:
    from tercet.model.store import StoredModel

EXAMPLE = "tercet models --json"
DAY = 86_400


def models(json: Json = False) -> None:
    """List the models on this machine.

    They are those in the caches of Tercet and of the Hub, those of Ollama and LM Studio, GGUF files in installed
    packages and in this directory, and what Tercet has made in ./runs. The first column is the name by which
    commands take a model; the last says when its weights were last read, as far as the file system records it.
    """
    from dataclasses import asdict

    from tercet.files import dump_json
    from tercet.model.store import models as stored_models

    stored = stored_models()
    if json:
        sys.stdout.write(dump_json({"models": [asdict(model) for model in stored]}))
    elif stored:
        sys.stdout.write(_table(stored))
    else:
        sys.stderr.write("no models here yet; fetch a small one: tercet pull builtin:smollm2\n")


def _table(stored: list[StoredModel]) -> str:
    from tercet.progress import size

    rows = [("NAME", "SIZE", "FAMILY", "TYPE", "FROM", "LAST USED")]
    rows += [
        (model.name, size(model.bytes), model.family, model.type, model.origin, _age(model.used))
        for model in stored
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[1] = row[1].rjust(widths[1])
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _age(used: float) -> str:
    """Return how long ago a time was: ``today``, ``yesterday``, ``12 days ago``."""
    if not used:
        return "-"
    days = round((_midnight(time.time()) - _midnight(used)) / DAY)
    return "today" if days <= 0 else "yesterday" if days == 1 else f"{days} days ago"


def _midnight(seconds: float) -> float:
    day = time.localtime(seconds)
    return time.mktime((day.tm_year, day.tm_mon, day.tm_mday, 0, 0, 0, 0, 0, -1))
