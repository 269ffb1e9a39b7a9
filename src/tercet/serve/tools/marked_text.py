"""Put markers that are special tokens, which an answer's text lacks, back into it."""

from __future__ import annotations

import codecs
from collections import deque

from tercet.engine.request import Delta
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.formats import special_markers


class MarkedText:
    """Puts markers that are special tokens, which add nothing to a text, back into it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._markers = special_markers(tokenizer)
        self._bytes_of = TokenBytes(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._given = 0  # characters of the text: in the tokens so far, given so far
        self._due: deque[tuple[int, str]] = deque()  # markers, and after how many characters they come

    def push(self, delta: Delta) -> str:
        """The delta's text with its markers."""
        if not self._markers:
            return delta.text
        for token in delta.tokens:
            if token in self._markers:
                self._due.append((self._read, self._markers[token]))
            else:
                self._read += len(self._decoder.decode(self._bytes_of(token)))
        text, parts = delta.text, list[str]()
        # Text may come later than its tokens, where it could begin a stop string.
        while self._due and self._due[0][0] <= self._given + len(text):
            place, marker = self._due.popleft()
            parts += [text[: place - self._given], marker]
            text, self._given = text[place - self._given :], place
        self._given += len(text)
        return "".join([*parts, text])
