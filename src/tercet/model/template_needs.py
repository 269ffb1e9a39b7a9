"""The form of messages that a chat template needs, found by running it.

A template is a program, so reading it tells little. Each question is a small conversation with markers in the place
in question: a marker that is missing from the result shows that the template leaves that place out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tercet.errors import UserError
from tercet.model.chat_template import render_template

# Letters and digits only, so that no template escapes, strips or divides them.
_TEXT, _NAME, _FUNCTION, _KEY, _VALUE = "Qx7textx7Q", "Qx7namex7Q", "Qx7callx7Q", "Qx7keyx7Q", "Qx7valuex7Q"
_LONG_ID, _SHORT_ID = "call_0123456789ab", "abcdefghi"
_TOOL = {
    "type": "function",
    "function": {
        "name": "Qx7toolx7Q",
        "description": "a function",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "a word"}}},
    },
}
Empty = Literal["text", "null", "absent"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TemplateNeeds:
    """What a chat template needs, so that it shows every part of a conversation.

    parts: roles whose content it reads as a list of parts only.
    names: roles whose ``name`` it shows.
    calls: whether it shows calls and their results.
    objects: whether it needs the arguments of calls as objects, or as strings of JSON.
    short_ids: whether it accepts identifiers of nine letters and digits only, as Mistral's do.
    empty: what stands in place of the content in a message that has only calls: an empty text, null or nothing.
    """

    parts: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    calls: bool = False
    objects: bool = True
    short_ids: bool = False
    empty: Empty = "text"


def template_needs(template: str, named_tokens: Mapping[str, str]) -> TemplateNeeds:
    """Return what a chat template needs; ``named_tokens`` are ``bos_token`` and the like."""
    return _found(template, tuple(sorted(named_tokens.items())))


def as_parts(text: str) -> list[dict[str, str]]:
    """Return a text as a list of one part."""
    return [{"type": "text", "text": text}]


@functools.lru_cache(maxsize=64)
def _found(template: str, named_tokens: tuple[tuple[str, str], ...]) -> TemplateNeeds:
    probe = _Probe(template, dict(named_tokens))
    parts = {role for role in ("user", "system", "assistant") if probe.reads_parts_only(role)}
    probe.parts = frozenset(parts)
    names = frozenset(role for role in ("user", "system", "assistant") if probe.shows_name(role))
    for empty in ("text", "null", "absent"):
        for objects in (True, False):
            if (found := probe.calls(empty, objects)) is not None:
                return TemplateNeeds(names=names, calls=True, objects=objects, empty=empty, **found)
    return TemplateNeeds(probe.parts, names)


class _Probe:
    """Renders the conversations that answer the questions."""

    def __init__(self, template: str, named_tokens: Mapping[str, str]) -> None:
        self.template, self.named_tokens = template, named_tokens
        self.parts: frozenset[str] = frozenset()

    def text(self, *messages: Mapping[str, Any], tools: bool = False, null_content: bool = False) -> str:
        """Return the rendered conversation; "" where the template refuses it."""
        try:
            return render_template(
                self.template,
                messages,
                [_TOOL] if tools else None,
                special_tokens=self.named_tokens,
                null_content=null_content,
            )
        except UserError:
            return ""

    def message(self, role: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
        return {"role": role, "content": as_parts(text) if role in self.parts else text, **fields}

    def among_others(self, message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return a conversation that contains the message and that templates accept."""
        if message["role"] == "user":
            return [message]
        user = self.message("user")
        return [message, user] if message["role"] == "system" else [user, message]

    def reads_parts_only(self, role: str) -> bool:
        if role != "user":  # found before
            self.parts = frozenset({"user"} if self.reads_parts_only("user") else ())
        whole, parts = (
            self.text(*self.among_others({"role": role, "content": content}))
            for content in (_TEXT, as_parts(_TEXT))
        )
        return _TEXT not in whole and _TEXT in parts

    def shows_name(self, role: str) -> bool:
        return _NAME in self.text(*self.among_others(self.message(role, name=_NAME)))

    def calls(self, empty: Empty, objects: bool) -> dict[str, Any] | None:
        """Return further needs if calls and results are shown with such contents and arguments."""
        arguments: Any = {_KEY: _VALUE} if objects else json.dumps({_KEY: _VALUE})

        def conversation(call_id: str, parts: bool) -> str:
            function = {"name": _FUNCTION, "arguments": arguments}
            call = {"id": call_id, "type": "function", "function": function}
            message = {**self.message("assistant", ""), "tool_calls": [call]}
            if empty != "text":
                message["content"] = None
            result = {
                "role": "tool",
                "tool_call_id": call_id,
                "name": _FUNCTION,
                "content": as_parts(_TEXT) if parts else _TEXT,
            }
            return self.text(self.message("user"), message, result, tools=True, null_content=empty == "null")

        nulls = _nulls(self.text(self.message("user"), tools=True))
        for parts in (False, True):
            one = conversation(_SHORT_ID, parts)
            if _TEXT in one and _shows_call(one) and _nulls(one) == nulls:
                short = not _shows_call(conversation(_LONG_ID, parts)) or "[TOOL_CALLS]" in self.template
                roles = self.parts | ({"tool"} if parts else frozenset())
                return {"parts": roles, "short_ids": short}
        return None


def _shows_call(text: str) -> bool:
    """Whether a call stands in a text, with its arguments encoded once."""
    written = _FUNCTION in text and _KEY in text.partition(_FUNCTION)[2] and _VALUE in text
    return (
        written and f'\\"{_KEY}' not in text and f"'{_KEY}'" not in text
    )  # encoded twice; printed by Python


def _nulls(text: str) -> int:
    return len(re.findall(r"\b(?:None|null)\b", text))
