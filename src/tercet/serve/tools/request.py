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
    """A function that the model may call.

    parameters: a JSON Schema of an object.
    strict: calls must be valid under the schema.
    param: the place of the function in the request, for errors.
    schema: the place of its parameters in the request, for errors.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool
    param: str
    schema: str

    def for_template(self) -> dict[str, Any]:
        """Return the description for chat templates, which use OpenAI's shape."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def arguments(self, enforced: bool) -> Grammar:
        """Return the grammar of a call's arguments.

        enforced: whether they must be valid under the schema, or only an object.

        Raises:
            APIError: 400; the schema is to be enforced and cannot be.
        """
        try:
            form = Grammar.json_schema({**_ANY_OBJECT, **self.parameters} if enforced else _ANY_OBJECT)
            form.check()
        except GrammarError as problem:
            raise APIError(
                400,
                f"{self.schema} of {self.name} cannot be enforced: {problem}; change the schema, or leave the "
                "choice to the model (tool_choice auto, and not strict)",
                param=self.schema,
                code="invalid_function_parameters",
            ) from problem
        return form


@dataclass(frozen=True)
class ToolRequest:
    """The tools of a request.

    functions: the functions that the model sees.
    mode: whether it must not, may or must call one.
    only: the function that it must call, with mode required; None: any.
    parallel: whether an answer may contain several calls; None: the request does not say, and it may.
    """

    functions: tuple[Function, ...] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    parallel: bool | None = None


def read_tools(
    tools: object, tool_choice: object = None, parallel: bool | None = None, *, flat: bool = False
) -> ToolRequest:
    """Read ``tools`` and ``tool_choice`` of OpenAI's protocols.

    Args:
        tools: the request's ``tools``, unchecked.
        tool_choice: the request's ``tool_choice``, unchecked.
        parallel: the request's ``parallel_tool_calls``.
        flat: whether they have the shape of responses, or of chat completions.

    Raises:
        APIError: 400, with the place of the mistake.
    """
    functions = _functions(tools, flat)
    return replace(_choice(tool_choice, functions, flat), parallel=parallel)


def make_function(
    name: object,
    description: object,
    parameters: object,
    strict: object,
    param: str,
    schema: str = "parameters",
) -> Function:
    """Check a function and return it.

    Args:
        name: its name, unchecked, as are the next three.
        description: for the model.
        parameters: a JSON Schema of an object; None: no parameters.
        strict: whether calls must be valid under the schema.
        param: the place of the function in the request.
        schema: the name of the parameters' field there.

    Raises:
        APIError: 400, with the place of the mistake.
    """
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
    """Raise APIError 400 for two functions of one name, and for too many functions."""
    if len(functions) > MAX_TOOLS:
        raise invalid_value(tools, f"has {len(functions)} tools; at most {MAX_TOOLS} are allowed")
    names: set[str] = set()
    for function in functions:
        if function.name in names:
            raise invalid_value(
                f"{function.param}.name", f"is {function.name}, which is the name of another tool too"
            )
        names.add(function.name)


def check_named(name: object, functions: Sequence[Function], param: str) -> str:
    """Return the function's name that a choice holds. APIError 400 where there is no such function."""
    known = [function.name for function in functions]
    if not isinstance(name, str) or name not in known:
        available = f"the tools are {', '.join(known[:10])}" if known else "there are no tools"
        raise invalid_value(param, f"names the function {name!r:.80}; {available}")
    return name


def _functions(tools: object, flat: bool) -> tuple[Function, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise invalid_value("tools", "must be a list")
    functions = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if tool is None:  # a tool that is not offered
            continue
        if not isinstance(tool, dict):
            raise invalid_value(where, "must be an object")
        kind = tool.get("type")
        if kind is None:
            raise missing_parameter(f"{where}.type")
        if kind != "function":
            raise invalid_value(
                f"{where}.type", f"is {kind!r:.60}; only function tools are supported", UNSUPPORTED
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
        functions.append(
            make_function(
                tool.get("name"), tool.get("description"), tool.get("parameters"), tool.get("strict"), where
            )
        )
    check_distinct(functions)
    return tuple(functions)


def _choice(choice: object, functions: tuple[Function, ...], flat: bool) -> ToolRequest:
    if choice is None or choice == "auto":
        return ToolRequest(functions)
    if choice == "none":
        return ToolRequest(functions, "none")
    if choice == "required":
        if not functions:
            raise invalid_value("tool_choice", "is required, but there are no tools")
        return ToolRequest(functions, "required")
    if not isinstance(choice, dict):
        raise invalid_value(
            "tool_choice", f"is {choice!r:.60}; it must be none, auto, required or a function"
        )
    if choice.get("type") == "function":
        name, where = _named(choice, "tool_choice", flat)
        return ToolRequest(functions, "required", check_named(name, functions, where))
    if choice.get("type") == "allowed_tools":
        return _allowed(choice, functions, flat)
    raise invalid_value(
        "tool_choice.type",
        f"is {choice.get('type')!r:.60}; it must be function or allowed_tools",
        UNSUPPORTED,
    )


def _named(entry: dict[str, Any], where: str, flat: bool) -> tuple[object, str]:
    """Return the name in ``{"type": "function", …}`` and its place."""
    if flat:
        return entry.get("name"), f"{where}.name"
    function = entry.get("function")
    if not isinstance(function, dict):
        raise missing_parameter(f"{where}.function")
    return function.get("name"), f"{where}.function.name"


def _allowed(choice: dict[str, Any], functions: tuple[Function, ...], flat: bool) -> ToolRequest:
    """Read a choice that allows some of the functions only; the model does not see the other functions."""
    where = "tool_choice" if flat else "tool_choice.allowed_tools"
    inner = choice if flat else choice.get("allowed_tools")
    if not isinstance(inner, dict):
        raise missing_parameter(where)
    mode, entries = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise invalid_value(f"{where}.mode", f"is {mode!r:.60}; it must be auto or required")
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
