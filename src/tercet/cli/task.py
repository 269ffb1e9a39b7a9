"""``tercet task check FILE``: help for the author of a task."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli import options
from tercet.cli.command import Json

if TYPE_CHECKING:
    from tercet.ladder.check import TaskCheck

EXAMPLE = "tercet task check task.yaml"
# Command of the group: its example.
SUBCOMMANDS = {"check": "tercet task check task.yaml --model builtin:smollm2"}


def task() -> None:
    """Help for the author of a task: check it before you climb."""


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Task file (YAML), or builtin:docs-routing.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="Model to render prompts for and to measure, such as builtin:smollm2; default: none.",
        ),
    ] = None,
    price: options.PriceOption = None,
    json: Json = False,
) -> None:
    """Check a task before you climb it.

    Shows first what will mislead or fail, then the splits, the labels, the score to beat, near-copies between the
    splits and three prompts as the model will read them. With --model also what does not fit the context, and what
    each rung costs in time. The exit status is 1 if the task cannot be loaded.
    """
    from tercet.cli.task_text import check_lines
    from tercet.errors import UserError
    from tercet.evaluate.task import Task
    from tercet.files import dump_json
    from tercet.ladder.check import check_task

    if price is not None and model is None:
        raise UserError("`price` is the price of the model given with `model`; there is none")
    try:
        loaded = Task.load(file)
    except UserError as problem:
        sys.stderr.write(f"error: {problem}\n")
        raise typer.Exit(1) from problem
    llm = options.load_llm(model, price=price) if model is not None else None
    result: TaskCheck = check_task(loaded, llm)
    sys.stdout.write(dump_json(result.to_json()) if json else "\n".join(check_lines(result)) + "\n")
