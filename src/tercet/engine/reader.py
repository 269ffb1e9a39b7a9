"""What a model says of given texts: how likely they are, and a vector for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.engine.adapters import Adapter, add_adapter
from tercet.engine.backend import Backend
from tercet.engine.cache import PagePool
from tercet.engine.reading import mean_states, token_logprobs
from tercet.engine.request import Score, TokenLogprob
from tercet.engine.scoring import Continuation, encode, evaluate
from tercet.engine.text import TokenBytes
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer


class Reader:
    """One model and the adapters beside it: the half of an `Engine` that generates nothing.

    adapters: by the names that requests choose them by.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, stop_ids: Sequence[int], reuse_prefixes: bool = True
    ) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.pool = PagePool(backend.num_pages, backend.page_size, reuse_prefixes)
        self.adapters: dict[str, Adapter] = {}
        self._bytes_of = TokenBytes(tokenizer)

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and output together that the model takes."""
        return self.backend.max_positions

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together that both the model and the key/value cache take."""
        return min(self.max_positions, self.pool.num_pages * self.pool.page_size)

    # Adapters

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """Keep a LoRA adapter beside the weights, which all share; requests choose it by ``name``.

        It stays in float32, however the weights are quantised.

        Raises:
            UserError: there is one of that name; the directory holds no adapter for this model (ranks,
                layers, shapes), or one that changes more than linear layers; its tokenizer has other
                tokens; a model that transformers runs takes none.
        """
        if name in self.adapters:
            raise UserError(f"there is an adapter {name!r} already ({self.adapters[name].directory})")
        self.adapters[name] = add_adapter(self.backend, directory, self.tokenizer, self.stop_ids)

    def number_of(self, adapter: str | None) -> int:
        """What the backend knows an adapter by; 0: none.

        Raises:
            UserError: there is none of that name.
        """
        return 0 if adapter is None else self._adapter(adapter).number

    def stop_ids_of(self, adapter: str | None) -> frozenset[int]:
        """The tokens that end an output."""
        return self.stop_ids if adapter is None else self._adapter(adapter).stop_ids

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """The adapter's own, say with a chat template, or else the model's: both have the same tokens."""
        return self.tokenizer if adapter is None else self._adapter(adapter).tokenizer

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise UserError(f"there is no adapter {name!r} beside this model; there are: {there}")
        return self.adapters[name]

    # Texts

    def score(
        self, pairs: Sequence[tuple[str, str]], special: bool = True, *, adapter: str | None = None
    ) -> list[Score]:
        """The log-probability of each (prompt, continuation).

        Both are encoded together, as the model would have read them; a token that crosses the
        boundary belongs to the continuation. After an empty prompt the first token is conditioned
        on the tokenizer's BOS, or on its EOS where it has none (as lm-eval does).

        special: whether encoding adds special tokens (BOS); False for a text that has them already,
            such as a rendered conversation.
        adapter: its name; None: the weights as they are.

        Raises:
            UserError: a continuation is empty, or prompt and continuation are too long.
        """
        pieces = [
            self._encode(adapter, number, prompt, continuation, special)
            for number, (prompt, continuation) in enumerate(pairs)
        ]
        evaluate(self.backend, self.pool, pieces, self._make_room, self.number_of(adapter))
        return [
            Score(sum(one.logprobs), one.logprobs, one.tokens[one.begin :], one.is_greedy) for one in pieces
        ]

    def choose(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        end: bool = False,
        special: bool = True,
        *,
        adapter: str | None = None,
    ) -> list[list[float]]:
        """The total log-probability of each of ``choices[i]`` after ``prompts[i]``, encoded as in `score`.

        What the choices of a prompt share, and what prompts share (a few-shot header), is computed once.

        end: whether the tokenizer's EOS counts as part of every choice: a model that was tuned to
            answer with a choice and end.
        adapter: its name; None: the weights as they are.

        Raises:
            UserError: a choice is empty, a prompt is too long, or ``end`` without an EOS.
        """
        if len(prompts) != len(choices):
            raise UserError(f"{len(prompts)} prompts with {len(choices)} lists of choices; give one a prompt")
        pieces = [
            [self._encode(adapter, number, prompt, choice, special, end) for choice in choices[number]]
            for number, prompt in enumerate(prompts)
        ]
        flat = [one for group in pieces for one in group]
        evaluate(self.backend, self.pool, flat, self._make_room, self.number_of(adapter))
        return [[sum(one.logprobs) for one in group] for group in pieces]

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], top: int = 0, *, adapter: str | None = None
    ) -> list[list[TokenLogprob | None]]:
        """How likely each token of each prompt is after those before it; None for the first, which has none.

        The same numbers, texts and bytes as if the tokens had been generated with ``logprobs``.

        top: the likeliest tokens that are given with each.
        adapter: its name; None: the weights as they are.

        Raises:
            UserError: a prompt is empty, too long, does not fit the cache or has tokens that the model
                doesn't know, or the model's logits are not finite.
        """
        if top < 0:
            raise UserError(f"top is {top}; it must be 0 or more")
        for number, prompt in enumerate(prompts):
            what = prompt_name(number, len(prompts))
            self._check_tokens(prompt, what, self.max_positions + 1)  # the last token is not fed
        number = self.number_of(adapter)
        return token_logprobs(self.backend, self.pool, prompts, top, self._bytes_of, self._make_room, number)

    def embed(self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None) -> NDArray[np.float32]:
        """A vector of length 1 for each prompt, [N, H]: the mean over its tokens of what the head reads.

        Raises:
            UserError: as `prompt_logprobs`, or the network does not show what its head reads.
        """
        for number, prompt in enumerate(prompts):
            self._check_tokens(prompt, prompt_name(number, len(prompts)))
        return mean_states(self.backend, self.pool, prompts, self._make_room, self.number_of(adapter))

    def token_pieces(self, tokens: Sequence[int]) -> list[tuple[str, bytes]]:
        """The text to show for each of ``tokens``, and the bytes it adds to the text of them all.

        As in `TokenLogprob`: for tokens that have no log-probability, such as the first of a prompt.
        """
        pieces, first = [], True
        for token in tokens:
            data = self._bytes_of(token, first=first)
            pieces.append((self._bytes_of.text(token, first=first), data))
            first = first and not self._bytes_of(token)
        return pieces

    def _encode(
        self,
        adapter: str | None,
        group: int,
        prompt: str,
        continuation: str,
        special: bool,
        end: bool = False,
    ) -> Continuation:
        one = encode(self.tokenizer_of(adapter), group, prompt, continuation, special, end)
        # The last token is scored, not fed.
        self._check_tokens(one.tokens[:-1], "the prompt with its continuation")
        self._check_tokens(one.tokens[-1:], "the continuation")
        return one

    def _check_tokens(self, tokens: Sequence[int], what: str, most: int | None = None) -> None:
        if not tokens:
            raise UserError(f"{what} is empty (0 tokens); a model needs at least one to go on from")
        most = most or self.max_positions
        if len(tokens) > most:
            raise UserError(f"{what} has {len(tokens)} tokens; the model takes at most {most}")
        if min(tokens) < 0 or max(tokens) >= self.backend.vocab_size:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(
                f"{what} has token {wrong}, and the model knows 0 to {self.backend.vocab_size - 1}; "
                "tokenizer and model don't belong together"
            )

    def _make_room(self) -> bool:
        """Free pages that others hold; False when there are none."""
        return False


def prompt_name(number: int, count: int) -> str:
    """What a message calls prompt ``number`` of ``count``."""
    return "the prompt" if count == 1 else f"prompt {number + 1}"
