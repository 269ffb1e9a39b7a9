"""Loss masks of conversations: training covers exactly the assistant's answers, with their stop tokens.

The conversation is prepared, rendered and encoded once, as at inference, and character positions decide which tokens
are supervised. Three properties of each assistant turn are verified on the rendered text. A template that
violates one of them is refused with the reason:

1. The prompt at inference (the turns before, with the generation prompt) is a prefix of the training text,
   so the model sees the same prefix in both.
2. Rendered with a sentinel in place of the answer, the turn is prompt + any text + answer + ending, so no
   text of another turn is trained on.
3. The ending contains a special token, so the model learns to stop.

Some templates render a turn differently once later turns follow, for example because they drop earlier
reasoning. They give a training example for each turn instead of one for the conversation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tercet.data.batches import Encoded
from tercet.data.conversation import Message
from tercet.data.prompt_tokens import ChatInput, prepare_conversation, with_text
from tercet.errors import UserError
from tercet.model.control_text import ControlTokenMode
from tercet.model.tokenizer import Tokenizer

_TRAINED = "trained on"  # the mark of such a message
SENTINEL = "Qx7sentinel7xQ"  # letters and digits only, so that no template escapes or strips it


@dataclass(frozen=True)
class Span:
    """Supervised characters [start, end) of a text, and the stop token at their end."""

    start: int
    end: int
    stop: str


@dataclass(frozen=True)
class Rendered:
    """A training text and its supervised spans. A `ControlText` says which spelled control tokens are text."""

    text: str
    spans: tuple[Span, ...]
    special: bool = False  # add the tokenizer's special tokens when encoding; a template writes its own


def mask_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    supervised: Collection[int] | None = None,
    control_tokens: ControlTokenMode = "text",
    **variables: Any,
) -> list[Rendered]:
    """Return the training texts of a conversation: one, or one per turn if the template requires it.

    Args:
        tokenizer: holds the chat template.
        messages: the conversation, as `read_messages` returns it.
        tools: function descriptions for the template, as `read_tools` returns them.
        supervised: indices of the messages to train on; assistant messages elsewhere are context only. None:
            every assistant message. Indices of other messages have no effect.
        control_tokens: as for `prepare_conversation`.
        variables: further variables of the template.

    Raises:
        UserError: there is no assistant message to train on, or the template violates one of the three properties.
    """
    # The template may need more messages or fewer than the conversation has, so each carries its own mark.
    marked = [
        {**message, _TRAINED: True}
        if message.get("role") == "assistant" and (supervised is None or index in supervised)
        else message
        for index, message in enumerate(messages)
    ]
    if not any(_TRAINED in message for message in marked):
        raise UserError("the conversation has no assistant message, so there is nothing to train on")

    prepared = prepare_conversation(tokenizer, marked, tools, control_tokens=control_tokens, **variables)
    turns = [
        turn
        for turn, message in enumerate(prepared.messages)
        if message.pop(_TRAINED, False) and message["role"] == "assistant"
    ]
    alone = []
    for turn in turns:
        shown = prepared.ordered(prepared.messages[: turn + 1])
        text = prepared.render(shown)
        prompt = prepared.render(prepared.ordered(prepared.messages[:turn], True), True)
        alone.append((text, _span(prepared, shown, text, _checked_start(prepared, text, prompt, turn))))
    whole = alone[-1][0]
    # A single text serves all turns only if each turn's own text is a prefix of the last turn's.
    if all(whole.startswith(text) for text, _ in alone):
        return [_rendered(prepared, whole, [span for _, span in alone])]
    return [_rendered(prepared, text, [span]) for text, span in alone]


def _rendered(prepared: ChatInput, text: str, spans: Sequence[Span]) -> Rendered:
    """Return a training text without marks, with its spans at their places there."""
    finished = prepared.finish(text)
    if finished.literal:
        spans = [
            Span(len(prepared.finish(text[: span.start])), len(prepared.finish(text[: span.end])), span.stop)
            for span in spans
        ]
    return Rendered(finished, tuple(spans))


def _checked_start(prepared: ChatInput, text: str, prompt: str, turn: int) -> int:
    """Return where the answer begins; check that the prompt at inference is a prefix of the training text."""
    if text.startswith(prompt):
        return len(prompt)
    differs = next(
        (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))
    )
    at_inference, in_conversation = (
        str(prepared.finish(part[max(0, differs - 12) : differs + 24])) for part in (prompt, text)
    )
    raise UserError(
        f"the chat template can't be trained on: message {turn + 1} is prompted with {at_inference!r} at inference "
        f"but rendered as {in_conversation!r} in a conversation (character {differs})"
    )


def _span(prepared: ChatInput, messages: list[Message], text: str, start: int) -> Span:
    """Return the span of the last message's answer; check that it holds nothing else and ends with a stop token."""
    turn = len(messages)
    probe = with_text(messages[-1], SENTINEL)
    probe.pop("tool_calls", None)
    marked = prepared.render([*messages[:-1], probe])
    if marked.count(SENTINEL) != 1:
        raise UserError(
            f"the chat template can't be trained on: it renders the assistant's message {turn} "
            f"{marked.count(SENTINEL)} times"
        )
    before, _, ending = marked.partition(SENTINEL)
    if not before.startswith(text[:start]) or not text.endswith(ending):
        raise UserError(
            f"the chat template can't be trained on: the text around the assistant's message {turn} "
            f"depends on its content"
        )
    stops = [
        (ending.find(token), -len(token), token)
        for token in prepared.tokenizer.special_tokens
        if token in ending
    ]
    if not stops:
        raise UserError(
            f"the chat template can't be trained on: it ends the assistant's turn with {ending!r}, which holds "
            f"no special token, so the model would never learn to stop"
        )
    position, _, stop = min(stops)
    return Span(start, len(text) - len(ending) + position + len(stop), stop)


def encode_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], special: bool = False
) -> Encoded:
    """Encode ``text`` once; a token is supervised if any of its characters lies in a span.

    Args:
        tokenizer: encodes the text.
        text: the training text.
        spans: supervised characters, as [start, end).
        special: add the tokenizer's BOS, as a plain prompt has it at inference; it is not supervised.
    """
    ids, offsets = tokenizer.encode_with_offsets(text, special=special)
    while special and len(ids) > 1 and offsets[-1] == (0, 0):
        ids, offsets = ids[:-1], offsets[:-1]  # the tokenizer added a stop token; the text already has one
    supervised = []
    span = 0
    ordered = sorted(spans)
    for start, end in offsets:
        while span < len(ordered) and ordered[span][1] <= start:
            span += 1
        inside = span < len(ordered) and start < ordered[span][1] and end > ordered[span][0]
        supervised.append(inside and end > start)
    return Encoded.of(ids, supervised)
