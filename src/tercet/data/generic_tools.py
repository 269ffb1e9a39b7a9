"""Tools for chat templates that have no format for them: functions, calls and results as plain text.

The functions are described in the system message, a call is a line of JSON in the assistant's message, and
results are a message of the user:

    {"name": "weather", "arguments": {"city": "Oslo"}}

Training rows and requests pass through the same function, so a model reads the same text in both.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.conversation import Message
from tercet.errors import UserError
from tercet.model.chat_template import render_template
from tercet.model.tokenizer import Tokenizer

_MARKER = "Qx7markerx7Q"  # letters and digits only, so that no template escapes or strips it
_NO_PARAMETERS = {"type": "object", "properties": {}}
_HEAD = "You can call these functions:"
_TAIL = """To call a function, answer with one JSON object and nothing else:
{"name": "the function", "arguments": {"an argument": "its value"}}
For several calls, write one object on each line. The results follow in the next message."""
# Without it, small models repeat the call that they see above.
_NEXT = "\n\nNow answer in words, if this is enough."


def has_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> bool:
    """Return whether a conversation has functions, calls or results of calls."""
    return bool(tools) or any(
        message.get("tool_calls") or message.get("role") == "tool" for message in messages
    )


def generic_tools(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[Message]:
    """Return the conversation with its tools, calls and results as text; the template gets no tools.

    Messages that stand beside each other and have one role are joined where one of them shows a call or a
    result, because many templates require that user and assistant alternate. Where the template shows no
    system message, its text comes first in the user's first message. Other fields of a message stay with it.

    Args:
        tokenizer: holds the chat template.
        messages: the conversation, in OpenAI's shape; arguments are objects or strings of JSON.
        tools: the functions, in OpenAI's shape.

    Raises:
        UserError: a call has no name, or its arguments are no JSON object.
    """
    names = _names(messages)
    converted: list[Message] = []
    joined = False  # whether the last message shows a call or a result
    results = {number for number, message in enumerate(messages) if message.get("role") == "tool"}
    for number, message in enumerate(messages):
        plain, shows = _plain(message, names, f"messages[{number}]")
        if (
            number in results
            and number + 1 not in results
            and not _is_user(messages[number + 1 : number + 2])
        ):
            plain["content"] += _NEXT
        if converted and converted[-1]["role"] == plain["role"] != "system" and (shows or joined):
            converted[-1] = _join(converted[-1], plain)
            joined = True
        else:
            converted.append(plain)
            joined = shows
    return _with_system(tokenizer, converted, tools)


def split_calls(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the conversation with one call in each message, for templates that take no more.

    Each call is followed by its result. Results without an identifier belong to the calls in their order.
    """
    split: list[Message] = []
    place = 0
    while place < len(messages):
        message, place = dict(messages[place]), place + 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            split.append(message)
            continue
        end = place
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        results, place = [dict(result) for result in messages[place:end]], end
        for number, call in enumerate(calls):
            content = {} if number == 0 else {"content": ""}
            split.append({**message, **content, "tool_calls": [call]})
            result = next((result for result in results if _answers(result, call)), None)
            if result is not None:
                results.remove(result)
                split.append(result)
        split += results
    return split


def _answers(result: Mapping[str, Any], call: object) -> bool:
    identifier = result.get("tool_call_id")
    return identifier is None or (isinstance(call, Mapping) and call.get("id") == identifier)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that describes functions and how to call them."""
    lines = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
    return "\n".join([_HEAD, *lines, "", _TAIL])


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as the model writes it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    fields = {key: function[key] for key in ("name", "description") if function.get(key) is not None}
    return {**fields, "parameters": function.get("parameters") or _NO_PARAMETERS}


def _names(messages: Sequence[Mapping[str, Any]]) -> dict[object, str]:
    """Return the names of called functions by the call's id."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return {
        call["id"]: str(call["function"].get("name"))
        for call in calls
        if isinstance(call, Mapping) and "id" in call and isinstance(call.get("function"), Mapping)
    }


def _plain(message: Mapping[str, Any], names: Mapping[object, str], where: str) -> tuple[Message, bool]:
    """Return a message without calls and without the role ``tool``, and whether it shows a call or a result."""
    if message.get("role") == "tool":
        call_id = message.get("tool_call_id")
        name = message.get("name") or (names.get(call_id) if isinstance(call_id, str) else None)
        return {"role": "user", "content": f"{name or 'The function'} returned:\n{_content(message)}"}, True
    calls = message.get("tool_calls")
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if not calls:
        return plain, False
    lines = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    text = _content(message)
    return {**plain, "content": "\n".join([*([text] if text else []), *lines])}, True


def _is_user(messages: Sequence[Mapping[str, Any]]) -> bool:
    return bool(messages) and messages[0].get("role") == "user"


def _call(call: object, where: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise UserError(f"{where} has no function.name")
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{where}.function.arguments is not JSON ({problem})") from problem
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.function.arguments must be a JSON object")
    return call_text(name, arguments)


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; parts of text are joined by line breaks."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and "text" in part for part in content
    ):
        return "\n".join(str(part["text"]) for part in content)
    return json.dumps(content, ensure_ascii=False)


def _join(first: Message, second: Message) -> Message:
    texts = [text for text in (_content(first), _content(second)) if text]
    return {**first, **second, "content": "\n".join(texts)}


def _with_system(
    tokenizer: Tokenizer, messages: list[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[Message]:
    """Add the description of the functions to the system message, or to the user's first message."""
    system = bool(messages) and messages[0].get("role") in ("system", "developer")
    shown = _shows_system(tokenizer.chat_template or "", tuple(sorted(tokenizer.named_tokens.items())))
    if not tools and (shown or not system):
        return messages
    texts = [_content(messages[0])] if system else []
    text = "\n\n".join([*filter(None, texts), *([tools_text(tools)] if tools else [])])
    rest = messages[1:] if system else messages
    if shown:
        head = messages[0] if system else {"role": "system"}
        return [{**head, "content": text}, *rest]
    first = next((number for number, message in enumerate(rest) if message.get("role") == "user"), None)
    if first is None:
        return [{"role": "user", "content": text}, *rest]
    user = {**rest[first], "content": f"{text}\n\n{_content(rest[first])}"}
    return [*rest[:first], user, *rest[first + 1 :]]


@functools.lru_cache(maxsize=32)
def _shows_system(template: str, named_tokens: tuple[tuple[str, str], ...]) -> bool:
    messages = [{"role": "system", "content": _MARKER}, {"role": "user", "content": "a question"}]
    try:
        return _MARKER in render_template(template, messages, None, True, dict(named_tokens))
    except UserError:
        return False
