"""Log-probabilities beside the text they belong to.

A delta's tokens may run ahead of its text: a part of a character, or what may begin a stop string, is
held back. `Aligned` holds their log-probabilities back too, and cuts them where a stop string cut the
text, so that the tokens that were given always join to the text that was given.
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
    """A token and the characters of the whole text before it and after it."""

    token: TokenLogprob
    start: int
    end: int


class Aligned:
    """One answer's log-probabilities on their way.

    silent: whether tokens that add nothing to the text (the end of the answer, say) are given too.
    """

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._given = 0  # characters: in the tokens so far, in the text so far
        self._held: deque[Placed] = deque()

    def push(self, text: str, tokens: Sequence[TokenLogprob], ended: bool) -> list[Placed]:
        """Those of the tokens whose text is out with ``text``.

        tokens: those that have come since; ``ended``: nothing comes any more.
        """
        for token in tokens:
            start = self._read
            self._read += len(self._decoder.decode(token.bytes))
            self._held.append(Placed(token, start, self._read))
        self._given += len(text)
        found: list[Placed] = []
        while self._held and self._held[0].end <= self._given:
            found += self._shown(self._held.popleft())
        if ended:
            found += self._rest()
        return found

    def _rest(self) -> list[Placed]:
        """What the end of the text left: nothing where it ended by itself, else what is before a stop string."""
        found: list[Placed] = []
        for one in self._held:
            if one.start < self._given:
                found += self._shown(replace(one, token=_cut(one.token, self._given - one.start)))
            elif not one.token.bytes:
                found += self._shown(one)
        self._held.clear()
        return found

    def _shown(self, one: Placed) -> list[Placed]:
        return [one] if one.token.bytes or self._silent else []


def token_offsets(pieces: Sequence[bytes]) -> tuple[str, list[int]]:
    """The text that tokens of these bytes write, and where in it each begins."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, offsets = "", []
    for data in pieces:
        offsets.append(len(text))
        text += decoder.decode(data)
    return text + decoder.decode(b"", final=True), offsets


def _cut(token: TokenLogprob, characters: int) -> TokenLogprob:
    """The token's first ``characters``."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    count = 0
    for place, byte in enumerate(token.bytes):
        count += len(decoder.decode(bytes([byte])))
        if count > characters:
            data = token.bytes[:place]
            return replace(token, bytes=data, token=data.decode(errors="replace"))
    return token


def chat_logprobs(tokens: Sequence[Placed], tokenizer: Tokenizer) -> dict[str, Any]:
    """As chat completions give them."""
    return {"content": [chat_entry(one.token, tokenizer) for one in tokens], "refusal": None}


def chat_entry(one: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """One token with its alternatives."""
    return {
        "token": one.token,
        "logprob": finite(one.logprob),
        "bytes": list(one.bytes),
        "top_logprobs": [
            {
                "token": text,
                "logprob": finite(logprob),
                "bytes": list(_bytes(tokenizer, token, text)),
            }
            for token, text, logprob in one.top
        ],
    }


def _bytes(tokenizer: Tokenizer, token: int, text: str) -> bytes:
    return tokenizer.token_bytes(token) if REPLACEMENT in text else text.encode()


# The older form, of completions


@dataclass
class CompletionLogprobs:
    """Parallel arrays, one place a token; of the first token of a text nothing is known but itself."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> CompletionLogprobs:
        return cls([], [], [], [])

    def add_first(self, text: str, data: bytes, offset: int) -> None:
        """The first of a text, of which nothing is known but itself."""
        self._add(completion_name(text, data), None, None, offset)

    def add_token(self, one: TokenLogprob, tokenizer: Tokenizer, offset: int, top: int | None) -> None:
        """One more, as the engine tells it; ``top``: how many of the likeliest are wanted beside itself."""
        name = completion_name(one.token, one.bytes)
        others: dict[str, float] | None = None
        if top:
            others = {}
            for token, text, logprob in one.top[:top]:
                others.setdefault(completion_name(text, _bytes(tokenizer, token, text)), finite(logprob))
            others.setdefault(name, finite(one.logprob))
        self._add(name, finite(one.logprob), others, offset)

    def _add(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        wanted = any(self.top_logprobs)
        return vars(self) | {"top_logprobs": self.top_logprobs if wanted else None}


def completion_name(text: str, data: bytes) -> str:
    """How a token is written where strings are all there is: a part of a character as its bytes, as at OpenAI."""
    if REPLACEMENT not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
