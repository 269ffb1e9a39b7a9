"""Log-probabilities aligned with the text that they belong to.

A delta's tokens may run ahead of its text: the engine holds back part of a character, or text that may begin
a stop string. `Aligned` holds their log-probabilities back too, and cuts them where a stop string cut the
text, so that the returned tokens always join to the returned text.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tercet.engine.request import TokenLogprob
from tercet.model.tokenizer import Tokenizer
from tercet.serve.api.fields import finite

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Placed:
    """A token, and how many characters of the whole text come before it and up to its end."""

    token: TokenLogprob
    start: int
    end: int


class Aligned:
    """Aligns the log-probabilities of one answer with its text.

    silent: also return tokens that add nothing to the text, such as the end of the answer.
    """

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._returned = 0  # characters: in the tokens so far, in the text so far
        self._held: deque[Placed] = deque()

    def push(self, text: str, tokens: Sequence[TokenLogprob], ended: bool) -> list[Placed]:
        """Return the tokens whose text is complete with ``text``.

        Args:
            text: the next text of the answer.
            tokens: the next tokens.
            ended: whether the answer is complete.
        """
        for token in tokens:
            start = self._read
            self._read += len(self._decoder.decode(token.bytes))
            self._held.append(Placed(token, start, self._read))
        self._returned += len(text)
        ready: list[Placed] = []
        while self._held and self._held[0].end <= self._returned:
            ready += self._shown(self._held.popleft())
        if ended:
            ready += self._rest()
        return ready

    def _rest(self) -> list[Placed]:
        """Return the held tokens at the end of the answer, cut before a stop string."""
        rest: list[Placed] = []
        for placed in self._held:
            if placed.start < self._returned:
                cut = _cut(placed.token, self._returned - placed.start)
                rest += self._shown(replace(placed, token=cut))
            elif not placed.token.bytes:
                rest += self._shown(placed)
        self._held.clear()
        return rest

    def _shown(self, placed: Placed) -> list[Placed]:
        return [placed] if placed.token.bytes or self._silent else []


def token_offsets(pieces: Sequence[bytes]) -> tuple[str, list[int]]:
    """Return the text of tokens with these bytes, and where each token begins in it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, offsets = "", []
    for data in pieces:
        offsets.append(len(text))
        text += decoder.decode(data)
    return text + decoder.decode(b"", final=True), offsets


def _cut(token: TokenLogprob, characters: int) -> TokenLogprob:
    """Return the token cut to its first ``characters``."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    count = 0
    for place, byte in enumerate(token.bytes):
        count += len(decoder.decode(bytes([byte])))
        if count > characters:
            data = token.bytes[:place]
            return replace(token, bytes=data, token=data.decode(errors="replace"))
    return token


def chat_logprobs(tokens: Sequence[Placed], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return log-probabilities in the shape of chat completions."""
    return {"content": [chat_entry(placed.token, tokenizer) for placed in tokens], "refusal": None}


def chat_entry(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return one token with its alternatives, in the shape of chat completions."""
    return {
        "token": entry.token,
        "logprob": finite(entry.logprob),
        "bytes": list(entry.bytes),
        "top_logprobs": [
            {
                "token": text,
                "logprob": finite(logprob),
                "bytes": list(_bytes(tokenizer, token, text)),
            }
            for token, text, logprob in entry.top
        ],
    }


def _bytes(tokenizer: Tokenizer, token: int, text: str) -> bytes:
    return tokenizer.token_bytes(token) if REPLACEMENT in text else text.encode()


# The older form, of completions


@dataclass
class CompletionLogprobs:
    """Parallel arrays with one entry per token; the first token of a text has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> CompletionLogprobs:
        """Return arrays without tokens."""
        return cls([], [], [], [])

    def add_first(self, text: str, data: bytes, offset: int) -> None:
        """Add the first token of a text, which has no log-probability."""
        self._add(completion_name(text, data), None, None, offset)

    def add_token(self, entry: TokenLogprob, tokenizer: Tokenizer, offset: int, top: int | None) -> None:
        """Add a token; ``top``: how many of the likeliest tokens to list beside it."""
        name = completion_name(entry.token, entry.bytes)
        likeliest: dict[str, float] | None = None
        if top:
            likeliest = {}
            for token, text, logprob in entry.top[:top]:
                likeliest.setdefault(completion_name(text, _bytes(tokenizer, token, text)), finite(logprob))
            likeliest.setdefault(name, finite(entry.logprob))
        self._add(name, finite(entry.logprob), likeliest, offset)

    def _add(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        return vars(self) | {"top_logprobs": self.top_logprobs if any(self.top_logprobs) else None}


def completion_name(text: str, data: bytes) -> str:
    """Return a token as a string; part of a character is written as its bytes, as at OpenAI."""
    if REPLACEMENT not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
