"""The network through PyTorch, on any device PyTorch knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.engine.backend import Chunk
from tercet.engine.torch_adapters import Adapters
from tercet.model.transformer import Transformer
from tercet.model.weights import read_adapter

CACHE_BYTES = 1 << 30  # the memory for keys and values unless asked otherwise: fits a laptop beside the model
PAGE_SIZE = 16  # small, so that little of a page stays unused; reading pages costs the same at any size
FIRST_PAGES = 64  # memory is taken for that many, then doubled with need
PADDING = 64  # padded tokens that cost less than another pass over the weights
# Bytes of keys and values that one layer of one pass reads at most: on a CPU what stays in its caches between
# gathering and attention (measured: 8 to 16 MiB are best), elsewhere what is little beside the model.
GATHERED_CPU, GATHERED_ELSEWHERE = 1 << 23, 1 << 28
LOGIT_VALUES = 1 << 25  # logits computed at a time when scoring: 128 MiB in float32


class TorchBackend:
    """A `Backend` over `Transformer`.

    The chunks of a call are computed in passes of similar lengths, padded on the right. Attention
    reads each row's pages as one stretch of memory, gathered for every layer; a pass of sequences
    that begin needs none of that, and no mask.

    cache_bytes: memory for keys and values, taken with need.
    """

    max_tokens = 4096  # enough to keep any matrix product busy; bounds activations
    max_chunks = 256

    def __init__(
        self, model: Transformer, cache_bytes: int = CACHE_BYTES, page_size: int = PAGE_SIZE
    ) -> None:
        self.model = model.eval()
        config = model.config
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions
        self.page_size = page_size
        width = config.num_kv_heads * config.head_dim * model.dtype.itemsize
        self.num_pages = max(1, cache_bytes // (2 * config.num_layers * width * page_size))
        gathered = GATHERED_CPU if model.device.type == "cpu" else GATHERED_ELSEWHERE
        # Another pass reads all weights again, so it should save at least as much.
        weights = sum(one.numel() * one.itemsize for one in model.model.layers.parameters())
        self._gathered_tokens = max(gathered, weights // config.num_layers) // (2 * width) + 1
        self._pages = _Pages(model, page_size, self.num_pages)
        self._adapters = Adapters(model)
        scaling = config.rope_scaling
        # Kinds whose frequencies depend on the length at hand beyond this many positions: a longer
        # sequence has a pass of its own, so that its neighbours don't change what it gets.
        self._stretched_from = (
            scaling.original_max_positions
            if scaling is not None and scaling.kind in ("dynamic", "longrope")
            else config.max_positions
        )

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        return _numpy(self.model.logits(self._hidden(chunks)))

    @torch.inference_mode()
    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        hidden = self._hidden(chunks)
        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
        likeliest: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        step = max(1, LOGIT_VALUES // self.vocab_size)
        for begin in range(0, len(targets), step):
            part = targets[begin : begin + step]
            logits = self.model.logits(hidden[begin : begin + step])
            rows = self._index([row for row, wanted in enumerate(part) for _ in wanted])
            tokens = self._index([token for wanted in part for token in wanted])
            values.append(_numpy(logits[rows, tokens] - logits.logsumexp(-1)[rows]))
            likeliest.append((logits.argmax(-1)[rows] == tokens).cpu().numpy())
        return np.concatenate(values), np.concatenate(likeliest)

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        return _numpy(self._hidden(chunks))

    @torch.inference_mode()
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._pages.make_room(max((page for pair in pairs for page in pair), default=0))
        sources, targets = (self._index([pair[side] for pair in pairs]) for side in (0, 1))
        for layer in (*self._pages.keys, *self._pages.values):
            layer.index_copy_(0, targets, layer[sources])

    def add_adapter(self, directory: str | Path) -> int:
        return self._adapters.add(read_adapter(directory, self.model.config)[1])

    def release(self, sequence: int) -> None:
        """Nothing: all that is known of a sequence is in its pages."""

    def _hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Final hidden states [places, H] of the wanted places, in order of chunks."""
        first = np.cumsum([0, *(len(chunk.outputs) for chunk in chunks)]).tolist()
        config = self.model.config
        found = torch.empty(first[-1], config.hidden_size, dtype=self.model.dtype, device=self.model.device)
        for numbers in self._passes(chunks):
            hidden = self._pass([chunks[number] for number in numbers])
            rows = [row for row, number in enumerate(numbers) for _ in chunks[number].outputs]
            if rows:
                places = [place for number in numbers for place in chunks[number].outputs]
                into = [first[number] + n for number in numbers for n in range(len(chunks[number].outputs))]
                found[self._index(into)] = hidden[self._index(rows), self._index(places)].to(found.dtype)
        return found

    def _passes(self, chunks: Sequence[Chunk]) -> Iterator[list[int]]:
        """Numbers of the chunks that are computed together."""
        together: list[int] = []
        tokens = longest = 0
        for number in sorted(range(len(chunks)), key=lambda number: len(chunks[number].tokens)):
            size, end = len(chunks[number].tokens), chunks[number].start + len(chunks[number].tokens)
            count = len(together) + 1
            if together and (
                count * size - tokens - size > PADDING
                or count * max(longest, end) > self._gathered_tokens
                or max(longest, end) > self._stretched_from
            ):
                yield together
                together, tokens, longest = [], 0, 0
            together.append(number)
            tokens, longest = tokens + size, max(longest, end)
        if together:
            yield together

    def _pass(self, chunks: Sequence[Chunk]) -> Tensor:
        """Final hidden states [rows, T, H]; those of padded places mean nothing."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        padded = [[*chunk.tokens, *[chunk.tokens[-1]] * (longest - len(chunk.tokens))] for chunk in chunks]
        ids = self._index(padded)
        rows = _Rows(self._pages, chunks, longest)
        with self._adapters.chosen([chunk.adapter for chunk in chunks]):
            return self._states(chunks, ids, longest, rows)

    def _states(self, chunks: Sequence[Chunk], ids: Tensor, longest: int, rows: _Rows) -> Tensor:
        if not rows.earlier:
            return self.model.hidden(ids, cache=rows)
        first = np.array([[chunk.start] for chunk in chunks])
        last = np.array([[chunk.start + len(chunk.tokens) - 1] for chunk in chunks])
        # A padded place repeats the row's last position: it never lies beyond those of the model.
        positions = torch.from_numpy(np.minimum(first + np.arange(longest), last))
        return self.model.hidden(ids, positions.to(ids.device), cache=rows)

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)


class _Pages:
    """Keys and values of every layer, [pages, page_size, K, D].

    Positions come before heads, so that the pages of a row, once gathered, are one stretch of
    positions without another copy.
    """

    def __init__(self, model: Transformer, page_size: int, most: int) -> None:
        config = model.config
        self.page_size, self.most, self.device = page_size, most, model.device
        self.count = 0  # pages that memory is taken for
        empty = torch.empty(
            0, page_size, config.num_kv_heads, config.head_dim, dtype=model.dtype, device=model.device
        )
        self.keys, self.values = [empty] * config.num_layers, [empty] * config.num_layers

    def make_room(self, page: int) -> None:
        """Have memory for pages up to ``page``."""
        if page < self.count:
            return
        count = min(max(FIRST_PAGES, 2 * self.count, page + 1), self.most)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_empty(count, *old.shape[1:])
                layers[layer][: self.count] = old
        self.count = count


class _Rows:
    """The rows of one pass in front of the pages: what `Transformer` calls a cache.

    earlier: whether any row attends to positions before its chunk.
    """

    def __init__(self, pages: _Pages, chunks: Sequence[Chunk], longest: int) -> None:
        size = pages.page_size
        self._pages, self.earlier = pages, any(chunk.start for chunk in chunks)
        pages.make_room(max(max(chunk.pages) for chunk in chunks))
        slots: list[int] = []  # where each token that is no padding goes: page * size + place in the page
        real: list[int] = []  # the places of these tokens in rows * longest
        begun: list[int] = []
        for row, chunk in enumerate(chunks):
            end = chunk.start + len(chunk.tokens)
            real += range(row * longest, row * longest + len(chunk.tokens))
            slots += [chunk.pages[at // size] * size + at % size for at in range(chunk.start, end)]
            if end % size and (end - 1) // size * size >= chunk.start:
                begun.append(chunk.pages[end // size])
        self._slots = torch.tensor(slots, device=pages.device)
        self._real = torch.tensor(real, device=pages.device) if len(real) < len(chunks) * longest else None
        # Void slots are masked, but a number that is not finite times a weight of 0 is not finite: a
        # page is emptied when the first of its slots is written, whatever a sequence before left there.
        self._begun = torch.tensor(begun, device=pages.device) if begun else None
        self._table: Tensor | None = None
        if self.earlier:
            needed = [-(-(chunk.start + len(chunk.tokens)) // size) for chunk in chunks]
            # Rows with fewer pages repeat their own last one, which is masked.
            table = [
                [*chunk.pages[:count], *[chunk.pages[count - 1]] * (max(needed) - count)]
                for chunk, count in zip(chunks, needed, strict=True)
            ]
            self._table = torch.tensor(table, device=pages.device)

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, D]; return what the rows attend to: positions 0..length-1 of the layer."""
        return (
            self._update(self._pages.keys[layer], keys, length),
            self._update(self._pages.values[layer], values, length),
        )

    def _update(self, stored: Tensor, new: Tensor, length: int) -> Tensor:
        if self._begun is not None:
            stored.index_fill_(0, self._begun, 0)
        flat = new.transpose(1, 2).flatten(0, 1)
        if self._real is not None:
            flat = flat[self._real]
        stored.flatten(0, 1).index_copy_(0, self._slots, flat)
        if self._table is None:
            return new
        rows = stored.index_select(0, self._table.flatten())
        return rows.view(len(self._table), -1, *stored.shape[2:])[:, :length].transpose(1, 2)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
