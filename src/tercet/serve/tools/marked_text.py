"""Put markers that are special tokens, which an answer's text lacks, back into it."""

from __future__ import annotations

import codecs
from collections import deque

from tercet.data.tool_format import special_markers
from tercet.engine.request import Delta
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer


class MarkedText:
    """Puts markers that are special tokens, which add nothing to an answer's text, back into it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._markers = special_markers(tokenizer)
        self._bytes_of = TokenBytes(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._returned = 0  # characters of the text: in the tokens so far, returned so far
        self._due: deque[tuple[int, str]] = deque()  # markers, and after how many characters they come

    def push(self, delta: Delta) -> str:
        """Return the delta's text with its markers."""
        if not self._markers:
            return delta.text
        for token in delta.tokens:
            if token in self._markers:
                self._due.append((self._read, self._markers[token]))
            else:
                self._read += len(self._decoder.decode(self._bytes_of(token)))
        text, parts = delta.text, list[str]()
        # Text that may begin a stop string comes later than its tokens.
        while self._due and self._due[0][0] <= self._returned + len(text):
            place, marker = self._due.popleft()
            parts += [text[: place - self._returned], marker]
            text, self._returned = text[place - self._returned :], place
        self._returned += len(text)
        return "".join([*parts, text])
