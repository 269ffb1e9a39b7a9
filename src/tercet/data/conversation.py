"""Conversations: lists of ``{"role": ..., "content": ...}``, read into one form before a model sees them.

Training rows, requests to the server, `tercet.LLM` and the command line all read conversations here, so that the
same messages mean the same everywhere. `read_messages` accepts what programs and data sets write and returns
messages with these fields:

- ``role``: one of `ROLES`.
- ``content``: a string, a list of two or more text parts ``{"type": "text", "text": ...}``, or None in an
  assistant's message that has calls or reasoning only.
- ``tool_calls``: a list of ``{"type": "function", "function": {"name", "arguments"}}``, with an ``id`` where there
  is one; arguments are an object, or its JSON text exactly as it was written.
- ``name``: not empty.
- any other field that is not null, unchanged: chat templates may read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "developer", "tool")
# Between the text parts of one message, as in vLLM and llama.cpp.
PART_SEPARATOR = "\n"
# Names of text parts: of chat completions, and of Responses.
_TEXT_PARTS = ("text", "input_text", "output_text")
_NO_PARAMETERS = {"type": "object", "properties": {}}


class ConversationError(UserError):
    """A conversation that can't be read.

    Attributes:
        place: the field that is wrong, such as ``messages[2].tool_calls[0]``.
        problem: what is wrong with it; completes the sentence "PLACE ...".
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place} {problem}")
        self.place, self.problem = place, problem


def check_text(text: object, name: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can encode.

    Bytes on a command line that are not UTF-8 reach Python as lone surrogates, which no tokenizer and no
    server accepts.

    Raises:
        UserError: it is no such string; the message calls it ``name``.
    """
    if not isinstance(text, str):
        raise ConversationError(name, f"is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ConversationError(
            name, f"is not valid Unicode text (character {problem.start}); send it as UTF-8"
        ) from problem
    return text


def read_messages(messages: object, name: str = "messages", *, template: str = "") -> list[Message]:
    """Return a conversation in the form that the module describes; ``messages`` stays as it is.

    Args:
        messages: the conversation, unchecked.
        name: what the error calls it.
        template: the text of a chat template; roles that it names are accepted too.

    Raises:
        ConversationError: it is no list of messages; the error names the message and the field that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ConversationError(
            name, f'must be a list such as [{{"role": "user", "content": "hi"}}], not {messages!r:.60}'
        )
    if not messages:
        raise ConversationError(name, "is empty; a conversation has at least one message")
    return [_message(message, f"{name}[{number}]", template) for number, message in enumerate(messages)]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message that was read; "" where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return PART_SEPARATOR.join(part["text"] for part in content)
    return content or ""


def for_protocol(messages: Sequence[Message]) -> list[Message]:
    """Return messages that were read, with the arguments of calls as JSON text, as OpenAI's protocol has them."""
    sent = []
    for message in messages:
        if "tool_calls" in message:
            calls = [
                {
                    **call,
                    "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])},
                }
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        sent.append(message)
    return sent


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def conversation(prompt: str, system: str | None = None) -> list[Message]:
    """Return a conversation of one user message, preceded by the system message if there is one."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def _message(message: object, where: str, template: str) -> Message:
    from tercet.model.chat_template import REASONING

    if not isinstance(message, Mapping):
        raise ConversationError(
            where, f"is a {type(message).__name__}; it must be an object with role and content"
        )
    given = {key: value for key, value in message.items() if value is not None}
    calls = _calls(given, where)
    role = given.get("role")
    if role == "function":  # the role of results before there were tools
        role = "tool"
    answered = bool(calls) or any(given.get(field) for field in (*REASONING, "refusal"))
    missing = [field for field in ("role", "content") if field not in given]
    if answered and role == "assistant":
        missing = []
    if missing:
        raise ConversationError(where, f"has no {' and no '.join(missing)}")
    if role not in ROLES and not (
        isinstance(role, str) and re.search(rf"['\"]{re.escape(role)}['\"]", template)
    ):
        raise ConversationError(where, f"has the role {role!r:.60}; roles are {', '.join(ROLES)}")
    if calls and role != "assistant":
        raise ConversationError(f"{where}.tool_calls", "is for messages of role assistant")
    for field in REASONING:
        if field in given:
            check_text(given[field], f"{where}.{field}")
    content = _content(given.get("content"), where, role)
    if content is None and "refusal" in given:
        content = check_text(given["refusal"], f"{where}.refusal")  # the assistant's text in place of content
    read: Message = {"role": role, "content": content}
    if calls:
        read["tool_calls"] = calls
    if "name" in given and check_text(given["name"], f"{where}.name"):
        read["name"] = given["name"]
    taken = (*read, "name", "tool_calls", "function_call", "refusal")
    return read | {key: value for key, value in given.items() if key not in taken}


def _content(content: object, where: str, role: object) -> str | list[Message] | None:
    if content is None:
        return None
    if not isinstance(content, list | tuple):
        return check_text(content, f"{where} content")
    if not content:
        raise ConversationError(f"{where}.content", "is an empty list; it must have at least one part")
    parts = [
        {"type": "text", "text": _part(part, f"{where}.content[{number}]", role)}
        for number, part in enumerate(content)
    ]
    return parts if len(parts) > 1 else parts[0]["text"]


def _part(part: object, where: str, role: object) -> str:
    if not isinstance(part, Mapping):
        raise ConversationError(
            where, f'is a {type(part).__name__}; it must be {{"type": "text", "text": ...}}'
        )
    kind = part.get("type", "text")
    if kind == "refusal" and role == "assistant":
        return check_text(part.get("refusal"), f"{where}.refusal")
    if kind not in _TEXT_PARTS:
        raise ConversationError(f"{where}.type", f"is {kind!r:.60}; models read text parts only")
    return check_text(part.get("text"), f"{where}.text")


# Tools


def _calls(message: Mapping[str, Any], where: str) -> list[Message]:
    """Return the calls of a message, from ``tool_calls`` or the older ``function_call``."""
    if "function_call" in message:
        return [_call(message["function_call"], f"{where}.function_call")]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise ConversationError(f"{where}.tool_calls", f"is a {type(calls).__name__}; it must be a list")
    return [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]


def _call(call: object, where: str) -> Message:
    if not isinstance(call, Mapping) or call.get("type") not in (None, "function"):
        raise ConversationError(where, "must be a call of type function")
    function = call.get("function")
    if function is None:  # {"name", "arguments"} alone, as data sets write it
        function, place = call, where
    else:
        place = f"{where}.function"
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ConversationError(where, "has no function.name")
    name = check_text(function["name"], f"{place}.name")
    arguments = function.get("arguments")
    read: Message = {
        "type": "function",
        "function": {"name": name, "arguments": _arguments(arguments, f"{place}.arguments")},
    }
    if call.get("id") is not None:
        return {"id": check_text(call["id"], f"{where}.id"), **read}
    return read


def _arguments(arguments: object, where: str) -> object:
    """Return the arguments of a call: an object, or the JSON text of one."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        raise ConversationError(where, f"is a {type(arguments).__name__}; it must be an object or its JSON")
    if not isinstance(_json(check_text(arguments, where), where), dict):
        raise ConversationError(where, "must be a JSON object")
    return arguments


def read_tools(tools: object, name: str = "tools") -> list[Message] | None:
    """Return the function descriptions of a conversation, in the shape that chat templates read.

    Args:
        tools: a list of OpenAI's ``{"type": "function", "function": {...}}`` or of bare functions, or the JSON
            text of such a list. ``strict`` is left out, because it is no part of the description.
        name: what the error calls it.

    Returns:
        The functions; None where there are none.

    Raises:
        ConversationError: it is something else; the error names the place.
    """
    if isinstance(tools, str):
        tools = _json(tools, name) if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ConversationError(name, f"is a {type(tools).__name__}; it must be a list of functions")
    return [_tool(tool, f"{name}[{number}]") for number, tool in enumerate(tools)] or None


def _tool(tool: object, where: str) -> Message:
    if isinstance(tool, str):
        tool = _json(tool, where)
    if not isinstance(tool, Mapping) or tool.get("type") not in (None, "function"):
        raise ConversationError(where, "must be a tool of type function")
    function = tool.get("function")
    if function is None:
        function = {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ConversationError(where, "has no function.name")
    read: Message = {"name": check_text(function["name"], f"{where}.name")}
    if function.get("description") is not None:
        read["description"] = check_text(function["description"], f"{where}.description")
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = _json(parameters, f"{where}.parameters") if parameters.strip() else None
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConversationError(f"{where}.parameters", "must be a JSON Schema of an object")
    read["parameters"] = _NO_PARAMETERS if parameters is None else parameters
    others = {key: value for key, value in function.items() if key not in read and value is not None}
    others.pop("strict", None)
    return {"type": "function", "function": read | others}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConversationError(where, f"is not JSON ({problem})") from problem
