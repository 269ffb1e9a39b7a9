"""``tercet rm NAME``: remove a model that was downloaded."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tercet.errors import UserError

EXAMPLE = "tercet rm builtin:smollm2"


def rm(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A model that tercet models lists.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove a model that Tercet has downloaded, and what the cache holds of it.

    Models of Ollama, LM Studio and packages, run directories and files of your own are never removed.
    """
    from tercet.model.store import prepare_removal
    from tercet.progress import say, size

    removal = prepare_removal(ref)
    where = ", ".join(map(str, removal.paths[:3])) + (", ..." if len(removal.paths) > 3 else "")
    note = " (the Hub's cache, which other programs use too)" if removal.shared else ""
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(
                f"removing {removal.name} ({size(removal.bytes)}) needs a confirmation; add --yes"
            )
        sys.stderr.write(f"remove {removal.name}, {size(removal.bytes)}: {where}{note}? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing removed")
            return
    removal.execute()
    say(f"removed {removal.name}: {size(removal.bytes)} in {where}")
