"""Grammars of tool calls, for outputs that must be calls or whose calls must be valid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from tercet.data.tool_format import MARKERS, ToolFormat, special_markers
from tercet.engine.grammar import Grammar
from tercet.model.tokenizer import Tokenizer

_ANY_TEXT = r"/(.|\n)*/"


def call_grammar(
    form: ToolFormat,
    functions: Mapping[str, Grammar],
    tokenizer: Tokenizer,
    *,
    required: bool,
    several: bool,
    otherwise: Grammar | None = None,
) -> Grammar:
    """Return the grammar of outputs that call functions in a format.

    Args:
        form: the format.
        functions: the grammar of the arguments by the function's name.
        tokenizer: of the model.
        required: whether the output must consist of calls.
        several: whether more than one call is allowed, where the format itself allows it.
        otherwise: the grammar of outputs without calls, where calls are not required; None: any text.
    """
    before, between, after = _around(form)
    special = special_markers(tokenizer)

    def literal(text: str) -> str:
        return _literal(text, special)

    rules = []
    for number, (name, arguments) in enumerate(functions.items()):
        rules.append(f"call_{number}: {_call(form, name, arguments.in_lark(), literal)}")
    more = f" ({literal(between)} call)*" if several and form.several else ""
    calls = f"{literal(before)} call{more} {literal(after)}"
    if required:
        rules.insert(0, f"start: {literal(form.trigger)} {calls}")
    elif otherwise is not None:
        rules.insert(0, f"start: otherwise | {literal(form.trigger)} {calls}")
        rules.append(f"otherwise: {otherwise.in_lark()}")
    elif form.style == "bare":
        # Text that begins as a call must be one.
        rules.insert(0, f"start: TEXT | {calls}")
        rules.append(r"TEXT: /([^{\s](.|\n)*)?/")
    elif form.trigger in special.values():
        rules.insert(0, f"start: TEXT ({literal(form.trigger)} {calls})?")
        rules.append(f"TEXT: {_ANY_TEXT}")
    else:
        rules.insert(0, f"start: TEXT | opening {calls}")
        rules.append(f"opening[lazy]: TEXT {literal(form.trigger)}\nTEXT: {_ANY_TEXT}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    return Grammar.lark("\n".join(rules))


def _around(form: ToolFormat) -> tuple[str, str, str]:
    """Return the text before the first call (after the trigger), between two calls, and after the last."""
    if form.style == "hermes":
        return "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
    if form.style == "mistral":
        return "[", ", ", "]"
    if form.style == "named":
        return "", "[TOOL_CALLS]", ""
    return "", "; ", ""


def _call(form: ToolFormat, name: str, arguments: str, literal: Callable[[str], str]) -> str:
    """Return a call in Lark; ``arguments`` is the Lark expression of its arguments."""
    if form.style == "named":
        head = f"{literal(name + '[CALL_ID]')} /[A-Za-z0-9]{{9}}/" if form.identified else literal(name)
        return f"{head} {literal('[ARGS]')} {arguments}"
    head = literal(f'{{"name": "{name}", "{form.arguments}": ')
    return f"{head} {arguments} {literal('}')}"


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
