"""The network through PyTorch, on any device PyTorch knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.engine.backend import Tokens
from tercet.model.transformer import KVCache, Transformer

CACHE_BYTES = 1 << 30  # the memory for keys and values unless asked otherwise: fits a laptop beside the model
ROOM = 128  # unused slots in a row's memory; enlarging copies the cache, so not at every token
LOGIT_VALUES = 1 << 25  # logits computed at a time when scoring: 128 MiB in float32


@dataclass
class TorchState:
    """Keys and values, and how many slots of each row can have been written.

    ``capacity`` is what a row may grow to; the cache itself has memory for little more than is used.
    """

    cache: KVCache
    capacity: int
    length: int = 0


class TorchBackend:
    """A `Backend` over `Transformer`.

    Unequal rows are padded on the right. A padded place repeats the row's last token at its own
    position: it writes the same keys and values to the same slot, and needs no room of its own.
    """

    def __init__(self, model: Transformer, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model.eval()
        config = model.config
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions
        self.cache_tokens = max(1, cache_bytes // per_token)

    def new_state(self, rows: int, capacity: int) -> TorchState:
        return TorchState(self.model.new_cache(rows, 0), capacity)

    @torch.inference_mode()
    def gather(self, parts: Sequence[tuple[TorchState, Sequence[int]]], capacity: int) -> TorchState:
        length = min(capacity, max(part.length for part, _ in parts))
        return TorchState(self._copy(parts, min(capacity, length + ROOM)), capacity, length)

    def _copy(self, parts: Sequence[tuple[TorchState, Sequence[int]]], room: int) -> KVCache:
        cache = self.model.new_cache(sum(len(rows) for _, rows in parts), room)
        at = 0
        for part, rows in parts:
            index = torch.tensor(rows, dtype=torch.long, device=self.model.device)
            used = min(part.length, room)
            for old, new in ((part.cache.keys, cache.keys), (part.cache.values, cache.values)):
                for source, target in zip(old, new, strict=True):
                    target[at : at + len(rows), :, :used] = source[:, :, :used][index]
            at += len(rows)
        return cache

    @torch.inference_mode()
    def next_logits(self, state: TorchState, tokens: Tokens, starts: Sequence[int]) -> NDArray[np.float32]:
        hidden = self._feed(state, tokens, starts)
        last = torch.tensor([len(row) - 1 for row in tokens], device=hidden.device)
        rows = torch.arange(len(tokens), device=hidden.device)
        return _numpy(self.model.logits(hidden[rows, last]))

    @torch.inference_mode()
    def logprobs(
        self,
        state: TorchState,
        tokens: Tokens,
        starts: Sequence[int],
        places: Sequence[tuple[int, int]],
        targets: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        hidden = self._feed(state, tokens, starts)
        # The head, the largest matrix of a small model, runs once at each place.
        unique, inverse = np.unique(np.array(places).reshape(-1, 2), axis=0, return_inverse=True)
        where = torch.from_numpy(unique).to(hidden.device)
        values = np.zeros(len(targets), dtype=np.float32)
        likeliest = np.zeros(len(targets), dtype=np.bool_)
        step = max(1, LOGIT_VALUES // self.vocab_size)
        for begin in range(0, len(unique), step):
            part = where[begin : begin + step]
            logits = self.model.logits(hidden[part[:, 0], part[:, 1]])
            mine = np.flatnonzero((inverse >= begin) & (inverse < begin + step))
            rows = torch.from_numpy(inverse[mine] - begin).to(hidden.device)
            wanted = torch.tensor([targets[n] for n in mine.tolist()], dtype=torch.long, device=hidden.device)
            values[mine] = _numpy(logits[rows, wanted] - logits.logsumexp(-1)[rows])
            likeliest[mine] = (logits.argmax(-1)[rows] == wanted).cpu().numpy()
        return values, likeliest

    def _feed(self, state: TorchState, tokens: Tokens, starts: Sequence[int]) -> Tensor:
        """Final hidden states [rows, T, H]; those of padded places mean nothing."""
        longest = max(len(row) for row in tokens)
        padded = np.array([[*row, *[row[-1]] * (longest - len(row))] for row in tokens], dtype=np.int64)
        ids = torch.from_numpy(padded).to(self.model.device)
        if not any(starts):
            # Plain causal attention from the first slot on needs no mask, which is faster. Padding
            # has slots of its own here, void until they are written again.
            self._reserve(state, longest)
            return self.model.hidden(ids, cache=state.cache)
        first = np.array(starts, dtype=np.int64)[:, None]
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)[:, None]
        positions = np.minimum(first + np.arange(longest), first + lengths - 1)
        self._reserve(state, int(positions.max()) + 1)
        return self.model.hidden(ids, torch.from_numpy(positions).to(ids.device), cache=state.cache)

    def _reserve(self, state: TorchState, length: int) -> None:
        if length > state.capacity:
            raise ValueError(f"{length} tokens do not fit a state of capacity {state.capacity}")
        if length > state.cache.capacity:
            rows = range(state.cache.keys[0].shape[0])
            state.cache = self._copy([(state, rows)], min(state.capacity, length + ROOM))
        state.length = max(state.length, length)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
