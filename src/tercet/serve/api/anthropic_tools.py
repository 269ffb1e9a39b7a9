"""The tools of Anthropic's Messages API, and which of them a model is offered.

A tool with ``defer_loading`` is offered once a block of the conversation refers to it: the result of a search
for tools that the client has made (``tool_reference``), or a system message (``tool_addition``). Where the
request has Anthropic's own search for tools, which this server lacks, all of them are offered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tercet.serve.api.anthropic_requests import CountRequest
from tercet.serve.api.field_table import Ignored
from tercet.serve.api.offered_tools import NOT_OFFERED
from tercet.serve.errors import invalid_value, missing_parameter
from tercet.serve.tools.request import Function, ToolRequest, check_distinct, check_named, make_function

Json = dict[str, Any]
_KEYS = ("type", "name", "description", "input_schema", "strict", "defer_loading")


def tool_request(body: CountRequest, ignored: Ignored) -> ToolRequest:
    """Return the tools and how the model may call them.

    ignored: receives the tools that are not offered, and unknown keys of tools.

    Raises:
        APIError: 400, with the place of a mistake.
    """
    functions = _functions(body, ignored)
    check_distinct(functions)
    choice = body.tool_choice
    if choice is None:
        return ToolRequest(tuple(functions))
    disabled = choice.disable_parallel_tool_use
    parallel = None if disabled is None else not disabled
    if choice.type == "tool":
        only = check_named(choice.name, functions, "tool_choice.name")
        return ToolRequest(tuple(functions), "required", only, parallel)
    if choice.name is not None:
        raise invalid_value("tool_choice.name", "belongs to type tool")
    if choice.type == "any":
        if not functions:
            raise invalid_value("tool_choice.type", "is any, but there are no tools")
        return ToolRequest(tuple(functions), "required", None, parallel)
    return ToolRequest(tuple(functions), choice.type, None, parallel)


def _functions(body: CountRequest, ignored: Ignored) -> list[Function]:
    """Return the functions that the model is offered at the end of the conversation."""
    tools = {f"tools[{number}]": tool for number, tool in enumerate(body.tools or [])}
    searched = any(str(tool.get("type", "")).startswith("tool_search_tool") for tool in tools.values())
    functions: dict[str, Function] = {}  # by the place of the definition
    deferred: dict[str, Function] = {}  # by name
    for where, tool in tools.items():
        function = _function(tool, where, ignored)
        if function is not None and tool.get("defer_loading") and not searched:
            deferred[function.name] = function
        elif function is not None:
            functions[where] = function
    for change, name, definition, where in _changes(body):
        if change == "tool_removal":
            removed = [place for place, function in functions.items() if function.name == name]
            deferred |= {function.name: function for function in map(functions.pop, removed)}
        elif definition is not None:
            if (function := _function(definition, where, ignored)) is not None:
                functions[where] = function
        elif name in deferred:
            function = deferred.pop(name)
            functions[function.param] = function
    return list(functions.values())


def _function(tool: Mapping[str, Any], where: str, ignored: Ignored) -> Function | None:
    """Return a tool of the client; None for one of Anthropic's own, which is not offered."""
    if tool.get("type") not in (None, "custom"):
        ignored.add(where, NOT_OFFERED)
        return None
    ignored.add_unknown(tool, _KEYS, where)
    schema = tool.get("input_schema")
    if schema is None:
        raise missing_parameter(f"{where}.input_schema")
    return make_function(
        tool.get("name"), tool.get("description"), schema, tool.get("strict"), where, "input_schema"
    )


def _changes(body: CountRequest) -> Iterator[tuple[str, str, Json | None, str]]:
    """Yield the changes in the order of the conversation: kind, name of the tool, its definition, and place."""
    for number, message in enumerate(body.messages):
        if isinstance(message.content, str):
            continue
        for place, block in enumerate(message.content):
            where = f"messages[{number}].content[{place}]"
            kind = block.get("type")
            if kind in ("tool_addition", "tool_removal"):
                tool = block.get("tool")
                if not isinstance(tool, dict):
                    raise missing_parameter(f"{where}.tool")
                definition = tool.get("definition")
                defined = isinstance(definition, dict)
                yield kind, str(tool.get("name")), definition if defined else None, f"{where}.tool.definition"
            elif kind == "tool_result" and isinstance(block.get("content"), list):
                for entry in block["content"]:
                    if isinstance(entry, dict) and entry.get("type") == "tool_reference":
                        yield "tool_reference", str(entry.get("tool_name")), None, where
