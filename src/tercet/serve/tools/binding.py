"""Tools for a model that runs here: what is asked for, what the model sees, what it may and did write.

    wanted = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)    # OpenAI's shapes
    plan = plan_tools(wanted, tokenizer, form)         # form: response_format as a Grammar, or None
    messages = template_messages(messages, tokenizer)  # earlier calls, as the template wants them
    tokens = served.prompt_tokens(messages, plan.tools)
    request = Request(tuple(tokens), sampling, plan.constraint)

    answer = plan.read(completion)             # a whole answer: .content (None beside calls), .calls
    parser = plan.parser()                     # a stream: one for each choice
    for delta in deltas:
        for piece in parser.push(delta): ...   # a str is content, a CallDelta a piece of a call
    for piece in parser.finish(): ...          # once, after the last delta

A plan without tools has no constraint but ``form``, and its parser gives all text as content, so that
nobody needs to ask whether there are tools. Everything that is wrong raises APIError 400.

``tool_choice`` "required" and a named function are kept by constrained decoding, and so are ``strict``
functions and ``parallel_tool_calls: false`` where the model is free to call or not. "none" keeps the tools
from the model's sight.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.request import Completion, Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import APIError
from tercet.serve.tools.formats import ToolFormat, tool_format
from tercet.serve.tools.parser import Answer, ToolParser, gather

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
class Wanted:
    """What a request says of tools. ``only``: the one function that must be called, with mode required."""

    functions: tuple[Function, ...] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    parallel: bool = True


@dataclass(frozen=True)
class ToolPlan:
    """How one request's tools are carried out.

    tools: for the chat template; None where the model is to see none.
    constraint: the form of the whole output, tools and ``response_format`` together.
    """

    tools: list[dict[str, Any]] | None
    constraint: Grammar | None
    form: ToolFormat | None
    names: frozenset[str]
    tokenizer: Tokenizer | None

    def parser(self, *, whole: bool = False) -> ToolParser:
        """For one choice of a stream; ``whole`` as in `ToolParser`."""
        return ToolParser(self.form, self.names, self.tokenizer, whole=whole)

    def read(self, completion: Completion) -> Answer:
        """Content and calls of a whole answer."""
        parser = self.parser(whole=True)
        pieces = parser.push(Delta(0, completion.text, completion.tokens, None))
        return gather([*pieces, *parser.finish()])


# What is asked for


def read_tools(
    tools: object, tool_choice: object = None, parallel: bool | None = None, *, flat: bool = False
) -> Wanted:
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
        raise _missing(f"{param}.name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(
            f"{param}.name", f"is {name!r:.80}; a name is 1 to 128 letters, digits, underscores and dashes"
        )
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{param}.description", "must be a string")
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(f"{param}.strict", "must be true or false")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise _wrong(f"{param}.{schema}", "must be a JSON Schema of an object")
    if parameters.get("type", "object") != "object":
        raise _wrong(
            f"{param}.{schema}", f"has type {parameters['type']!r:.60}; arguments are an object", _BAD_SCHEMA
        )
    if not isinstance(parameters.get("properties", {}), dict):
        raise _wrong(f"{param}.{schema}.properties", "must be an object of schemas", _BAD_SCHEMA)
    return Function(name, description, parameters, bool(strict), param, f"{param}.{schema}")


def check_distinct(functions: Sequence[Function], tools: str = "tools") -> None:
    """APIError 400 for two functions of one name, and for too many."""
    if len(functions) > MAX_TOOLS:
        raise _wrong(tools, f"has {len(functions)} tools; at most {MAX_TOOLS} are taken")
    names: set[str] = set()
    for function in functions:
        if function.name in names:
            raise _wrong(f"{function.param}.name", f"is {function.name}, and another tool is called so too")
        names.add(function.name)


def check_named(name: object, functions: Sequence[Function], param: str) -> str:
    """The function that a choice names. APIError 400 where there is none of that name."""
    known = [function.name for function in functions]
    if not isinstance(name, str) or name not in known:
        there = f"the tools are {', '.join(known[:10])}" if known else "there are no tools"
        raise _wrong(param, f"names the function {name!r:.80}; {there}")
    return name


def _functions(tools: object, flat: bool) -> tuple[Function, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise _wrong("tools", "must be a list")
    found = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool, dict):
            raise _wrong(where, "must be an object")
        kind = tool.get("type")
        if kind is None:
            raise _missing(f"{where}.type")
        if kind != "function":
            raise _wrong(
                f"{where}.type", f"is {kind!r:.60}; only function tools are served here", _UNSUPPORTED
            )
        if not flat:
            _only(tool, ("type", "function"), where)
            where += ".function"
            tool = tool.get("function")
            if tool is None:
                raise _missing(where)
            if not isinstance(tool, dict):
                raise _wrong(where, "must be an object")
        _only(tool, ("name", "description", "parameters", "strict", *(("type",) if flat else ())), where)
        found.append(
            make_function(
                tool.get("name"), tool.get("description"), tool.get("parameters"), tool.get("strict"), where
            )
        )
    check_distinct(found)
    return tuple(found)


def _choice(choice: object, functions: tuple[Function, ...], flat: bool) -> Wanted:
    if choice is None or choice == "auto":
        return Wanted(functions)
    if choice == "none":
        return Wanted(functions, "none")
    if choice == "required":
        if not functions:
            raise _wrong("tool_choice", "is required, and there are no tools")
        return Wanted(functions, "required")
    if not isinstance(choice, dict):
        raise _wrong("tool_choice", f"is {choice!r:.60}; it is none, auto, required or a function")
    if choice.get("type") == "function":
        name, where = _named(choice, "tool_choice", flat)
        return Wanted(functions, "required", check_named(name, functions, where))
    if choice.get("type") == "allowed_tools":
        return _allowed(choice, functions, flat)
    raise _wrong(
        "tool_choice.type", f"is {choice.get('type')!r:.60}; it is function or allowed_tools", _UNSUPPORTED
    )


def _named(entry: dict[str, Any], where: str, flat: bool) -> tuple[object, str]:
    """The name in ``{"type": "function", …}`` and its place."""
    if flat:
        return entry.get("name"), f"{where}.name"
    function = entry.get("function")
    if not isinstance(function, dict):
        raise _missing(f"{where}.function")
    return function.get("name"), f"{where}.function.name"


def _allowed(choice: dict[str, Any], functions: tuple[Function, ...], flat: bool) -> Wanted:
    """Some of the functions only: the others are kept from the model."""
    where = "tool_choice" if flat else "tool_choice.allowed_tools"
    inner = choice if flat else choice.get("allowed_tools")
    if not isinstance(inner, dict):
        raise _missing(where)
    mode, entries = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise _wrong(f"{where}.mode", f"is {mode!r:.60}; it is auto or required")
    if not isinstance(entries, list) or not entries:
        raise _wrong(f"{where}.tools", "must be a list with at least one tool")
    names = set()
    for number, entry in enumerate(entries):
        place = f"{where}.tools[{number}]"
        if not isinstance(entry, dict) or entry.get("type") != "function":
            raise _wrong(place, "must be an object of type function")
        name, place = _named(entry, place, flat)
        names.add(check_named(name, functions, place))
    return Wanted(tuple(function for function in functions if function.name in names), mode)


# How it is carried out


def plan_tools(
    wanted: Wanted,
    tokenizer: Tokenizer | None,
    form: Grammar | None = None,
    form_param: str = "response_format",
) -> ToolPlan:
    """What to show to the model, what to hold it to, and how to read what it writes.

    tokenizer: the model's; with None (no chat template here), tools are refused.
    form: what content has to be, where it is not a call; ``form_param``: what it is called in the request.

    Raises:
        APIError: 400; the template knows no tools, or a schema can't be enforced.
    """
    if not wanted.functions or wanted.mode == "none":
        return ToolPlan(None, form, None, frozenset(), None)
    written = None if tokenizer is None else tool_format(tokenizer)
    if tokenizer is None or written is None:
        raise APIError(
            400,
            "this model's chat template has no way to call tools that is known here (Hermes and Qwen, "
            "Llama 3, Mistral); leave out tools, or use another model",
            param="tools",
            code=_UNSUPPORTED,
        )
    functions = [one for one in wanted.functions if wanted.only in (None, one.name)]
    required = wanted.mode == "required"
    constraint = None
    if required or form is not None or not wanted.parallel or any(one.strict for one in functions):
        constraint = written.grammar(
            {one.name: one.arguments(enforced=required or one.strict) for one in functions},
            tokenizer,
            required=required,
            several=wanted.parallel and wanted.only is None,
            otherwise=None if required else _otherwise(form, written, form_param),
        )
        try:
            constraint.check()
        except GrammarError as problem:
            raise _wrong("tools", f"can't be enforced together: {problem}", _BAD_SCHEMA) from problem
    return ToolPlan(
        [one.for_template() for one in wanted.functions],
        constraint,
        written,
        frozenset(one.name for one in functions),
        tokenizer,
    )


def _otherwise(form: Grammar | None, written: ToolFormat, param: str) -> Grammar | None:
    if form is None:
        return None
    if form.kind != "json_schema":
        raise _wrong(param, "together with tools can only be JSON", _UNSUPPORTED)
    if not written.trigger:
        raise _wrong(
            param,
            "and tools go together only with tool_choice required or none: this model's calls are JSON too, "
            "so that they can't be told from its answers",
            _UNSUPPORTED,
        )
    return form


def template_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A conversation in OpenAI's shape as the chat template wants it.

    Arguments become objects where it wants these, calls without content get an empty one, results the name
    of their function, and identifiers the nine letters and digits that Mistral's templates insist on.

    Raises:
        APIError: 400; calls that are no calls, or a template that would leave them out.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions, by the id of the call
    for number, message in enumerate(messages):
        one, where = dict(message), f"messages[{number}]"
        calls = one.get("tool_calls")
        if calls is not None or one.get("role") == "tool":
            form = tool_format(tokenizer)
            if form is None:
                raise APIError(
                    400,
                    f"{where} holds a tool call or its result, which this model's chat template can't show",
                    param=where,
                    code=_UNSUPPORTED,
                )
            if calls is not None:
                one["tool_calls"] = _template_calls(calls, form, names, f"{where}.tool_calls")
                one["content"] = one.get("content") or ""
            if isinstance(answered := one.get("tool_call_id"), str):
                one["tool_call_id"] = _identifier(answered, form)
                if answered in names:
                    one = {"name": names[answered], **one}
        found.append(one)
    return found


def _template_calls(
    calls: object, form: ToolFormat, names: dict[str, str], where: str
) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not calls:
        raise _wrong(where, "must be a list with at least one call")
    if len(calls) > 1 and not form.several:
        raise _wrong(where, "has several calls, and this model's chat template takes one a message")
    found = []
    for number, call in enumerate(calls):
        place = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise _wrong(place, "must be a call of type function")
        name, text, called = function.get("name"), function.get("arguments"), call.get("id")
        if not isinstance(name, str) or not isinstance(text, str) or not isinstance(called, str):
            raise _wrong(place, "must have an id, function.name and function.arguments, all strings")
        names[called] = name
        arguments: Any = _parsed(text, f"{place}.function.arguments") if form.objects else text
        found.append(
            {
                "id": _identifier(called, form),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return found


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as problem:
        raise _wrong(where, f"is not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise _wrong(where, "must be a JSON object")
    return value


def _identifier(text: str, form: ToolFormat) -> str:
    if form.style not in ("mistral", "named") or re.fullmatch(r"[A-Za-z0-9]{9}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]


_BAD_SCHEMA, _UNSUPPORTED = "invalid_function_parameters", "unsupported_parameter"


def _wrong(param: str, what: str, code: str = "invalid_value") -> APIError:
    return APIError(400, f"{param} {what}", param=param, code=code)


def _missing(param: str) -> APIError:
    return APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")


def _only(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise APIError(
                400, f"{where}.{name} is not known here", param=f"{where}.{name}", code="unknown_parameter"
            )
