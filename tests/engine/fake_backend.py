"""A backend without a network: logits are a hash of the whole history, read from the pages.

A slot holds its token, its position and its adapter. Wrong pages, a slot that was never written or was overwritten
by another sequence all give other logits, and so other tokens. Every rule of `Backend` is asserted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Chunk


class FakeBackend:
    def __init__(
        self,
        vocab_size: int = 40,
        num_pages: int = 64,
        page_size: int = 4,
        max_tokens: int = 64,
        max_chunks: int = 16,
        max_positions: int = 128,
        salt: int = 0,
        blend: float = 0.0,
        repeats: int = 0,
    ) -> None:
        """Make a network.

        salt: distinguishes networks; blend: how much all networks agree; repeats: the number of last tokens
        that determine the logits, 0 for all.
        """
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.page_size, self.num_pages = page_size, num_pages
        self.max_tokens, self.max_chunks = max_tokens, max_chunks
        self.salt, self.blend, self.repeats = salt, blend, repeats
        self.slots = np.full((num_pages, page_size, 3), -1, dtype=np.int64)
        self.adapters = 0
        self.fed: list[list[int]] = []  # tokens of each chunk of each call
        self.broken: set[tuple[int, ...]] = set()  # histories after which the logits are not finite

    def logits(self, history: Sequence[int], adapter: int = 0) -> NDArray[np.float32]:
        """The correct logits after ``history``."""
        if tuple(history) in self.broken:
            return np.full(self.vocab_size, np.nan, np.float32)
        history = history[-self.repeats :] if self.repeats else history
        value = 7
        for token in history:
            value = (value * 1_000_003 + token + 1) % (1 << 61)
        seed = [value, self.salt, adapter] if adapter else [value, self.salt]
        own_logits = np.random.default_rng(seed).normal(0, 2, self.vocab_size)
        common_logits = np.random.default_rng([value]).normal(0, 2, self.vocab_size)
        return (self.blend * common_logits + (1 - self.blend) * own_logits).astype(np.float32)

    def _rows(self, chunks: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        """The logits after each output."""
        adapters = [chunk.adapter for chunk in chunks for _ in chunk.outputs]
        # Tests replace `logits` by a function of the history alone.
        return [
            self.logits(history, adapter) if adapter else self.logits(history)
            for history, adapter in zip(self._places(chunks), adapters, strict=True)
        ]

    def _places(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """The history up to each output; checks the rules and writes the slots."""
        assert 0 < len(chunks) <= self.max_chunks
        assert sum(len(chunk.tokens) for chunk in chunks) <= self.max_tokens
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        self.fed.append([len(chunk.tokens) for chunk in chunks])
        written: set[int] = set()
        read: set[int] = set()
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            assert 0 <= chunk.adapter <= self.adapters
            assert chunk.tokens and chunk.start >= 0 and end <= self.max_positions
            assert all(0 <= token < self.vocab_size for token in chunk.tokens)
            assert end <= len(chunk.pages) * self.page_size
            assert all(0 <= page < self.num_pages for page in chunk.pages)
            assert len(set(chunk.pages)) == len(chunk.pages)
            assert list(chunk.outputs) == sorted(set(chunk.outputs))
            assert all(0 <= place < len(chunk.tokens) for place in chunk.outputs)
            pages = set(chunk.pages[chunk.start // self.page_size : -(-end // self.page_size)])
            assert not pages & written, "two sequences write to one page"
            written |= pages
            read |= set(chunk.pages[: chunk.start // self.page_size])
        assert not read & written, "one sequence writes to what another reads"
        for chunk in chunks:
            for position, token in enumerate(chunk.tokens, chunk.start):
                self.slots[chunk.pages[position // self.page_size], position % self.page_size] = (
                    token,
                    position,
                    chunk.adapter,
                )
        histories = []
        for chunk in chunks:
            stored = self.slots[list(chunk.pages)].reshape(-1, 3)
            for place in chunk.outputs:
                slots = stored[: chunk.start + place + 1]
                assert (slots[:, 1] == np.arange(len(slots))).all(), "a slot holds another position"
                assert (slots[:, 2] == chunk.adapter).all(), "a slot was computed with another adapter"
                histories.append(slots[:, 0].tolist())
        return histories

    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        rows = self._rows(chunks)
        return np.array(rows, dtype=np.float32).reshape(-1, self.vocab_size)

    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        values, likeliest = [], []
        for row, tokens in zip(self._rows(chunks), targets, strict=True):
            logits = row.astype(np.float64)
            values += (logits[list(tokens)] - np.log(np.exp(logits).sum())).tolist()
            likeliest += [int(logits.argmax()) == token for token in tokens]
        return np.array(values, dtype=np.float32), np.array(likeliest, dtype=np.bool_)

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        rows = [row[:8] for row in self._rows(chunks)]
        return np.array(rows, dtype=np.float32).reshape(-1, 8)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        assert not {source for source, _ in pairs} & {target for _, target in pairs}
        for source, target in pairs:
            self.slots[target] = self.slots[source]

    def add_adapter(self, directory: object) -> int:
        self.adapters += 1
        return self.adapters

    def release(self, sequence: int) -> None:
        pass

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens of greedy decoding, step by step."""
        tokens = list(prompt)
        for _ in itertools.repeat(None, count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]
