"""Read the tools of a request: which functions there are, and how the model may call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tercet.engine.grammar import Grammar, GrammarError
from tercet.serve.errors import (
    BAD_SCHEMA,
    UNSUPPORTED,
    APIError,
    check_keys,
    invalid_value,
    missing_parameter,
)

MAX_TOOLS = 128  # as at OpenAI
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Function:
    """A tool. ``parameters`` is a JSON Schema of an object; ``strict``: its calls have to be valid under it.

    param, schema: where it and its parameters stand in the request, for errors.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool
    param: str
    schema: str

    def for_template(self) -> dict[str, Any]:
        """As templates, which follow OpenAI, want it."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def arguments(self, enforced: bool) -> Grammar:
        """The form of a call's arguments. APIError 400 for a schema that can't be enforced but has to be."""
        try:
            form = Grammar.json_schema({**_ANY_OBJECT, **self.parameters} if enforced else _ANY_OBJECT)
            form.check()
        except GrammarError as problem:
            raise APIError(
                400,
                f"{self.schema} of {self.name} can't be enforced: {problem}; change them, or let the model "
                "choose freely (tool_choice auto, and not strict)",
                param=self.schema,
                code="invalid_function_parameters",
            ) from problem
        return form


@dataclass(frozen=True)
class ToolRequest:
    """What a request says of tools. ``only``: the one function that must be called, with mode required."""

    functions: tuple[Function, ...] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    parallel: bool = True


def read_tools(
    tools: object, tool_choice: object = None, parallel: bool | None = None, *, flat: bool = False
) -> ToolRequest:
    """``tools`` and ``tool_choice`` of OpenAI's chat completions; ``flat``: of its responses.

    Raises:
        APIError: 400, with the place of what is wrong.
    """
    functions = _functions(tools, flat)
    found = _choice(tool_choice, functions, flat)
    return replace(found, parallel=parallel is not False)


def make_function(
    name: object,
    description: object,
    parameters: object,
    strict: object,
    param: str,
    schema: str = "parameters",
) -> Function:
    """A checked function; ``param``: where it stands, ``schema``: what its parameters are called there."""
    if name is None:
        raise missing_parameter(f"{param}.name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid_value(
            f"{param}.name", f"is {name!r:.80}; a name is 1 to 128 letters, digits, underscores and dashes"
        )
    if description is not None and not isinstance(description, str):
        raise invalid_value(f"{param}.description", "must be a string")
    if strict is not None and not isinstance(strict, bool):
        raise invalid_value(f"{param}.strict", "must be true or false")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise invalid_value(f"{param}.{schema}", "must be a JSON Schema of an object")
    if parameters.get("type", "object") != "object":
        raise invalid_value(
            f"{param}.{schema}", f"has type {parameters['type']!r:.60}; arguments are an object", BAD_SCHEMA
        )
    if not isinstance(parameters.get("properties", {}), dict):
        raise invalid_value(f"{param}.{schema}.properties", "must be an object of schemas", BAD_SCHEMA)
    return Function(name, description, parameters, bool(strict), param, f"{param}.{schema}")


def check_distinct(functions: Sequence[Function], tools: str = "tools") -> None:
    """APIError 400 for two functions of one name, and for too many."""
    if len(functions) > MAX_TOOLS:
        raise invalid_value(tools, f"has {len(functions)} tools; at most {MAX_TOOLS} are taken")
    names: set[str] = set()
    for function in functions:
        if function.name in names:
            raise invalid_value(
                f"{function.param}.name", f"is {function.name}, and another tool is called so too"
            )
        names.add(function.name)


def check_named(name: object, functions: Sequence[Function], param: str) -> str:
    """The function that a choice names. APIError 400 where there is none of that name."""
    known = [function.name for function in functions]
    if not isinstance(name, str) or name not in known:
        there = f"the tools are {', '.join(known[:10])}" if known else "there are no tools"
        raise invalid_value(param, f"names the function {name!r:.80}; {there}")
    return name


def _functions(tools: object, flat: bool) -> tuple[Function, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise invalid_value("tools", "must be a list")
    found = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool, dict):
            raise invalid_value(where, "must be an object")
        kind = tool.get("type")
        if kind is None:
            raise missing_parameter(f"{where}.type")
        if kind != "function":
            raise invalid_value(
                f"{where}.type", f"is {kind!r:.60}; only function tools are served here", UNSUPPORTED
            )
        if not flat:
            check_keys(tool, ("type", "function"), where)
            where += ".function"
            tool = tool.get("function")
            if tool is None:
                raise missing_parameter(where)
            if not isinstance(tool, dict):
                raise invalid_value(where, "must be an object")
        check_keys(tool, ("name", "description", "parameters", "strict", *(("type",) if flat else ())), where)
        found.append(
            make_function(
                tool.get("name"), tool.get("description"), tool.get("parameters"), tool.get("strict"), where
            )
        )
    check_distinct(found)
    return tuple(found)


def _choice(choice: object, functions: tuple[Function, ...], flat: bool) -> ToolRequest:
    if choice is None or choice == "auto":
        return ToolRequest(functions)
    if choice == "none":
        return ToolRequest(functions, "none")
    if choice == "required":
        if not functions:
            raise invalid_value("tool_choice", "is required, and there are no tools")
        return ToolRequest(functions, "required")
    if not isinstance(choice, dict):
        raise invalid_value("tool_choice", f"is {choice!r:.60}; it is none, auto, required or a function")
    if choice.get("type") == "function":
        name, where = _named(choice, "tool_choice", flat)
        return ToolRequest(functions, "required", check_named(name, functions, where))
    if choice.get("type") == "allowed_tools":
        return _allowed(choice, functions, flat)
    raise invalid_value(
        "tool_choice.type", f"is {choice.get('type')!r:.60}; it is function or allowed_tools", UNSUPPORTED
    )


def _named(entry: dict[str, Any], where: str, flat: bool) -> tuple[object, str]:
    """The name in ``{"type": "function", …}`` and its place."""
    if flat:
        return entry.get("name"), f"{where}.name"
    function = entry.get("function")
    if not isinstance(function, dict):
        raise missing_parameter(f"{where}.function")
    return function.get("name"), f"{where}.function.name"


def _allowed(choice: dict[str, Any], functions: tuple[Function, ...], flat: bool) -> ToolRequest:
    """Some of the functions only: the others are kept from the model."""
    where = "tool_choice" if flat else "tool_choice.allowed_tools"
    inner = choice if flat else choice.get("allowed_tools")
    if not isinstance(inner, dict):
        raise missing_parameter(where)
    mode, entries = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise invalid_value(f"{where}.mode", f"is {mode!r:.60}; it is auto or required")
    if not isinstance(entries, list) or not entries:
        raise invalid_value(f"{where}.tools", "must be a list with at least one tool")
    names = set()
    for number, entry in enumerate(entries):
        place = f"{where}.tools[{number}]"
        if not isinstance(entry, dict) or entry.get("type") != "function":
            raise invalid_value(place, "must be an object of type function")
        name, place = _named(entry, place, flat)
        names.add(check_named(name, functions, place))
    return ToolRequest(tuple(function for function in functions if function.name in names), mode)
