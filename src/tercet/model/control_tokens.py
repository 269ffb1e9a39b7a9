"""Control tokens in the text of a conversation: which there are, and how they stay text.

A chat template writes control tokens around messages, such as ``<|im_end|>``. A message that spells one of them
would otherwise end its own turn and begin another. So the spellings in messages, tools and template variables
are ordinary text, and only what the template writes is a control token.

Control tokens are the special tokens, and the other added tokens that the template writes (``<tool_call>`` of
Qwen). An assistant's own text is an exception: a model writes some of them itself, so in its content and
reasoning these remain tokens:

- added tokens that are not special, and special ones that name thinking or that the template writes inside the
  assistant's turn around calls and reasoning;
- but no token that the template writes around turns, which would end the turn.

Before rendering, each spelling is replaced by digits that no text can guess, and afterwards by itself again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tercet.errors import UserError
from tercet.model.chat_template import REASONING, literal_text, render_template
from tercet.model.control_text import ControlText
from tercet.model.template_needs import TemplateNeeds, as_parts, template_needs

if TYPE_CHECKING:
    import tokenizers

Value = TypeVar("Value")
Beginnings = dict[str, "Beginnings"]  # characters and what follows them; "" where a token ends

# Digits only, so that no template escapes them or changes their case. The 9 stands only at the beginning, so
# digits before it can't move the place where it is found.
_NONCE = "9" + "".join(str(secrets.randbelow(9)) for _ in range(24))
_PLACEHOLDER = re.compile(_NONCE + r"(\d{5})")
_PROBE, _VALUE, _RESULT = "Qx7probex7Q", "Qx7valuex7Q", "Qx7resultx7Q"
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


class ControlTokens:
    """The control tokens of a tokenizer with one of its chat templates.

    Args:
        added: the tokenizer's added tokens.
        template: the text of the chat template.
        named_tokens: ``bos_token`` and the like.
    """

    def __init__(
        self, added: Sequence[tokenizers.AddedToken], template: str, named_tokens: Mapping[str, str]
    ) -> None:
        turns, answer = _written(template, named_tokens, template_needs(template, named_tokens))
        written = "\0".join([literal_text(template), turns, answer])
        tokens = [
            token.content
            for token in added
            if token.special or (token.content in written and not token.content.isspace())
        ]
        special = {token.content for token in added if token.special}
        around = {text for text in tokens if text in turns and "think" not in text.lower()}
        around |= set(named_tokens.values())
        within = {
            text
            for text in tokens
            if text not in around and (text not in special or text in answer or _of_answers(text))
        }
        self.tokens = tokens
        self._numbers = {text: number for number, text in enumerate(self.tokens)}
        self._all = token_pattern(self.tokens)
        self._turns = token_pattern(text for text in self.tokens if text not in within)

    def spelled(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._all.search(text) is not None

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with digits in place of every control token that their text spells."""
        return [self._message(message) for message in messages]

    def mark_value(self, value: Value) -> Value:
        """Return tools, or another value for the template, with digits in place of spelled control tokens."""
        marked: Value = self._mark(value, self._all)
        return marked

    def unmark(self, text: str) -> ControlText:
        """Return a rendered text with its spellings in place of the digits."""
        pieces = _PLACEHOLDER.split(text)
        parts, literal, length = [pieces[0]], [], len(pieces[0])
        for number, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            token = self.tokens[int(number)]
            literal.append((length, length + len(token)))
            parts += [token, rest]
            length += len(token) + len(rest)
        return ControlText("".join(parts), tuple(literal))

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        own = ("content", *REASONING) if message.get("role") == "assistant" else ()
        return {
            self._mark(key, self._all): self._content(value, self._turns if key in own else self._all)
            for key, value in message.items()
        }

    def _content(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if not isinstance(value, list) or not all(
            isinstance(part, dict) and "text" in part for part in value
        ):
            return self._mark(value, pattern)
        texts = [part["text"] for part in value]
        whole = "".join(texts)
        if len(pattern.findall(whole)) != sum(len(pattern.findall(text)) for text in texts):
            value = as_parts(whole)  # a template that writes the parts side by side would complete a token
        return self._mark(value, pattern)

    def _mark(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._placeholder, value)
        if isinstance(value, Mapping):
            return {self._mark(key, pattern): self._mark(entry, pattern) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(entry, pattern) for entry in value]
        return value

    def _placeholder(self, match: re.Match[str]) -> str:
        return f"{_NONCE}{self._numbers[match[0]]:05d}"


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of the tokens at each place of a text.

    Tokens share the beginnings of the pattern: with a thousand of them a search stays as fast as with one.
    """
    beginnings: Beginnings = {}
    for token in tokens:
        place = beginnings
        for character in token:
            place = place.setdefault(character, {})
        place[""] = {}
    return re.compile(_alternatives(beginnings) or "(?!)")


def _alternatives(beginnings: Beginnings) -> str:
    branches = [re.escape(text) + _alternatives(rest) for text, rest in beginnings.items() if text]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{pattern})?" if "" in beginnings else pattern


def _of_answers(token: str) -> bool:
    """Whether a token belongs to answers by its name: marks of thinking, and Llama's of calls."""
    return "think" in token.lower() or token == "<|python_tag|>"


def _written(template: str, named_tokens: Mapping[str, str], needs: TemplateNeeds) -> tuple[str, str]:
    """Return what the template writes around turns, and what it writes inside an assistant's turn."""

    def text(*messages: Mapping[str, Any], prompt: bool = False, tools: bool = False) -> str:
        try:
            return render_template(
                template,
                messages,
                [_TOOL] if tools else None,
                prompt,
                named_tokens,
                null_content=needs.empty == "null",
            )
        except UserError:
            return ""

    def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
        return {"role": role, "content": as_parts(content) if role in needs.parts else content, **fields}

    user, answer = message("user", "hi"), message("assistant", _PROBE)
    arguments: Any = {"key": _VALUE} if needs.objects else f'{{"key": "{_VALUE}"}}'
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    calling = {**message("assistant", ""), "tool_calls": [call]}
    if needs.empty != "text":
        calling["content"] = None
    result = message("tool", _RESULT, name="f", tool_call_id="abcdefghi")
    turns = [
        text(message("system", "hi"), user, answer, user, prompt=True),
        text(user, answer, user, prompt=True),
    ]
    turns += [text(user, prompt=True), text(user, tools=True)]
    called, resulted = text(user, calling), text(user, calling, result)
    after_call = called.rpartition(_VALUE)[2]
    after_result = resulted.rpartition(_VALUE)[2]
    if _RESULT in after_result:
        shared = next(
            (n for n, pair in enumerate(zip(after_call, after_result, strict=False)) if len(set(pair)) > 1), 0
        )
        turns.append(after_result[shared or len(after_call) :])
    reasoned = (
        text(user, {**calling, "reasoning_content": "hm"}),
        text(user, {**answer, "reasoning_content": "hm"}),
    )
    return "\0".join(turns), "\0".join([called, *reasoned])
