"""Texts that spell control tokens and mean text, and how they are encoded.

The pieces are encoded as transformers 5.24 encodes them with ``sanitize_control_tokens=True``: each spelled token
alone and without added tokens, the text around it as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from tercet.errors import UserError

if TYPE_CHECKING:
    import tokenizers

Offsets = list[tuple[int, int]]
# What control tokens that a conversation's messages spell become: ordinary text, or these tokens.
ControlTokenMode = Literal["text", "control"]
CONTROL_TOKEN_MODES: tuple[ControlTokenMode, ...] = ("text", "control")


def check_mode(mode: str) -> ControlTokenMode:
    """Return ``mode`` if it is one. UserError otherwise."""
    for known in CONTROL_TOKEN_MODES:
        if mode == known:
            return known
    raise UserError(f"`control_tokens` is {mode!r}; it must be text or control")


class ControlText(str):
    """A text in which some spellings of control tokens are ordinary text.

    Attributes:
        literal: the characters [start, end) of these spellings, in order.
    """

    literal: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, literal: tuple[tuple[int, int], ...] = ()) -> ControlText:
        """Make a text from a string and the places that are ordinary text."""
        made = super().__new__(cls, text)
        made.literal = literal
        return made

    def __add__(self, other: str) -> ControlText:
        """Return the text with ``other`` after it, whose control tokens are control tokens."""
        return ControlText(str(self) + other, self.literal)

    def __getnewargs__(self) -> tuple[str, tuple[tuple[int, int], ...]]:  # type: ignore[override]
        """Return the arguments that copying and pickling need."""
        return str(self), self.literal

    def pieces(self) -> Iterator[tuple[int, str, bool]]:
        """Yield (start, piece, whether it is a literal spelling); pieces are not empty."""
        position = 0
        for start, end in (*self.literal, (len(self), len(self))):
            if position < start:
                yield position, self[position:start], False
            if start < end:
                yield start, self[start:end], True
            position = end


def encode_pieces(backend: tokenizers.Tokenizer, text: ControlText) -> tuple[list[int], Offsets]:
    """Return token ids, and the characters of ``text`` that each stands for; no special tokens are added.

    All tokens of a literal spelling stand for the whole of it.
    """
    ids: list[int] = []
    offsets: Offsets = []
    for start, piece, literal in text.pieces():
        if literal:
            part = _literal_ids(backend, piece, first=start == 0)
            ids += part
            offsets += [(start, start + len(piece))] * len(part)
            continue
        part, places = _usual(backend, piece, first=start == 0)
        ids += part
        offsets += [(start + begin, start + end) for begin, end in places]
    return ids, offsets


def _usual(backend: tokenizers.Tokenizer, piece: str, first: bool) -> tuple[list[int], Offsets]:
    if not first:
        # After a line break a tokenizer adds no space, which some add at the beginning of a text.
        opening = backend.encode("\n", add_special_tokens=False).ids
        encoding = backend.encode("\n" + piece, add_special_tokens=False)
        if encoding.ids[: len(opening)] == opening:
            places = encoding.offsets[len(opening) :]
            return encoding.ids[len(opening) :], [(max(0, a - 1), max(0, b - 1)) for a, b in places]
    encoding = backend.encode(piece, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _literal_ids(backend: tokenizers.Tokenizer, piece: str, first: bool) -> list[int]:
    """Encode a spelling of an added token as if it were not one."""
    ids = _model_ids(backend, piece)
    if not first:
        opening = _model_ids(backend, "\n")
        after = _model_ids(backend, "\n" + piece)
        if after[: len(opening)] == opening:
            ids = after[len(opening) :]
    if backend.token_to_id(piece) in ids and len(piece) > 1:
        # The vocabulary itself has this piece. Its first character alone ends the match.
        return [*_literal_ids(backend, piece[:1], first), *_literal_ids(backend, piece[1:], False)]
    return ids


def _model_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Run the tokenizer's steps without its added tokens."""
    normalizer: Any = backend.normalizer
    splitter: Any = backend.pre_tokenizer
    model: Any = backend.model
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    splits = [text] if splitter is None else [split for split, _ in splitter.pre_tokenize_str(text)]
    return [token.id for split in splits for token in model.tokenize(split)]
