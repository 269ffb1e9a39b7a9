"""Commands made from settings classes, and settings named as options in error messages.

A command is a function of its settings and of what only the command line has, such as ``--json``::

    @command(TuneSettings)
    def tune(settings: TuneSettings, json: Json = False) -> None: ...

`command` replaces the first parameter by one option or argument for each setting.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Protocol, get_origin

import typer

from tercet.settings import Option, options_of

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

# `name` or `name=value`, as library messages name a setting.
_SETTING = re.compile(r"`(\w+)(?:=([^`]*))?`")


def command(
    settings_class: Callable[..., Any],
    *,
    only: Collection[str] | None = None,
    optional: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one option for each setting of ``settings_class``.

    Args:
        settings_class: a class made by `tercet.settings.settings`.
        only: the names of the settings to offer; None: all that are not hidden.
        optional: the names of required settings that the command line may leave out; they are None then.
    """
    described = options_of(settings_class)
    offered = {
        name: option
        for name, option in described.items()
        if not option.hidden and (only is None or name in only)
    }
    fields = inspect.signature(settings_class).parameters

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]

        def call(**values: Any) -> None:
            given = {name: _value(values.pop(name), option) for name, option in offered.items()}
            chosen = {name: value for name, value in given.items() if value is not _OMITTED}
            run(settings_class(**(dict.fromkeys(optional) | chosen)), **values)

        parameters = [
            _parameter(fields[name].replace(default=None) if name in optional else fields[name], option)
            for name, option in offered.items()
        ]
        call.__name__, call.__doc__ = run.__name__, run.__doc__
        vars(call)["__signature__"] = inspect.Signature(
            [*parameters, *(p.replace(kind=_KEYWORD) for p in own)]
        )
        return call

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_OMITTED: Any = object()


def _parameter(field: inspect.Parameter, option: Option) -> inspect.Parameter:
    kind = field.annotation if option.type is None else option.type
    default = field.default
    if default is not inspect.Parameter.empty and option.parse is not None:
        default = False if kind is bool else None
    elif get_origin(kind) is list and default is not inspect.Parameter.empty:
        default = None
    if default is None and option.type is not None:
        kind = kind | None
    declaration = ["--" + (option.name or field.name.replace("_", "-"))]
    if kind is bool and option.name is None and default is True:
        declaration = []  # typer makes --name and --no-name
    described: Any
    if option.argument:
        described = typer.Argument(metavar=option.metavar, help=option.help)
    else:
        described = typer.Option(*declaration, metavar=option.metavar, help=option.help)
    return field.replace(kind=_KEYWORD, annotation=Annotated[kind, described], default=default)


def _value(value: Any, option: Option) -> Any:
    """Return the setting's value for what the command line read; an option that was not given is left out."""
    if value is None or (isinstance(value, list) and not value):
        return _OMITTED
    return value if option.parse is None else option.parse(value)


class Parameter(Protocol):
    """What `in_options` reads of typer's parameters."""

    name: str | None
    opts: list[str]
    secondary_opts: list[str]
    metavar: str | None
    param_type_name: str


def in_options(message: str, parameters: Sequence[Parameter]) -> str:
    """Return a library message with its settings named as the options of a command.

    `` `batch_size` `` becomes ``--batch-size``, `` `method=lora` `` becomes ``--method lora``, and an argument
    its metavar, such as ``REF``. A setting that the command does not offer only loses its backticks.
    """
    by_name = {parameter.name: parameter for parameter in parameters}

    def named(match: re.Match[str]) -> str:
        name, value = match.groups()
        parameter = by_name.get(name)
        if parameter is None:
            return match.group()[1:-1]
        if parameter.param_type_name == "argument":
            return str(parameter.metavar or name).removesuffix("...")
        option = max(parameter.opts, key=len)
        if value == "False" and parameter.secondary_opts:
            return max(parameter.secondary_opts, key=len)
        return option if value in (None, "True") else f"{option} {value}"

    return _SETTING.sub(named, message)
