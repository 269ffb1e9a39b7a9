r"""The formats in which models write tool calls, detected from their chat templates.

=========  ====================================================================  =====================
hermes     ``<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>``        Hermes, Qwen 2.5 and 3
mistral    ``[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]``                  Mistral 0.3, Nemo
named      ``[TOOL_CALLS]f[ARGS]{…}``, ``[CALL_ID]`` between them                Mistral since 2025
bare       ``{"name": "f", "parameters": {…}}``, ``<|python_tag|>`` before it    Llama 3.1 to 3.3
lines      ``{"name": "f", "arguments": {…}}``, one call a line                  all others
=========  ====================================================================  =====================

A template is a program, so detection runs it: it renders a conversation that contains a call, and the result
shows the format, whether arguments must be an object or a string, and whether several calls may stand side by
side. Templates that lose the call, refuse it, or write it in another way have no format. Their models get `GENERIC`,
which `tercet.data.generic_tools` describes to them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tercet.data.reasoning import REASONING_MARKERS
from tercet.errors import UserError
from tercet.model.chat_template import render_template
from tercet.model.template_needs import TemplateNeeds, as_parts, template_needs
from tercet.model.tokenizer import Tokenizer

Style = Literal["hermes", "mistral", "named", "bare", "lines"]

# Markers of all formats. Decoded text lacks those that are special tokens of the tokenizer.
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")
TRIGGERS: dict[Style, str] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "named": "[TOOL_CALLS]",
    "bare": "",
    "lines": "",
}


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    style: one of the formats above.
    arguments: the key of a call's arguments in its JSON.
    objects: whether the template needs the arguments of earlier calls as objects, or as strings of JSON.
    several: whether an answer may contain more than one call.
    identified: whether a call contains an identifier (``f[CALL_ID]a1b2c3d4e[ARGS]{…}``).
    """

    style: Style
    arguments: str = "arguments"
    objects: bool = True
    several: bool = True
    identified: bool = False

    @property
    def trigger(self) -> str:
        """The text that begins a call; "" where a call is the whole answer."""
        return TRIGGERS[self.style]


GENERIC = ToolFormat("lines")


def special_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the markers of calls and of reasoning that are special tokens of this tokenizer, by id."""
    special = set(tokenizer.special_tokens)
    ids = {tokenizer.id_of(marker): marker for marker in (*MARKERS, *REASONING_MARKERS) if marker in special}
    return {token: marker for token, marker in ids.items() if token is not None}


# Detection

_NAME, _KEY, _VALUE = "probe_function", "probe_argument", "probe value"
_QUESTION = "probe question"
_OBJECT = re.escape(json.dumps({_KEY: _VALUE}))
_JSON_CALL = rf'\{{"name": "{_NAME}", "(?P<key>arguments|parameters)": {_OBJECT}'
_WRITTEN: dict[Style, str] = {
    "hermes": rf"<tool_call>\s*{_JSON_CALL}\}}\s*</tool_call>",
    "mistral": rf"\[TOOL_CALLS\]\s*\[{_JSON_CALL}",
    "named": rf"\[TOOL_CALLS\]\s*{_NAME}(?P<id>\[CALL_ID\]\w+)?\[ARGS\]\s*{_OBJECT}",
    # Only at the beginning of the answer: anywhere else JSON is ordinary text.
    "bare": rf"\A\s*(<\|python_tag\|>)?\s*{_JSON_CALL}\}}",
}


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """Return the format of this tokenizer's chat template; None where it has no supported format."""
    template = tokenizer.templates.get("tool_use", tokenizer.chat_template)
    if template is None:
        return None
    return _detected(template, tuple(sorted(tokenizer.named_tokens.items())))


@functools.lru_cache(maxsize=32)
def _detected(template: str, named_tokens: tuple[tuple[str, str], ...]) -> ToolFormat | None:
    special = dict(named_tokens)
    # The template must also show the tools to the model.
    question = _rendered(template, [_user()], special, add_generation_prompt=True)
    if question is None or _NAME not in question:
        return None
    opening = _after_user(question)
    for objects in (True, False):
        whole = _rendered(template, [_user(), _calls(1, objects)], special)
        if whole is None:
            continue
        answer = _after_user(whole).removeprefix(opening)
        for style, pattern in _WRITTEN.items():
            if match := re.search(pattern, answer):
                two = _rendered(template, [_user(), _calls(2, objects)], special)
                several = two is not None and two.count(_NAME) > whole.count(_NAME)
                groups = match.groupdict()
                key = groups.get("key") or "arguments"
                return ToolFormat(style, key, objects, several, groups.get("id") is not None)
    return None


def _after_user(text: str) -> str:
    return text.rpartition(_QUESTION)[2]


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _QUESTION}


def _calls(count: int, objects: bool) -> dict[str, Any]:
    arguments: Any = {_KEY: _VALUE} if objects else json.dumps({_KEY: _VALUE})
    calls = [
        # Mistral's templates accept identifiers of nine letters and digits only.
        {
            "id": f"probe000{number}",
            "type": "function",
            "function": {"name": _NAME, "arguments": arguments},
        }
        for number in range(count)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _shaped(message: Mapping[str, Any], needs: TemplateNeeds) -> dict[str, Any]:
    """Return a message with its content in the form that the template needs."""
    content = as_parts(message["content"]) if message["role"] in needs.parts else message["content"]
    return {**message, "content": None if "tool_calls" in message and needs.empty != "text" else content}


def _rendered(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: dict[str, str],
    add_generation_prompt: bool = False,
) -> str | None:
    parameters = {
        "type": "object",
        "properties": {_KEY: {"type": "string", "description": "an argument"}},
        "required": [_KEY],
    }
    tool = {
        "type": "function",
        "function": {"name": _NAME, "description": "a function", "parameters": parameters},
    }
    needs = template_needs(template, special)
    shaped = [_shaped(message, needs) for message in messages]
    try:
        return render_template(
            template, shaped, [tool], add_generation_prompt, special, null_content=needs.empty == "null"
        )
    except UserError:
        return None
