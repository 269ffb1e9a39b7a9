"""The ``tercet`` command: run the requested command, and report a mistake in one line.

Each command is one file in this directory: a typed function of the file's name, whose docstring is its help,
and an EXAMPLE to show below it. A file with SUBCOMMANDS is a group of commands: a function and an example for each.
Only the file of the requested command is imported, and it imports its heavy
parts inside the function, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tercet.cli.command import in_options
from tercet.errors import UserError

# In the order --help shows them.
COMMANDS = (
    "climb",
    "prompt",
    "chat",
    "serve",
    "explain",
    "pull",
    "models",
    "rm",
    "tune",
    "curate",
    "build",
    "plan",
    "eval",
    "export",
    "bench",
    "task",
)
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def _version(requested: bool) -> None:
    if requested:
        from tercet import __version__

        print(f"tercet {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prompt, tune or build a large language model, and measure which one your task needs."""


def application(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the typer application with the commands in ``names``."""
    app = typer.Typer(
        name="tercet",
        add_completion=False,
        rich_markup_mode=None,  # plain help: readable in a pipe, and without importing rich
        pretty_exceptions_enable=False,
        epilog="Start here: tercet climb builtin:docs-routing",
    )
    app.callback()(_top)
    for name in names:
        module = importlib.import_module(f"tercet.cli.{name}")
        subcommands: dict[str, str] = getattr(module, "SUBCOMMANDS", {})
        if not subcommands:
            app.command(name, epilog=_example(module.EXAMPLE))(getattr(module, name))
            continue
        group = typer.Typer(epilog=_example(module.EXAMPLE))
        group.callback()(getattr(module, name))
        for subcommand, example in subcommands.items():
            group.command(subcommand, epilog=_example(example))(getattr(module, subcommand))
        app.add_typer(group, name=name)
    return app


def _example(example: str) -> str:
    return f"\b\nExample:\n  {example}"  # \b keeps typer from wrapping the example


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    0: success. 2: a mistake of the user, reported in one line on stderr. 130: interrupted. A defect of Tercet
    itself gives Python's ordinary traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that lacks a character must not fail the command
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except UserError as problem:
        return _fail(str(problem))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe. Python would report that again when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: list[str]) -> int:
    # Import only the requested command; --help and a mistyped name need all of them.
    named = arguments[0] if arguments else ""
    group = typer.main.get_command(application([named] if named in COMMANDS else COMMANDS))
    try:
        with group.make_context("tercet", arguments or ["--help"]) as context:
            group.invoke(context)
    except UserError as problem:
        return _fail(in_options(str(problem), _parameters(group, arguments)))
    except typer.Exit as problem:
        return problem.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as problem:  # a missing argument, an unknown option, not a number
        path = getattr(getattr(problem, "ctx", None), "command_path", "tercet")
        line = " ".join(problem.format_message().split()).replace(
            ": Value error, ", ": "
        )  # pydantic's prefix
        return _fail(f"{line.rstrip('.')}; see: {path} --help")
    return 0


def _parameters(command: Any, arguments: Sequence[str]) -> list[Any]:
    """Return the parameters of the command that the arguments name, in a group if the first names one."""
    for name in arguments[:2]:
        command = getattr(command, "commands", {}).get(name, command)
    return list(command.params)


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2
