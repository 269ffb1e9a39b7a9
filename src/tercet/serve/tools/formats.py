r"""Grammars of tool calls, for outputs that must be calls or whose calls must be valid.

The grammars know reasoning. Where a model may answer in text, a call begins only behind it, so what the model
considers there is text. Where an output must consist of calls, or is JSON unless it calls, there is none: a
prompt that has opened it is answered by its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from tercet.data.reasoning import reasoning_of
from tercet.data.tool_format import ToolFormat, special_markers
from tercet.engine.grammar import Grammar
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.any_schema import form_or_call

_ANY_TEXT = r"(.|\n)*"
Literal = Callable[[str], str]


def call_grammar(
    form: ToolFormat,
    functions: Mapping[str, Grammar],
    tokenizer: Tokenizer,
    *,
    required: bool,
    several: bool,
    otherwise: Grammar | None = None,
    reasoning: str | None = None,
) -> Grammar:
    """Return the grammar of outputs that call functions in a format.

    Args:
        form: the format.
        functions: the grammar of the arguments by the function's name.
        tokenizer: of the model.
        required: whether the output must consist of calls.
        several: whether more than one call is allowed, where the format itself allows it.
        otherwise: the grammar of outputs without calls, where calls are not required; None: any text.
        reasoning: the marker that ends reasoning which the prompt has opened; None: it has opened none.
    """
    before, between, after = _around(form)
    special = special_markers(tokenizer)

    def literal(text: str) -> str:
        return _literal(text, special)

    free = not required and otherwise is None
    rules = []
    for number, (name, arguments) in enumerate(functions.items()):
        call = _call(form, name, arguments.in_lark(), literal)
        if free and not form.trigger:
            rules.append(f"call_{number}: HEAD_{number} {call[1]}\nHEAD_{number}: /[ \\n]{{0,3}}/ {call[0]}")
        else:
            rules.append(f"call_{number}: {' '.join(call)}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    more = f" ({literal(between)} call)*" if several and form.several else ""
    rules.append(f"calls: {literal(before)} call{more} {literal(after)}")
    if otherwise is not None and not form.trigger:
        # Both begin with the same characters, which only one schema can keep apart.
        ended = literal(end_of_reasoning(reasoning)) if reasoning else ""
        return Grammar.lark(f"start: {ended} {form_or_call(otherwise, functions, form.arguments).in_lark()}")
    if not free:
        ended = literal(end_of_reasoning(reasoning)) if reasoning else ""
        choice = "" if required else "otherwise | "
        rules.insert(0, f"start: {ended} ({choice}{literal(form.trigger)} calls)")
        if otherwise is not None:
            rules.append(f"otherwise: {otherwise.in_lark()}")
    else:
        markers = set(special.values())
        body = _body(form, functions, reasoning_of(tokenizer), markers, literal)
        rules = [*_opened(reasoning, markers, literal), *body, f"ANY: /{_ANY_TEXT}/", *rules]
    return Grammar.lark("\n".join(rules))


def end_of_reasoning(marker: str) -> str:
    """Return the text that ends reasoning at once, as templates write it for answers without."""
    return f"\n{marker}\n\n"


def _opened(reasoning: str | None, special: set[str], literal: Literal) -> list[str]:
    """Return the rules of the start: the rest of reasoning that the prompt has opened, then ``body``."""
    if reasoning is None:
        return ["start: body"]
    if reasoning in special:
        return [f"start: ANY ({literal(reasoning)} body)?"]
    return ["start: ANY | rest body", f"rest[lazy]: ANY {literal(reasoning)}"]


def _body(
    form: ToolFormat,
    functions: Mapping[str, Grammar],
    reasoning: Mapping[str, str],
    special: set[str],
    literal: Literal,
) -> list[str]:
    """Return the rules of ``body``: text with reasoning, and calls outside of it."""
    hidden = {begin: end for begin, end in reasoning.items() if begin in special and end in special}
    spelled = {begin: end for begin, end in reasoning.items() if begin not in special and end not in special}
    again = [f"thought_{number} body" for number in range(len(spelled))]
    rules = []
    first = r"\s*" if not form.trigger else _ANY_TEXT  # where reasoning may begin
    for number, (begin, end) in enumerate(spelled.items()):
        begin, end = _pattern(begin), _pattern(end)
        rules.append(f"thought_{number}[lazy]: /{first}{begin}{_ANY_TEXT}{end}/")
    text = f"/{_ANY_TEXT}/"
    if form.trigger:
        # No trigger is one behind the beginning of reasoning, as long as that has not ended.
        outside = "".join(rf" & ~/{_ANY_TEXT}{_pattern(begin)}{_ANY_TEXT}/" for begin in spelled)
        rules.append(f"OUTSIDE: {text}{outside}")
        if form.trigger in special:
            calls = f"OUTSIDE {literal(form.trigger)} calls"
        else:
            calls = "opening calls"
            rules.append(f"opening[lazy]: OUTSIDE {literal(form.trigger)}")
    else:
        calls, text = "calls", f"{text} & ~/{_beginning(form, functions)}{_ANY_TEXT}/"
    before = "TEXT " if form.trigger else ""
    again += [f"{before}{literal(begin)} ANY ({literal(end)} body)?" for begin, end in hidden.items()]
    return [" | ".join([f"body: TEXT | {calls}", *again]), *rules, f"TEXT: {text}"]


def _beginning(form: ToolFormat, functions: Mapping[str, Grammar]) -> str:
    """Return the regular expression of texts that begin as a call, for formats without a trigger."""
    if form.style == "bare":
        return r"\s*\{"  # these models write nothing else as JSON
    names = "|".join(re.escape(name) for name in functions)
    return rf'\s*\{{\s*"name"\s*:\s*"({names})"'


def _around(form: ToolFormat) -> tuple[str, str, str]:
    """Return the text before the first call (after the trigger), between two calls, and after the last."""
    if form.style == "hermes":
        return "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
    if form.style == "mistral":
        return "[", ", ", "]"
    if form.style == "named":
        return "", "[TOOL_CALLS]", ""
    return "", "\n" if form.style == "lines" else "; ", ""


def _call(form: ToolFormat, name: str, arguments: str, literal: Literal) -> tuple[str, str]:
    """Return the beginning and the rest of a call in Lark; ``arguments`` are its arguments in Lark."""
    if form.style == "named":
        head = f"{literal(name + '[CALL_ID]')} /[A-Za-z0-9]{{9}}/" if form.identified else literal(name)
        return head, f"{literal('[ARGS]')} {arguments}"
    head = literal(f'{{"name": "{name}", "{form.arguments}": ')
    return head, f"{arguments} {literal('}')}"


def _literal(text: str, special: Mapping[int, str]) -> str:
    """Return Lark for exactly ``text``, which may contain markers that are special tokens."""
    ids = {marker: token for token, marker in special.items()}
    parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text) if ids else [text]
    terms: list[str] = []
    for part in parts:
        if part in ids:
            terms.append(f"<[{ids[part]}]>")
        elif part:
            terms.append(json.dumps(part, ensure_ascii=False))
    return " ".join(terms)


def _pattern(text: str) -> str:
    """Return a marker as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")
