"""The messages of Anthropic's Messages API, read as a conversation of chat completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.conversation import PART_SEPARATOR
from tercet.data.prompt_tokens import PromptEnding
from tercet.serve.api.anthropic_requests import CountRequest, InputMessage
from tercet.serve.api.field_table import Hint, Ignored, Kinds, Refused, Used, WhereKnown, check_kind
from tercet.serve.api.fields import string_field
from tercet.serve.errors import invalid_value

Json = dict[str, Any]

_READS_TEXT = "models of this server read text only"
_NO_SUCH_TOOL = "this server has no such tool, so models cannot read its results"
BLOCKS: Kinds = {
    "text": Used("text"),
    "tool_use": Used("an earlier call of the assistant"),
    "tool_result": Used("its result: text, and documents of text; `is_error` begins it with `Error: `"),
    "document": Used("its text, after `title` and `context`; sources of other types are refused"),
    "search_result": Used("its text, after its title and source"),
    "thinking": WhereKnown("earlier reasoning of the assistant, for a chat template that shows it"),
    "tool_reference": Used("offers a tool with `defer_loading` to the model"),
    "tool_addition": Used("offers a tool with `defer_loading`, or one of its own, to the model"),
    "tool_removal": Used("a tool that is no longer offered"),
    "redacted_thinking": Hint("it is encrypted for another server"),
    "fallback": Hint("it describes how another server answered"),
    "mcp_tool_listing": Hint("this server calls no other servers for tools"),
    "image": Refused(_READS_TEXT),
    "container_upload": Refused("this server runs no code"),
    "compaction": Refused("this server does not read the summaries of others; send the text"),
    **{
        name: Refused(_NO_SUCH_TOOL)
        for name in (
            "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "advisor_tool_result",
            "code_execution_tool_result", "bash_code_execution_tool_result",
            "text_editor_code_execution_tool_result", "tool_search_tool_result", "mcp_tool_use",
            "mcp_tool_result", "browser_state",
        )
    },
}  # fmt: skip
_KEYS = {
    "text": ("type", "text"),
    "tool_use": ("type", "id", "name", "input"),
    "tool_result": ("type", "tool_use_id", "content", "is_error"),
    "document": ("type", "source", "title", "context"),
    "search_result": ("type", "source", "title", "content"),
    "thinking": ("type", "thinking", "signature"),
    "tool_reference": ("type", "tool_name"),
    "tool_addition": ("type", "tool"),
    "tool_removal": ("type", "tool"),
}
# Block types by the role of their message; those that a role cannot have are refused.
_OF_ROLE = {
    "user": ("text", "tool_result", "document", "search_result"),
    "assistant": ("text", "tool_use", "thinking"),
    "system": ("text", "tool_addition", "tool_removal"),
}


def conversation(body: CountRequest, shows_reasoning: bool, ignored: Ignored) -> list[Json]:
    """Return the messages in the shape of chat completions.

    Args:
        body: the request.
        shows_reasoning: whether the chat template shows the reasoning of earlier answers.
        ignored: receives what has no effect.

    Raises:
        APIError: 400, with the place of a mistake.
    """
    messages: list[Json] = []
    if body.system:
        messages.append({"role": "system", "content": _texts(body.system, "system", ignored)})
    last_user = max((n for n, message in enumerate(body.messages) if message.role == "user"), default=None)
    if last_user is None:
        raise invalid_value("messages", "has no message of the user")
    for number, message in enumerate(body.messages):
        if message.clear_at == "next_user_message" and number < last_user:
            continue
        for turn in _turns(message, f"messages[{number}]", shows_reasoning, ignored):
            _join(turn, messages)
    if messages[-1].get("tool_calls"):
        raise invalid_value(
            f"messages[{len(body.messages) - 1}]",
            "has calls, so results must follow it, or a text to continue",
        )
    return messages


def ending_of(messages: Sequence[Mapping[str, Any]]) -> PromptEnding:
    """Return how the prompt ends: Anthropic's API continues a last message of the assistant."""
    return PromptEnding(continue_final_message=messages[-1]["role"] == "assistant")


def _turns(message: InputMessage, where: str, shows_reasoning: bool, ignored: Ignored) -> list[Json]:
    """Return one turn as messages: its results come first, each as a message of its own."""
    role = message.role
    if isinstance(message.content, str):
        # An empty system message only changes settings, such as the effort.
        return [{"role": role, "content": message.content}] if message.content or role != "system" else []
    results: list[Json] = []
    calls: list[Json] = []
    texts: list[str] = []
    reasoning: list[str] = []
    for number, block in enumerate(message.content):
        place = f"{where}.content[{number}]"
        if not check_kind(BLOCKS, block, place, ignored):
            continue
        kind = block["type"]
        if kind not in _OF_ROLE[role]:
            raise invalid_value(
                f"{place}.type", f"is {kind}; blocks of the {role} are {', '.join(_OF_ROLE[role])}"
            )
        if kind in ("text", "document", "search_result"):
            texts.append(_block_text(block, place, ignored))
            continue
        ignored.add_unknown(block, _KEYS[kind], place)
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "tool_result":
            results.append(_result(block, place, ignored))
        elif kind == "thinking" and shows_reasoning:
            reasoning.append(string_field(block, "thinking", place))
        elif kind == "thinking":
            ignored.add(place, "this model's chat template does not show earlier reasoning")
    content = PART_SEPARATOR.join(texts)
    if role == "assistant":
        turn: Json = {"role": role, "content": content or None if calls else content}
        turn |= {"tool_calls": calls} if calls else {}
        turn |= {"reasoning_content": PART_SEPARATOR.join(reasoning)} if reasoning else {}
        return [turn]
    if role == "system":
        return [{"role": role, "content": content}] if texts else []
    return [*results, *([{"role": role, "content": content}] if texts or not results else [])]


def _call(block: Mapping[str, Any], where: str) -> Json:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid_value(f"{where}.input", "must be an object")
    function = {
        "name": string_field(block, "name", where),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": string_field(block, "id", where), "type": "function", "function": function}


def _result(block: Mapping[str, Any], where: str, ignored: Ignored) -> Json:
    content = block.get("content")
    text = "" if content is None else _texts(content, f"{where}.content", ignored, references=True)
    if block.get("is_error"):  # chat templates have no field for it
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": string_field(block, "tool_use_id", where), "content": text}


def _texts(content: object, where: str, ignored: Ignored, *, references: bool = False) -> str:
    """Return a string, or the text of blocks; ``references``: also the names of tools that they refer to."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise invalid_value(where, "must be a string or a list of blocks")
    texts = []
    for number, block in enumerate(content):
        place = f"{where}[{number}]"
        if not isinstance(block, dict):
            raise invalid_value(place, "must be an object")
        if not check_kind(BLOCKS, block, place, ignored):
            continue
        if references and block["type"] == "tool_reference":
            ignored.add_unknown(block, _KEYS["tool_reference"], place)
            texts.append(f"The tool {string_field(block, 'tool_name', place)} is available now.")
        else:
            texts.append(_block_text(block, place, ignored))
    return PART_SEPARATOR.join(texts)


def _block_text(block: Mapping[str, Any], where: str, ignored: Ignored) -> str:
    """Return the text of a block of text, of a document or of a search result."""
    kind = block["type"]
    if kind == "text":
        ignored.add_unknown(block, _KEYS[kind], where)
        return string_field(block, "text", where)
    if kind not in ("document", "search_result"):
        raise invalid_value(f"{where}.type", f"is {kind}; it must be text, document or search_result")
    ignored.add_unknown(block, _KEYS[kind], where)
    head = [block.get(name) for name in ("title", "context" if kind == "document" else "source")]
    if kind == "search_result":
        text = _texts(block.get("content"), f"{where}.content", ignored)
    else:
        text = _document_text(block.get("source"), f"{where}.source", ignored)
    return PART_SEPARATOR.join([*(line for line in head if isinstance(line, str) and line), text])


def _document_text(source: object, where: str, ignored: Ignored) -> str:
    kind = source.get("type") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "text":
        return string_field(source, "data", where)
    if isinstance(source, dict) and kind == "content":
        return _texts(source.get("content"), f"{where}.content", ignored)
    raise invalid_value(f"{where}.type", f"is {kind!r:.60}; {_READS_TEXT}: sources of type text and content")


def _join(message: Json, messages: list[Json]) -> None:
    """Append a message; consecutive turns of one role are one turn, as Anthropic documents."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] in ("tool", "system"):
        messages.append(message)
        return
    for name in ("content", "reasoning_content"):
        parts = [part for part in (last.get(name), message.get(name)) if part]
        if name in last or parts:
            last[name] = PART_SEPARATOR.join(parts) or (None if message["role"] == "assistant" else "")
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
