"""The tokens of a text that follows a prompt: those of the prompt alone, then those of the text.

A model that is given a prompt reads the prompt's own tokens. Encoded together with what follows, they may be
others: after ``Answer: `` most vocabularies join the space to the next word. Training and scoring on the joint
tokens would concern a prompt that the model is never given, so both use the tokens of this module.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tercet.data.batches import Encoded
from tercet.data.chat_mask import Rendered, encode_spans
from tercet.model.tokenizer import Tokenizer

# A text is encoded after one of these, whose own tokens then are cut off: the first that shares no token with it.
_OPENINGS = ("\n", "=", "a")
_NEAR = 200  # characters before an answer in which most templates have a special token


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
    ids = tokenizer.encode(text, special=special)
    # A stop token that the tokenizer adds is not part of the text.
    return ids[: max(1, len(ids) - _added_at_end(tokenizer))] if special else ids


@functools.lru_cache(maxsize=4)
def _added_at_end(tokenizer: Tokenizer) -> int:
    """Return how many tokens the tokenizer adds after a text."""
    _, offsets = tokenizer.encode_with_offsets("a")
    return next((count for count, place in enumerate(reversed(offsets)) if place != (0, 0)), 0)


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
    text, special = rendered.text, rendered.special
    spans = [(span.start, span.end) for span in rendered.spans]
    whole = encode_spans(tokenizer, text, spans, special=special)
    if _begins_as_prompted(tokenizer, rendered, whole):
        return [whole], []
    examples, places = [], []
    for start, end in spans:
        tokens = continued(tokenizer, part(text, 0, end), start, special=special)
        ids = [*tokens.prompt, *tokens.continuation]
        examples.append(Encoded.of(ids, [index >= len(tokens.prompt) for index in range(len(ids))]))
        if tokens.apart:
            places.append((text[max(0, start - 12) : start], text[start : start + 12]))
    return examples, places


def _begins_as_prompted(tokenizer: Tokenizer, rendered: Rendered, whole: Encoded) -> bool:
    """Return whether before each answer the tokens of the whole text are those of the prompt alone."""
    text, on = rendered.text, whole.supervised
    begins = np.flatnonzero(on & ~np.concatenate([[False], on[:-1]])).tolist()
    if len(begins) != len(rendered.spans):
        return False
    # Control tokens that are text, and added tokens, make the parts of a text depend on each other.
    has_no_parts = rendered.special or bool(getattr(text, "literal", ()))
    for span, begin in zip(rendered.spans, begins, strict=True):
        # A special token divides the text, so only what follows the last one can depend on the answer.
        tail = part(text, max(0, span.start - _NEAR), span.start)
        matches = [] if has_no_parts else list(_special(tokenizer).finditer(tail))
        if matches:
            tokens = tokenizer.encode(tail[matches[-1].start() :], special=False)
            if tokens and tokenizer.token_text(tokens[0]) == matches[-1].group():
                if whole.ids[max(0, begin - len(tokens)) : begin].tolist() != tokens:
                    return False
                continue
        if whole.ids[:begin].tolist() != _encoded(tokenizer, part(text, 0, span.start), rendered.special):
            return False
    return True


@functools.lru_cache(maxsize=4)
def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the special tokens."""
    longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
