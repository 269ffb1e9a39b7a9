"""The tokens of a text that follows a prompt: those of the prompt alone, then those of the text.

A model that is given a prompt reads the prompt's own tokens. Encoded together with what follows, they may be
others: after ``Answer: `` most vocabularies join the space to the next word. Training and scoring on the joint
tokens would concern a prompt that the model is never given, so both use the tokens of this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tercet.data.batches import Encoded
from tercet.data.chat_mask import Rendered, encode_spans
from tercet.model.tokenizer import Tokenizer

# A text is encoded after one of these, whose own tokens then are cut off: the first that shares no token with it.
_OPENINGS = ("\n", "=", "a")


@dataclass(frozen=True)
class Continued:
    """The tokens of a prompt and of its continuation.

    Attributes:
        prompt: as the model reads the prompt; without tokens that the tokenizer adds at the end.
        continuation: the tokens that follow.
        apart: whether both encoded together give other tokens.
    """

    prompt: list[int]
    continuation: list[int]
    apart: bool


def continued(tokenizer: Tokenizer, text: str, start: int, *, special: bool) -> Continued:
    """Encode the prompt ``text[:start]`` and its continuation ``text[start:]``.

    Args:
        tokenizer: encodes the text.
        text: prompt and continuation.
        start: where the continuation begins, in characters.
        special: add the tokenizer's special tokens before the prompt, as for a plain prompt at inference.
    """
    prompt = _encoded(tokenizer, part(text, 0, start), special)
    whole = _encoded(tokenizer, text, special)
    if whole[: len(prompt)] == prompt:
        return Continued(prompt, whole[len(prompt) :], apart=False)
    return Continued(prompt, _alone(tokenizer, prompt, part(text, start, len(text))), apart=True)


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    ids, offsets = tokenizer.encode_with_offsets(text, special=special)
    end = len(ids)
    while special and end > 1 and offsets[end - 1] == (0, 0):
        end -= 1  # a stop token that the tokenizer adds is not part of the text
    return list(ids[:end])


def _alone(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
    """Encode the text without the space that some tokenizers put before a text."""
    ids = tokenizer.encode(text, special=False)
    before = tokenizer.decode(prompt, skip_special=False)
    if getattr(text, "literal", ()) or tokenizer.decode([*prompt, *ids], skip_special=False) == before + text:
        return ids
    for opening in _OPENINGS:
        opened, opening_ids = (tokenizer.encode(opening + after, special=False) for after in (text, ""))
        rest = opened[len(opening_ids) :]
        is_apart = opened[: len(opening_ids)] == opening_ids
        if is_apart and tokenizer.decode([*prompt, *rest], skip_special=False) == before + text:
            return rest
    return ids  # a normalizer changes the text, so that its decoded form can't show which is right


def part(text: str, start: int, end: int) -> str:
    """Return the characters [start, end) of a text, in which spelled control tokens stay what they are there."""
    literal = [
        (max(a, start) - start, min(b, end) - start)
        for a, b in getattr(text, "literal", ())
        if a < end and b > start
    ]
    kind: Any = type(text)
    piece: str = kind(text[start:end], tuple(literal)) if literal else text[start:end]
    return piece


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[Encoded], list[tuple[str, str]]]:
    """Encode a training text, and return the places where a prompt ends inside a token.

    The result is a single example, unless a later answer of a conversation begins inside a token: at inference
    the earlier ones are then encoded with the text around them, so each answer gets an example of its own.

    Returns:
        The examples; and for each prompt that ends inside a token its last characters and the next ones.
    """
    text = rendered.text
    parts = [continued(tokenizer, part(text, 0, span.end), span.start, special=rendered.special)
             for span in rendered.spans]  # fmt: skip
    places = [
        (text[max(0, span.start - 12) : span.start], text[span.start : span.start + 12])
        for span, tokens in zip(rendered.spans, parts, strict=True)
        if tokens.apart
    ]
    if not places:
        spans = [(span.start, span.end) for span in rendered.spans]
        return [encode_spans(tokenizer, text, spans, special=rendered.special)], []
    examples = [
        Encoded.of(
            [*tokens.prompt, *tokens.continuation],
            [*([False] * len(tokens.prompt)), *([True] * len(tokens.continuation))],
        )
        for tokens in parts
    ]
    return examples, places
