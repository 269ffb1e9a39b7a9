"""Settings: one dataclass for each command, from which its Python signature and its options are made.

A setting's name, default and help are written once, as a field of the dataclass::

    @settings
    class TuneSettings:
        model: str = setting(help="Model to tune.", metavar="REF", argument=True, kw_only=False)
        epochs: float = setting(default=3.0, help="Number of epochs.")

    def tune_with(settings: TuneSettings) -> Tuned: ...

    tune = keyword_form(TuneSettings, tune_with, "tune")    # tune(model, *, epochs=3.0)

`tercet.cli.command` makes the argument ``REF`` and the option for ``epochs`` of the same class. A module of settings does
not postpone the evaluation of annotations, so that signatures hold types instead of their names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
from typing import Any, ParamSpec, TypeVar, cast, dataclass_transform

from tercet.errors import UserError, nearest

Class = TypeVar("Class")
Parameters = ParamSpec("Parameters")
Settings = TypeVar("Settings")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Option:
    """How the command line offers a setting.

    Attributes:
        help: one sentence, for the command's help and the documentation.
        metavar: the name of the value in the command's help.
        name: the option with its dashes; None derives it from the setting's name.
        argument: a positional argument instead of an option.
        type: the type that the command line reads; None: the type of the setting.
        parse: turns the value that was read into the value of the setting.
        hidden: the command line does not offer the setting.
    """

    help: str
    metavar: str | None = None
    name: str | None = None
    argument: bool = False
    type: Any = None
    parse: Callable[[Any], Any] | None = None
    hidden: bool = False


def setting(
    *,
    help: str,
    default: Any = MISSING,
    metavar: str | None = None,
    option: str | None = None,
    argument: bool = False,
    type: Any = None,
    parse: Callable[[Any], Any] | None = None,
    hidden: bool = False,
    kw_only: bool = True,
) -> Any:
    """Declare a field of a settings class: its default, and the arguments of `Option`.

    Type checkers recognise a default only where it is given by keyword.
    """
    described = Option(help, metavar, option, argument, type, parse, hidden)
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"option": described})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def settings(cls: type[Class]) -> type[Class]:
    """Make a frozen dataclass of ``cls``, whose fields are declared by `setting`; its docstring lists them."""
    made = dataclasses.dataclass(frozen=True)(cls)
    made.__doc__ = _with_settings(inspect.cleandoc(cls.__doc__ or ""), "Attributes", options_of(made))
    return made


def _with_settings(docstring: str, heading: str, options: dict[str, Option]) -> str:
    """Return ``docstring`` with a section that explains each setting."""
    lines = [f"    {name}: {option.help}" for name, option in options.items()]
    return "\n".join([docstring, "", f"{heading}:", *lines])


def options_of(cls: Callable[..., Any]) -> dict[str, Option]:
    """Return the `Option` of every setting of ``cls`` by the setting's name, in order."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cast(Any, cls))}


def keyword_form(
    make: Callable[Parameters, Settings], run: Callable[[Settings], Result], name: str
) -> Callable[Parameters, Result]:
    """Return ``run`` as a function called ``name`` that takes the settings as separate arguments.

    Args:
        make: the settings class.
        run: a function of its instance; the docstring of the new function is its own, with all settings.
        name: the name under which the function is public.

    Raises:
        UserError: (by the new function) a keyword that is no setting; the message names the nearest.
    """

    @functools.wraps(run)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        check_names(name, kwargs, signature.parameters)
        return run(make(*args, **kwargs))

    signature = inspect.signature(make)
    call.__name__ = call.__qualname__ = name
    call.__doc__ = _with_settings(inspect.cleandoc(run.__doc__ or ""), "Args", options_of(make))
    vars(call)["__signature__"] = signature.replace(return_annotation=run.__annotations__.get("return"))
    return call


def check_names(function: str, keywords: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first keyword that ``function`` does not know; the message names the nearest."""
    known = list(known)
    for name in keywords:
        if name not in known:
            matches = nearest(name, known)
            hint = f"; did you mean `{matches[0]}`?" if matches else f"; it has {', '.join(known)}"
            raise UserError(f"{function} has no setting `{name}`{hint}")


def check_positive(settings: object, *names: str) -> None:
    """Raise UserError for the first of the named settings that is neither None nor a positive finite number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"`{name}` is {value}; it must be a positive number")


def check_choice(settings: object, name: str, choices: Iterable[str]) -> None:
    """Raise UserError unless the named setting is one of ``choices``."""
    choices, value = list(choices), getattr(settings, name)
    if value not in choices:
        raise UserError(f"`{name}` is {value!r}; choose {', '.join(choices)}")


def named_numbers(pairs: Sequence[str], setting: str, example: str) -> dict[str, float]:
    """Return numbers by name, from texts such as ``NAME=NUMBER``.

    Args:
        pairs: the texts.
        setting: the name of the setting, for the error.
        example: a correct text, for the error.

    Raises:
        UserError: a text has no name or no number.
    """
    numbers = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise UserError(f"`{setting}` is given {pair!r}; write NAME=NUMBER, such as {example}") from None
    return numbers
