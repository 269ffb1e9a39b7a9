"""``tercet climb TASK``: measure every level on one task, and report which one is worth it."""

from __future__ import annotations

import sys
from dataclasses import replace

from tercet.cli import options
from tercet.cli.command import Json, command
from tercet.ladder.settings import ClimbSettings

EXAMPLE = "tercet climb builtin:docs-routing --minutes 10"


@command(ClimbSettings)
def climb(settings: ClimbSettings, price: options.PriceOption = None, json: Json = False) -> None:
    """Measure all levels on one task.

    Runs baselines, prompting, tuning and building, and recommends one of them.
    """
    from tercet.errors import UserError
    from tercet.files import dump_json
    from tercet.ladder.climb import climb_with

    if isinstance(settings.model, str):
        settings = replace(settings, model=options.load_llm(settings.model, price=price))
    elif price is not None:
        raise UserError("`price` is the price of the model given with `model`; there is none")
    report = climb_with(settings)
    if json:
        sys.stdout.write(dump_json(report.to_json()))
