"""Which tokens of a conversation are trained on: exactly what the assistant says, its stop token too.

The conversation is rendered and encoded once, as at inference; character positions decide. For each
assistant turn three things are proven on the rendered text, and a template for which one of them
fails is refused with the reason:

1. what the model is given at inference (the turns before, with the generation prompt) is the start
   of the training text, so both see the same prefix;
2. the turn's rendering, seen with a sentinel in the answer's place, is prompt + something + answer +
   ending, so nothing of another turn is trained on;
3. the ending holds a special token, so the model learns to stop.

Templates that render a turn differently once later turns follow (they drop earlier reasoning, say)
give one training example a turn instead of one a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tercet.data.batches import Encoded
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

SENTINEL = "Qx7sentinel7xQ"  # letters and digits only, so that no template escapes or strips it

Message = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text that are trained on, and the stop token they end with."""

    start: int
    end: int
    stop: str


@dataclass(frozen=True)
class Rendered:
    """A training text and its supervised spans."""

    text: str
    spans: tuple[Span, ...]
    special: bool = False  # encoded with the tokenizer's own special tokens; a template writes its own


def mask_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    first: int = 0,
    **variables: Any,
) -> list[Rendered]:
    """The training texts of a conversation: usually one, or one a turn where the template needs it.

    first: assistant messages before this index are context only.

    Raises:
        UserError: there is no assistant message, or the template fails one of the proofs.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and i >= first]
    if not turns:
        raise UserError("the conversation has no assistant message, so there is nothing to train on")

    def render(upto: int, prompt: bool = False) -> str:
        return tokenizer.render(messages[:upto], add_generation_prompt=prompt, tools=tools, **variables)

    alone = []
    for turn in turns:
        text, prompt = render(turn + 1), render(turn, prompt=True)
        start = _proven_start(text, prompt, turn)
        alone.append(Rendered(text, (_span(tokenizer, messages, turn, text, start, tools, variables),)))
    whole = alone[-1].text
    # One text serves all turns only if each turn's own text is the beginning of the last one's.
    if all(whole.startswith(rendered.text) for rendered in alone):
        return [Rendered(whole, tuple(rendered.spans[0] for rendered in alone))]
    return alone


def _proven_start(text: str, prompt: str, turn: int) -> int:
    if text.startswith(prompt):
        return len(prompt)
    differs = next(
        (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))
    )
    raise UserError(
        f"the chat template can't be trained on: message {turn + 1} is prompted with "
        f"{prompt[max(0, differs - 12) : differs + 24]!r} at inference but rendered as "
        f"{text[max(0, differs - 12) : differs + 24]!r} in a conversation (character {differs})"
    )


def _span(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    turn: int,
    text: str,
    start: int,
    tools: list[Any] | None,
    variables: dict[str, Any],
) -> Span:
    probe = {**messages[turn], "content": SENTINEL}
    probe.pop("tool_calls", None)
    marked = tokenizer.render([*messages[:turn], probe], tools=tools, **variables)
    if marked.count(SENTINEL) != 1:
        raise UserError(
            f"the chat template can't be trained on: it renders the assistant's message {turn + 1} "
            f"{marked.count(SENTINEL)} times"
        )
    before, _, ending = marked.partition(SENTINEL)
    if not before.startswith(text[:start]) or not text.endswith(ending):
        raise UserError(
            f"the chat template can't be trained on: what surrounds the assistant's message {turn + 1} "
            f"depends on what it says"
        )
    places = [
        (ending.find(token), -len(token), token) for token in tokenizer.special_tokens if token in ending
    ]
    if not places:
        raise UserError(
            f"the chat template can't be trained on: it ends the assistant's turn with {ending!r}, which holds "
            f"no special token, so the model would never learn to stop"
        )
    place, _, stop = min(places)
    return Span(start, len(text) - len(ending) + place + len(stop), stop)


def encode_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], special: bool = False
) -> Encoded:
    """Encode ``text`` once; a token is supervised when any of its characters lies in a span.

    special: add the tokenizer's BOS, as a plain prompt gets it at inference; it is not trained on.
    """
    ids, offsets = tokenizer.encode_with_offsets(text, special=special)
    while special and len(ids) > 1 and offsets[-1] == (0, 0):
        ids, offsets = ids[:-1], offsets[:-1]  # a stop token of the tokenizer's own; the text has one
    supervised = []
    place = 0
    ordered = sorted(spans)
    for start, end in offsets:
        while place < len(ordered) and ordered[place][1] <= start:
            place += 1
        inside = place < len(ordered) and start < ordered[place][1] and end > ordered[place][0]
        supervised.append(inside and end > start)
    return Encoded.of(ids, supervised)
