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

CACHE_BYTES = 1 << 30  # the default memory for keys and values: fits a laptop beside the model
PAGE_SIZE = 16  # small, so that little of a page stays unused; reading pages costs the same at any size
FIRST_PAGES = 64  # pages that memory is allocated for at first; doubled when more are required
PADDING = 64  # padded tokens that cost less than reading the weights in another pass
# The largest number of bytes of keys and values that one layer of a pass reads. On a CPU they stay in its
# caches between gathering and attention (measured: 8 to 16 MiB are best); elsewhere they are small beside
# the model.
GATHERED_CPU, GATHERED_ELSEWHERE = 1 << 23, 1 << 28
LOGIT_VALUES = 1 << 25  # logits computed at a time when scoring: 128 MiB in float32


class TorchBackend:
    """A `Backend` over `Transformer`.

    The chunks of a call are computed in passes of similar lengths, padded on the right. Attention reads
    each row's pages as one contiguous array, gathered for every layer. A pass in which all sequences
    start at position 0 requires neither gathering nor a mask.

    Args:
        model: computes the network, on its device and in its dtype.
        cache_bytes: memory for keys and values, allocated when it is required.
        page_size: positions in a page.
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
        # Another pass reads all weights again, so it should save at least as many bytes.
        parameters = model.model.layers.parameters()
        weights = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
        self._gathered_tokens = max(gathered, weights // config.num_layers) // (2 * width) + 1
        self._pages = _Pages(model, page_size, self.num_pages)
        self._adapters = Adapters(model)
        scaling = config.rope_scaling
        # With these kinds of scaling the frequencies depend on the length of the pass beyond this many
        # positions: a longer sequence has a pass of its own, so that no other sequence changes its output.
        self._stretched_from = (
            scaling.original_max_positions
            if scaling is not None and scaling.kind in ("dynamic", "longrope")
            else config.max_positions
        )

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Return the logits [outputs, V], in order of chunks."""
        return _numpy(self.model.logits(self._hidden(chunks)))

    @torch.inference_mode()
    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the natural log-probability of every target, and whether it is the likeliest there."""
        hidden = self._hidden(chunks)
        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
        likeliest: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        step = max(1, LOGIT_VALUES // self.vocab_size)
        for begin in range(0, len(targets), step):
            part = targets[begin : begin + step]
            logits = self.model.logits(hidden[begin : begin + step])
            rows = self._index([row for row, tokens in enumerate(part) for _ in tokens])
            targets_here = self._index([token for tokens in part for token in tokens])
            values.append(_numpy(logits[rows, targets_here] - logits.logsumexp(-1)[rows]))
            likeliest.append((logits.argmax(-1)[rows] == targets_here).cpu().numpy())
        return np.concatenate(values), np.concatenate(likeliest)

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Return the final norm's output [outputs, H], in order of chunks."""
        return _numpy(self._hidden(chunks))

    @torch.inference_mode()
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of pages; each pair is (source, target)."""
        self._pages.make_room(max((page for pair in pairs for page in pair), default=0))
        sources, targets = (self._index([pair[side] for pair in pairs]) for side in (0, 1))
        for layer in (*self._pages.keys, *self._pages.values):
            layer.index_copy_(0, targets, layer[sources])

    def add_adapter(self, directory: str | Path) -> int:
        """Load a LoRA adapter beside the weights; return its number, from 1 on.

        Raises:
            UserError: the directory holds no adapter for this network.
        """
        return self._adapters.add(read_adapter(directory, self.model.config)[1])

    def release(self, sequence: int) -> None:
        """Do nothing: the state of a sequence is in its pages."""

    def _hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the final hidden states [outputs, H], in order of chunks."""
        first = np.cumsum([0, *(len(chunk.outputs) for chunk in chunks)]).tolist()
        width = self.model.config.hidden_size
        states = torch.empty(first[-1], width, dtype=self.model.dtype, device=self.model.device)
        for numbers in self._passes(chunks):
            hidden = self._pass([chunks[number] for number in numbers])
            rows = [row for row, number in enumerate(numbers) for _ in chunks[number].outputs]
            if rows:
                columns = [column for number in numbers for column in chunks[number].outputs]
                into = [first[number] + n for number in numbers for n in range(len(chunks[number].outputs))]
                states[self._index(into)] = hidden[self._index(rows), self._index(columns)].to(states.dtype)
        return states

    def _passes(self, chunks: Sequence[Chunk]) -> Iterator[list[int]]:
        """Yield the numbers of the chunks that are computed in one pass."""
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
        """Return the final hidden states [rows, T, H] of one pass; those of padded places are meaningless."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        padded = [[*chunk.tokens, *[chunk.tokens[-1]] * (longest - len(chunk.tokens))] for chunk in chunks]
        ids = self._index(padded)
        rows = _Rows(self._pages, chunks, longest)
        with self._adapters.chosen([chunk.adapter for chunk in chunks]):
            return self._states(chunks, ids, longest, rows)

    def _states(self, chunks: Sequence[Chunk], ids: Tensor, longest: int, rows: _Rows) -> Tensor:
        """Return the final hidden states [rows, T, H] of the padded ``ids`` [rows, T]."""
        if not rows.earlier:
            return self.model.hidden(ids, cache=rows)
        first = np.array([[chunk.start] for chunk in chunks])
        last = np.array([[chunk.start + len(chunk.tokens) - 1] for chunk in chunks])
        # A padded place repeats the row's last position, so it never lies beyond the model's positions.
        positions = torch.from_numpy(np.minimum(first + np.arange(longest), last))
        return self.model.hidden(ids, positions.to(ids.device), cache=rows)

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Return the values as an index on the network's device."""
        return torch.tensor(values, dtype=torch.long, device=self.model.device)


class _Pages:
    """Keys and values of every layer, [pages, page_size, K, D].

    Positions come before heads, so that the gathered pages of a row are contiguous positions without
    another copy.
    """

    def __init__(self, model: Transformer, page_size: int, limit: int) -> None:
        config = model.config
        self.page_size, self.limit, self.device = page_size, limit, model.device
        self.count = 0  # pages that memory is allocated for
        empty = torch.empty(
            0, page_size, config.num_kv_heads, config.head_dim, dtype=model.dtype, device=model.device
        )
        self.keys, self.values = [empty] * config.num_layers, [empty] * config.num_layers

    def make_room(self, page: int) -> None:
        """Allocate memory for pages up to ``page``."""
        if page < self.count:
            return
        count = min(max(FIRST_PAGES, 2 * self.count, page + 1), self.limit)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_empty(count, *old.shape[1:])
                layers[layer][: self.count] = old
        self.count = count


class _Rows:
    """The pages as the key/value cache of one pass of a `Transformer`.

    Attributes:
        earlier: whether any row attends to positions before its chunk.
    """

    def __init__(self, pages: _Pages, chunks: Sequence[Chunk], longest: int) -> None:
        size = pages.page_size
        self._pages, self.earlier = pages, any(chunk.start for chunk in chunks)
        pages.make_room(max(max(chunk.pages) for chunk in chunks))
        slots: list[int] = []  # of each token that is not padding: page * size + place in the page
        real: list[int] = []  # the indices of these tokens in rows * longest
        begun: list[int] = []
        for row, chunk in enumerate(chunks):
            end = chunk.start + len(chunk.tokens)
            real += range(row * longest, row * longest + len(chunk.tokens))
            slots += [chunk.pages[at // size] * size + at % size for at in range(chunk.start, end)]
            if end % size and (end - 1) // size * size >= chunk.start:
                begun.append(chunk.pages[end // size])
        self._slots = torch.tensor(slots, device=pages.device)
        self._real = torch.tensor(real, device=pages.device) if len(real) < len(chunks) * longest else None
        # Void slots are masked, but a value that is not finite times a weight of 0 is not finite. A page is
        # therefore zeroed when the first of its slots is written, because an earlier sequence used it.
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
        """Store keys and values [B, K, T, D]; return those of positions 0..length-1, to attend to."""
        return (
            self._update(self._pages.keys[layer], keys, length),
            self._update(self._pages.values[layer], values, length),
        )

    def _update(self, stored: Tensor, new: Tensor, length: int) -> Tensor:
        """Store ``new`` in the pages of one layer; return the positions to attend to."""
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
    """Return the tensor as a float32 array."""
    return tensor.float().cpu().numpy()
