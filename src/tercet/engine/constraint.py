"""Constraints: which tokens a grammar allows after the tokens so far.

Every token that a matcher allows can be completed to a text of the grammar, so an output is invalid
only when it is cut off.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.guidance import error_line
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILED = 64  # compiled grammars that a `Constraints` keeps; a server may see any number of them
# A text is encoded behind one of these to see how it is encoded inside a longer text: no token joins
# these characters to the text that follows.
_BEFORE = ("", "\x02", "\n", "\x00")


class Constraints:
    """Compiles grammars for the vocabulary of one model.

    The vocabulary's table is made for the first matcher (about a second for 150 000 tokens).

    Args:
        tokenizer: the model's.
        vocab_size: V, the width of the model's logits; ids without a token are never allowed.
        stop_ids: the tokens that end an output. Neither they nor special tokens are ever text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._stops = np.array(sorted({token for token in stop_ids if 0 <= token < vocab_size}), np.intp)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of an output.

        Raises:
            GrammarError: llguidance refuses the grammar, or the tokenizer has no tokens for it.
        """
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = grammar.compile(self._table)
            if len(self._compiled) >= COMPILED:
                self._compiled.popitem(last=False)
        self._compiled[grammar] = compiled
        return Matcher(compiled.deep_copy(), self.vocab_size, self._stops, self._has_all_bytes)

    @cached_property
    def _has_all_bytes(self) -> bool:
        """Whether the vocabulary can write any text."""
        bytes_of = TokenBytes(self.tokenizer)
        known = range(min(self.vocab_size, self.tokenizer.vocab_size))
        single = {data for data in map(bytes_of, known) if len(data) == 1}
        return len(single) == 256

    @cached_property
    def _table(self) -> LLTokenizer:
        """The vocabulary as llguidance's trie."""
        from llguidance import LLTokenizer, TokenizerWrapper

        wrapper = TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size, set(self._stops.tolist())))
        return LLTokenizer(wrapper, eos_token=self.vocab_size)


class Matcher:
    """The state of one output under a grammar.

    Methods raise GrammarError when no token can follow: the tokenizer lacks characters that the grammar
    requires (a tokenizer without all bytes), the grammar leads to a dead end, or it grew beyond llguidance's
    limits.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, stops: NDArray[np.intp], has_all_bytes: bool = False
    ) -> None:
        self._has_all_bytes = has_all_bytes
        self._matcher, self._vocab_size, self._stops = matcher, vocab_size, stops
        self._stop_set = frozenset(stops.tolist())
        self._mask: NDArray[np.bool_] | None = None
        self._may_end = False

    def mask(self) -> NDArray[np.bool_]:
        """Return [V], True for tokens that may follow, and for stop ids where the text may end.

        The array is read-only. Without stop ids it has no entry for the end.
        """
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            allowed = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
            self._may_end = bool(allowed[self._vocab_size])
            mask = allowed[: self._vocab_size]
            mask[self._stops] |= self._may_end
            mask.flags.writeable = False
            self._mask = mask
        return self._mask

    def forced(self) -> list[int]:
        """Return the tokens that must follow whatever the model computes; the state does not change.

        They are the tokens that the tokenizer itself encodes the certain text to. Where the last of them
        might be joined with the text that follows, it is left to the model.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def accept(self, token: int) -> None:
        """Advance by ``token``. Raise ValueError when the mask does not allow it."""
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"token {token} is none of 0 to {self._vocab_size - 1}")
        accepted = self._matcher.consume_token(self._guidance_token(token))
        self._mask = None
        if not accepted:
            if "doesn't satisfy the grammar" not in self._matcher.get_error():
                self._check()
            raise ValueError(f"the grammar does not allow token {token} here")

    def valid(self, tokens: Sequence[int]) -> int:
        """Return how many of the first ``tokens`` would be accepted; the state does not change.

        Only the text counts: where some text is certain, tokens that write it differently from the
        tokenizer are accepted too, although `mask` excludes them.
        """
        converted = []
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                break
            converted.append(self._guidance_token(token))
        count: int = self._matcher.validate_tokens(converted)
        return count

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        if self._matcher.is_stopped():
            self._check()
            return True
        if not self._matcher.is_accepting():
            return False
        # A parser may learn only from the vocabulary that nothing can follow.
        mask = self.mask()
        return self._may_end and np.count_nonzero(mask) == len(self._stops)

    def _guidance_token(self, token: int) -> int:
        """Return llguidance's id of a token: all stop ids share one id behind the vocabulary."""
        return self._vocab_size if token in self._stop_set else token

    def _check(self) -> None:
        """Raise GrammarError if llguidance has reported an error."""
        if not self._matcher.is_error():
            return
        reason = error_line(self._matcher.get_error())
        if reason.startswith("NoExtension") and self._has_all_bytes:
            raise GrammarError(
                "the output can't go on: the grammar allows what it has begun, and nothing behind it; "
                "simplify the schema or the grammar there"
            )
        if reason.startswith("NoExtension"):
            raise GrammarError(
                "the output can't go on: the tokenizer has no tokens for characters that the grammar requires"
            )
        raise GrammarError(f"the grammar is too complex to follow ({reason}); make it simpler")


class _Vocabulary:
    """A tokenizer with llguidance's interface: the bytes of each token, and a function that encodes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stops: set[int]) -> None:
        bytes_of = TokenBytes(tokenizer)
        known = min(vocab_size, tokenizer.vocab_size)
        visible = [b"" if token in stops else bytes_of(token) for token in range(known)]
        self._tokenizer, self._bytes = tokenizer, visible + [b""] * (vocab_size - known)
        self._before: dict[str, list[int]] = {}
        # Special tokens have their names here, so that a Lark grammar may refer to one.
        named = [data or tokenizer.token_bytes(token) for token, data in enumerate(visible)]
        self.tokens = named + [b""] * (vocab_size - known) + [b"<|end of output|>"]
        self.special_token_ids = [token for token, data in enumerate(self._bytes) if not data]
        self.special_token_ids.append(vocab_size)
        self.eos_token_id, self.bos_token_id = vocab_size, None

    def __call__(self, data: bytes) -> list[int]:
        """Return tokens that add exactly ``data`` to a text: where possible, those of the tokenizer."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # the rest of a character
            return self._greedy(data)
        for before in _BEFORE:
            if before not in self._before:
                self._before[before] = self._tokenizer.encode(before, special=False)
            start = self._before[before]
            tokens = self._tokenizer.encode(before + text, special=False)
            if tokens[: len(start)] == start and self._join(tokens[len(start) :]) == data:
                return tokens[len(start) :]
        return self._greedy(data)

    def _join(self, tokens: Sequence[int]) -> bytes | None:
        """Return the bytes that the tokens add to a text; None when one of them adds nothing."""
        parts = [self._bytes[token] if token < len(self._bytes) else b"" for token in tokens]
        return b"".join(parts) if all(parts) else None

    def _greedy(self, data: bytes) -> list[int]:
        """Encode with the longest token at each place, and stop where no token matches."""
        tokens: list[int] = []
        begin = 0
        while begin < len(data):
            for length in range(min(self._longest, len(data) - begin), 0, -1):
                token = self._ids.get(data[begin : begin + length])
                if token is not None:
                    tokens.append(token)
                    begin += length
                    break
            else:
                break
        return tokens

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Token ids by their bytes."""
        return {data: token for token, data in enumerate(self._bytes) if data}

    @cached_property
    def _longest(self) -> int:
        """The length of the longest token in bytes."""
        return max(map(len, self._ids), default=0)
