"""Text of tokens: the bytes of each token, whole characters, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from tercet.model.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TokenBytes:
    """The bytes that each token adds to a text, for any decoder of a tokenizer.

    A decoder may drop the space at the beginning of a text (sentencepiece), so a token is decoded after
    another token. A token that is a part of a character decodes to U+FFFD; its own bytes are used
    instead. Special tokens and ids without a token (padded vocabularies) add nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, bool], bytes] = {}
        self._before: tuple[list[int], str] | None = None

    def __call__(self, token: int, *, first: bool = False) -> bytes:
        """Return the bytes of ``token`` after other visible tokens, or as the ``first`` visible token."""
        key = (token, first)
        if key not in self._known:
            self._known[key] = self._bytes(token, first)
        return self._known[key]

    def visible(self, tokens: Sequence[int]) -> bool:
        """Return whether any of ``tokens`` adds bytes to a text."""
        return any(self(token) for token in reversed(tokens))

    def text(self, token: int, *, first: bool = False) -> str:
        """Return the text to show for a token: the text it adds, or the token's name if it adds nothing."""
        return self(token, first=first).decode(errors="replace") or self._tokenizer.token_text(token)

    def _bytes(self, token: int, first: bool) -> bytes:
        """Decode ``token`` as the first token, or after another token."""
        before, prefix = ([], "") if first else self._reference()
        text = self._tokenizer.decode([*before, token])[len(prefix) :]
        if REPLACEMENT in text:
            return self._tokenizer.token_bytes(token)
        return text.encode()

    def _reference(self) -> tuple[list[int], str]:
        """Return a token that adds plain text in any place, and that text."""
        if self._before is None:
            self._before = ([], "")
            for token in range(self._tokenizer.vocab_size):
                text = self._tokenizer.decode([token])
                if text.isalnum() and self._tokenizer.decode([token, token]).startswith(text):
                    self._before = ([token], text)
                    break
        return self._before


class TextStream:
    """The text of one output, piece by piece: whole characters, and no part of a stop string.

    Characters that may begin a stop string are held back until they turn out not to, or until the
    output ends. Bytes that are not UTF-8 become U+FFFD as in ``bytes.decode``; a character that the end
    of the output cuts off becomes one U+FFFD.

    The stop string that is complete first counts (the longest of those that end together), so the text
    does not depend on its division into tokens.

    Attributes:
        stopped: whether a stop string has been completed; no text follows it.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Append ``data``; return the text that is now certain."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """Return the remaining text of an output that has ended for another reason than a stop string."""
        certain = self._advance(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return certain + rest

    def _advance(self, text: str) -> str:
        """Append ``text`` to the text held back; return the part that is certain."""
        if self.stopped:
            return ""
        held = self._held + text
        matches = [(begin + len(stop), begin) for stop in self._stops if (begin := held.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return held[: min(matches)[1]]
        uncertain = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - uncertain :]
        return held[: len(held) - uncertain]


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of ``text`` that may begin ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def differing_token(tokenizer: Tokenizer, second: Tokenizer) -> str | None:
    """Return the token of lowest id in which two vocabularies differ; None when they are equal."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    difference = vocabulary.items() ^ second.backend.get_vocab(with_added_tokens=True).items()
    return min(difference, key=lambda item: item[1])[0] if difference else None
