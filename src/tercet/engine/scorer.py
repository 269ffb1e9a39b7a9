"""Scores given texts with a model: log-probabilities of continuations and prompts, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.engine.adapters import Adapter, add_adapter
from tercet.engine.backend import Backend
from tercet.engine.cache import PagePool
from tercet.engine.continuations import Continuation, encode, score_continuations
from tercet.engine.prompt_outputs import mean_states, token_logprobs
from tercet.engine.request import Score, TokenLogprob
from tercet.engine.text import TokenBytes
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer


class Scorer:
    """One model with its adapters: the part of an `Engine` that generates nothing.

    Attributes:
        backend: computes the network.
        tokenizer: the model's.
        stop_ids: tokens that end an output of the model without an adapter.
        pool: the backend's pages.
        adapters: by the names that requests choose them by.
        sampling_defaults: values for sampling fields that a request leaves unset, by name; the engine itself
            does not apply them.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, stop_ids: Sequence[int], reuse_prefixes: bool = True
    ) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.pool = PagePool(backend.num_pages, backend.page_size, reuse_prefixes)
        self.adapters: dict[str, Adapter] = {}
        self.sampling_defaults: Mapping[str, float] = {}
        self._bytes_of = TokenBytes(tokenizer)

    @property
    def max_positions(self) -> int:
        """The largest number of tokens of prompt and output together."""
        return self.backend.max_positions

    @property
    def context_length(self) -> int:
        """The largest number of tokens of prompt and output that both the model and the cache hold."""
        return min(self.max_positions, self.pool.num_pages * self.pool.page_size)

    # Adapters

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """Load a LoRA adapter beside the weights, which all requests share; requests choose it by ``name``.

        The adapter stays in float32, however the weights are quantized.

        Raises:
            UserError: an adapter of that name exists; the directory holds no adapter for this model
                (ranks, layers, shapes), or one that changes more than linear layers; its tokenizer has
                other tokens; or the model runs through transformers, which supports no adapters here.
        """
        if name in self.adapters:
            raise UserError(f"there is an adapter {name!r} already ({self.adapters[name].directory})")
        self.adapters[name] = add_adapter(
            self.backend, directory, self.tokenizer, self.stop_ids, self.sampling_defaults
        )

    def number_of(self, adapter: str | None) -> int:
        """Return the backend's number of an adapter; 0 for None.

        Raises:
            UserError: there is no adapter of that name.
        """
        return 0 if adapter is None else self._adapter(adapter).number

    def stop_ids_of(self, adapter: str | None) -> frozenset[int]:
        """Return the tokens that end an output."""
        return self.stop_ids if adapter is None else self._adapter(adapter).stop_ids

    def sampling_defaults_of(self, adapter: str | None) -> Mapping[str, float]:
        """Return the values for sampling fields that a request leaves unset."""
        return self.sampling_defaults if adapter is None else self._adapter(adapter).sampling_defaults

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """Return the adapter's own tokenizer, or else the model's: both have the same tokens.

        An adapter's own tokenizer may bring a chat template.
        """
        return self.tokenizer if adapter is None else self._adapter(adapter).tokenizer

    def _adapter(self, name: str) -> Adapter:
        """Return the adapter of that name, or raise UserError with the names that exist."""
        if name not in self.adapters:
            names = ", ".join(self.adapters) or "none"
            raise UserError(f"there is no adapter {name!r} beside this model; there are: {names}")
        return self.adapters[name]

    # Texts

    def score(
        self, pairs: Sequence[tuple[str, str]], special: bool = True, *, adapter: str | None = None
    ) -> list[Score]:
        """Return the log-probability of each continuation in (prompt, continuation) ``pairs``.

        The prompt has its own tokens, as for generation; those of the continuation follow, also where both
        encoded together would share a token (as after a prompt that ends in a space). After an empty prompt
        the first token is conditioned on the tokenizer's BOS, or on its EOS where it has no BOS (as lm-eval
        does).

        Args:
            pairs: any number, of any lengths.
            special: whether encoding adds special tokens (BOS); False for a text that contains them
                already, such as a rendered conversation.
            adapter: its name; None for the weights alone.

        Raises:
            UserError: a continuation is empty, or prompt and continuation are too long.
        """
        continuations = [
            self._encode(adapter, number, prompt, continuation, special)
            for number, (prompt, continuation) in enumerate(pairs)
        ]
        self._score(continuations, adapter)
        return [
            Score(
                sum(continuation.logprobs),
                continuation.logprobs,
                continuation.tokens[continuation.begin :],
                continuation.is_greedy,
            )
            for continuation in continuations
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
        """Return the total log-probability of each of ``choices[i]`` after ``prompts[i]``.

        Texts are encoded as in `score`. Tokens that the choices of a prompt share, and tokens that
        prompts share (a few-shot header), are computed once.

        Args:
            prompts: N texts.
            choices: N lists of texts.
            end: whether the tokenizer's EOS counts as part of every choice, for a model that was tuned
                to answer with a choice and stop.
            special: as in `score`.
            adapter: its name; None for the weights alone.

        Raises:
            UserError: a choice is empty, a prompt is too long, or ``end`` is True without an EOS token.
        """
        groups = self._groups(prompts, choices, end, special, adapter)
        self._score([choice for group in groups for choice in group], adapter)
        return [[sum(choice.logprobs) for choice in group] for group in groups]

    def best_choice(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        offsets: Sequence[Sequence[float]] | None = None,
        end: bool = False,
        special: bool = True,
        *,
        adapter: str | None = None,
    ) -> list[int]:
        """Return the index of the likeliest of ``choices[i]`` after ``prompts[i]``, the first of equal ones.

        The result is that of the largest number in `choose` plus ``offsets``, but choices that cannot be the best
        are not computed to their end, so it takes less time.

        Args:
            prompts: N texts.
            choices: N lists of texts.
            offsets: N lists of what is added to each log-probability, such as a correction for how often the
                model chooses a label; None: nothing.
            end: as in `choose`.
            special: as in `score`.
            adapter: its name; None for the weights alone.

        Raises:
            UserError: as `choose`; a prompt has no choice.
        """
        groups = self._groups(prompts, choices, end, special, adapter)
        for number, group in enumerate(groups):
            if not group:
                raise UserError(f"{prompt_name(number, len(prompts))} has no choices; give at least one")
            if offsets is not None:
                for choice, offset in zip(group, offsets[number], strict=True):
                    choice.offset = offset
        self._score([choice for group in groups for choice in group], adapter, best_only=True)
        return [
            max(
                (index for index, choice in enumerate(group) if not choice.dropped),
                key=lambda index: (group[index].bound, -index),
            )
            for group in groups
        ]

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], top: int = 0, *, adapter: str | None = None
    ) -> list[list[TokenLogprob | None]]:
        """Return how likely each token of each prompt is after the tokens before it.

        The first token of a prompt has none before it, so its entry is None. Numbers, texts and bytes
        are the same as if the tokens had been generated with ``logprobs``.

        Args:
            prompts: token ids.
            top: the number of likeliest tokens reported at each position.
            adapter: its name; None for the weights alone.

        Raises:
            UserError: a prompt is empty, too long, does not fit the cache or has tokens that the model
                does not know, or the model's logits are not finite.
        """
        if top < 0:
            raise UserError(f"`top` is {top}; it must be 0 or more")
        for number, prompt in enumerate(prompts):
            name = prompt_name(number, len(prompts))
            self._check_tokens(prompt, name, self.max_positions + 1)  # the last token is not fed
        return token_logprobs(
            self.backend,
            self.pool,
            prompts,
            top,
            self._bytes_of,
            self._make_room,
            self.number_of(adapter),
        )

    def embed(self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None) -> NDArray[np.float32]:
        """Return a vector of length 1 for each prompt, [N, H]: the mean input of the output head.

        Raises:
            UserError: as `prompt_logprobs`, or the network does not expose the input of its head.
        """
        for number, prompt in enumerate(prompts):
            self._check_tokens(prompt, prompt_name(number, len(prompts)))
        return mean_states(self.backend, self.pool, prompts, self._make_room, self.number_of(adapter))

    def token_pieces(self, tokens: Sequence[int]) -> list[tuple[str, bytes]]:
        """Return for each token the text to show for it, and the bytes it adds to the text of all tokens.

        Both are those of `TokenLogprob`, for tokens that have no log-probability, such as the first of
        a prompt.
        """
        pieces, first = [], True
        for token in tokens:
            data = self._bytes_of(token, first=first)
            pieces.append((self._bytes_of.text(token, first=first), data))
            first = first and not self._bytes_of(token)
        return pieces

    def _groups(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        end: bool,
        special: bool,
        adapter: str | None,
    ) -> list[list[Continuation]]:
        """Encode the choices of each prompt."""
        if len(prompts) != len(choices):
            raise UserError(
                f"{len(prompts)} prompts with {len(choices)} lists of choices; give one list for each prompt"
            )
        return [
            [self._encode(adapter, number, prompt, choice, special, end) for choice in choices[number]]
            for number, prompt in enumerate(prompts)
        ]

    def _encode(
        self,
        adapter: str | None,
        group: int,
        prompt: str,
        continuation: str,
        special: bool,
        end: bool = False,
    ) -> Continuation:
        """Encode a continuation with the adapter's tokenizer, and check its tokens."""
        encoded = encode(self.tokenizer_of(adapter), group, prompt, continuation, special, end)
        # The last token is scored, not fed.
        self._check_tokens(encoded.tokens[:-1], "the prompt with its continuation")
        self._check_tokens(encoded.tokens[-1:], "the continuation")
        return encoded

    def _score(
        self, continuations: Sequence[Continuation], adapter: str | None, best_only: bool = False
    ) -> None:
        """Fill in the results of the continuations."""
        number = self.number_of(adapter)
        score_continuations(
            self.backend, self.pool, continuations, self._make_room, number, best_only=best_only
        )

    def _check_tokens(self, tokens: Sequence[int], name: str, limit: int | None = None) -> None:
        """Raise UserError for tokens that the model can't read; ``name`` names them in the message."""
        if not tokens:
            raise UserError(f"{name} is empty (0 tokens); a model needs at least one to continue from")
        limit = limit or self.max_positions
        if len(tokens) > limit:
            raise UserError(f"{name} has {len(tokens)} tokens; the model takes at most {limit}")
        if min(tokens) < 0 or max(tokens) >= self.backend.vocab_size:
            unknown = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(
                f"{name} has token {unknown}, and the model knows 0 to {self.backend.vocab_size - 1}; "
                "tokenizer and model don't belong together"
            )

    def _make_room(self) -> bool:
        """Free pages that requests hold; return False when no request holds any."""
        return False


def prompt_name(number: int, count: int) -> str:
    """Return the name of prompt ``number`` of ``count`` in a message."""
    return "the prompt" if count == 1 else f"prompt {number + 1}"
