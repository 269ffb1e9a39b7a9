"""From tokens to text: the bytes of each token, whole characters, and strings to stop at."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from tercet.model.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TokenBytes:
    """The bytes each token adds to a text, whatever the tokenizer's decoder.

    A decoder may drop the space a text begins with (sentencepiece), so a token is decoded after
    another one; a token that is a part of a character decodes to U+FFFD, and its own bytes are
    taken. Special tokens and ids that have no token (padded vocabularies) add nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, bool], bytes] = {}
        self._before: tuple[list[int], str] | None = None

    def __call__(self, token: int, *, first: bool = False) -> bytes:
        """The bytes of ``token`` after other visible tokens, or as the ``first`` visible one."""
        key = (token, first)
        if key not in self._known:
            self._known[key] = self._bytes(token, first)
        return self._known[key]

    def visible(self, tokens: Sequence[int]) -> bool:
        """Whether any of ``tokens`` adds to a text."""
        return any(self(token) for token in reversed(tokens))

    def text(self, token: int, *, first: bool = False) -> str:
        """The text to show for one token: what it adds, or the name of one that adds nothing."""
        return self(token, first=first).decode(errors="replace") or self._tokenizer.token_text(token)

    def _bytes(self, token: int, first: bool) -> bytes:
        before, prefix = ([], "") if first else self._reference()
        text = self._tokenizer.decode([*before, token])[len(prefix) :]
        if REPLACEMENT in text:
            return self._tokenizer.token_bytes(token)
        return text.encode()

    def _reference(self) -> tuple[list[int], str]:
        """Any token with plain text, and that text."""
        if self._before is None:
            self._before = ([], "")
            for token in range(self._tokenizer.vocab_size):
                text = self._tokenizer.decode([token])
                if text.isalnum() and self._tokenizer.decode([token, token]).startswith(text):
                    self._before = ([token], text)
                    break
        return self._before


class TextStream:
    """Text of one output, piece by piece: whole characters, and nothing of a stop string.

    Characters that may begin a stop string are held back until it is clear that they don't, or
    until the output ends. Bytes that are no UTF-8 become U+FFFD as in ``bytes.decode``; a
    character that the output's end cuts off becomes one U+FFFD.

    The stop that is complete first counts (the longest of those that end together), so that the
    text does not depend on how it was cut into tokens.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False  # a stop string was met; nothing comes after

    def push(self, data: bytes) -> str:
        """The text that is certain now that ``data`` has come."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """The rest, when the output has ended for another reason than a stop string."""
        certain = self._advance(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return certain + rest

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` could be the beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
