r"""The formats in which models write tool calls, detected from their chat templates.

=========  ====================================================================  =====================
hermes     ``<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>``        Hermes, Qwen 2.5 and 3
mistral    ``[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]``                  Mistral 0.3, Nemo
named      ``[TOOL_CALLS]f[ARGS]{…}``, ``[CALL_ID]`` between them                Mistral since 2025
bare       ``{"name": "f", "parameters": {…}}``, ``<|python_tag|>`` before it    Llama 3.1 to 3.3
=========  ====================================================================  =====================

A template is a program, so detection runs it: it renders a conversation that contains a call, and the result
shows the format, whether arguments must be an object or a string, and whether several calls may stand side by
side. Templates that lose the call, refuse it, or write it in another way have no format.

A format also provides the grammar of its calls, for outputs that must be calls or whose calls must be valid.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tercet.engine.grammar import Grammar
from tercet.errors import UserError
from tercet.model.chat_template import render_template
from tercet.model.tokenizer import Tokenizer

Style = Literal["hermes", "mistral", "named", "bare"]

# Markers of all formats. Decoded text lacks those that are special tokens of the tokenizer.
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")
TRIGGERS: dict[Style, str] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "named": "[TOOL_CALLS]",
    "bare": "",
}
_ANY_TEXT = r"/(.|\n)*/"


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

    # The text around calls, as the templates write it

    @property
    def _around(self) -> tuple[str, str, str]:
        """The text before the first call (after the trigger), between two calls, and after the last."""
        if self.style == "hermes":
            return "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
        if self.style == "mistral":
            return "[", ", ", "]"
        if self.style == "named":
            return "", "[TOOL_CALLS]", ""
        return "", "; ", ""

    def _call(self, name: str, arguments: str, literal: Callable[[str], str]) -> str:
        """Return a call in Lark; ``arguments`` is the Lark expression of its arguments."""
        if self.style == "named":
            head = f"{literal(name + '[CALL_ID]')} /[A-Za-z0-9]{{9}}/" if self.identified else literal(name)
            return f"{head} {literal('[ARGS]')} {arguments}"
        head = literal(f'{{"name": "{name}", "{self.arguments}": ')
        return f"{head} {arguments} {literal('}')}"

    def grammar(
        self,
        functions: Mapping[str, Grammar],
        tokenizer: Tokenizer,
        *,
        required: bool,
        several: bool,
        otherwise: Grammar | None = None,
    ) -> Grammar:
        """Return the grammar of outputs that call functions in this format.

        Args:
            functions: the grammar of the arguments by the function's name.
            tokenizer: of the model.
            required: whether the output must consist of calls.
            several: whether more than one call is allowed, where the format itself allows it.
            otherwise: the grammar of outputs without calls, where calls are not required; None: any text.
        """
        before, between, after = self._around
        special = special_markers(tokenizer)

        def literal(text: str) -> str:
            return _literal(text, special)

        rules = []
        for number, (name, form) in enumerate(functions.items()):
            rules.append(f"call_{number}: {self._call(name, form.in_lark(), literal)}")
        more = f" ({literal(between)} call)*" if several and self.several else ""
        calls = f"{literal(before)} call{more} {literal(after)}"
        if required:
            rules.insert(0, f"start: {literal(self.trigger)} {calls}")
        elif otherwise is not None:
            rules.insert(0, f"start: otherwise | {literal(self.trigger)} {calls}")
            rules.append(f"otherwise: {otherwise.in_lark()}")
        elif self.style == "bare":
            # Text that begins as a call must be one.
            rules.insert(0, f"start: TEXT | {calls}")
            rules.append(r"TEXT: /([^{\s](.|\n)*)?/")
        elif self.trigger in special.values():
            rules.insert(0, f"start: TEXT ({literal(self.trigger)} {calls})?")
            rules.append(f"TEXT: {_ANY_TEXT}")
        else:
            rules.insert(0, f"start: TEXT | opening {calls}")
            rules.append(f"opening[lazy]: TEXT {literal(self.trigger)}\nTEXT: {_ANY_TEXT}")
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
        return Grammar.lark("\n".join(rules))


def special_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the markers that are special tokens of this tokenizer, by id."""
    special = set(tokenizer.special_tokens)
    ids = {tokenizer.id_of(marker): marker for marker in MARKERS if marker in special}
    return {token: marker for token, marker in ids.items() if token is not None}


def _literal(text: str, special: Mapping[int, str]) -> str:
    """Return Lark for exactly ``text``, which may contain markers that are special tokens."""
    ids = {marker: token for token, marker in special.items()}
    parts = re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text)
    terms: list[str] = []
    for part in parts:
        if part in ids:
            terms.append(f"<[{ids[part]}]>")
        elif part:
            terms.append(json.dumps(part))
    return " ".join(terms)


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
    try:
        return render_template(template, messages, [tool], add_generation_prompt, special)
    except UserError:
        return None
