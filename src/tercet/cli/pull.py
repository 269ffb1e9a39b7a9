"""``tercet pull NAME``: fetch a model now, so that its first use does not wait for it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tercet.cli.command import Json

EXAMPLE = "tercet pull builtin:smollm2"


def pull(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="builtin:smollm2, org/name or org/name:QUANTISATION on the Hub, or an adapter, whose base is "
            "fetched.",
        ),
    ],
    json: Json = False,
) -> None:
    """Fetch a model, and print where it is.

    A model that is on this machine already is only checked. Any command fetches the models that it needs by
    itself.
    """
    from dataclasses import asdict

    from tercet.files import dump_json
    from tercet.model.reference import parse_reference
    from tercet.model.store import fetch_model
    from tercet.progress import say, size

    model = fetch_model(parse_reference(ref))
    about = ", ".join(part for part in (model.family, model.type, size(model.bytes)) if part)
    say(f"{model.name}: {about}")
    sys.stdout.write(dump_json(asdict(model)) if json else f"{model.path}\n")
