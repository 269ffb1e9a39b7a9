"""CPU backends for small checkpoints, and ways to feed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Chunk
from tercet.engine.cpu import Quantization
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.pack import pack
from tercet.engine.cpu.types import weight_types
from tercet.model.weights import Weights

Logits = NDArray[np.float32]
CACHE_BYTES = 1 << 24


def load(
    directory: Path,
    quantization: Quantization = "none",
    threads: int = 1,
    portable: bool = False,
    exact: bool = False,
) -> CPUBackend:
    """Load a backend with less memory for keys and values than usual; with ``exact`` they are float32."""
    weights = Weights(directory)
    types = weight_types(weights.config, quantization, weights)
    places, memory = pack(weights.config, types, weights, weights.blocks)
    return CPUBackend(
        weights.config,
        places,
        memory,
        quantization="none" if exact else quantization,
        threads=threads,
        cache_bytes=CACHE_BYTES,
        portable=portable,
    )


def chunk(
    tokens: Sequence[int],
    start: int = 0,
    pages: Sequence[int] = range(64),
    sequence: int = 0,
    outputs: Any = None,
) -> Chunk:
    """Return a chunk; every token is an output by default."""
    return Chunk(
        sequence, list(tokens), start, list(pages), range(len(tokens)) if outputs is None else outputs
    )


def at_once(backend: CPUBackend, tokens: Sequence[int], pages: Sequence[int] = range(64)) -> Logits:
    """Return the logits after each token, in as few calls as possible."""
    size = backend.max_tokens
    calls = [chunk(tokens[begin : begin + size], begin, pages) for begin in range(0, len(tokens), size)]
    return np.concatenate([backend.feed([call]) for call in calls])


def in_pieces(
    backend: CPUBackend, sequences: Sequence[Sequence[int]], rng: np.random.Generator, sizes: Sequence[int]
) -> list[Logits]:
    """Return the logits after each token of each sequence, fed in random calls of random sizes and pages.

    A sequence gets its pages when it needs them, so that the pages of all sequences are mixed.
    """
    free = list(rng.permutation(backend.num_pages))
    pages: list[list[int]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    result: list[list[Logits]] = [[] for _ in sequences]
    while any(count < len(tokens) for count, tokens in zip(done, sequences, strict=True)):
        left = [number for number, tokens in enumerate(sequences) if done[number] < len(tokens)]
        taken = rng.permutation(left)[: rng.integers(1, len(left) + 1)]
        chunks = []
        for number in taken:
            begin, tokens = done[number], sequences[number]
            end = min(len(tokens), begin + int(rng.choice(sizes)))
            while len(pages[number]) * backend.page_size < end:
                pages[number].append(int(free.pop()))
            chunks.append(chunk(tokens[begin:end], begin, pages[number], number))
            done[number] = end
        rows = backend.feed(chunks)
        cuts = np.cumsum([len(part.tokens) for part in chunks])[:-1]
        for number, part in zip(taken, np.split(rows, cuts), strict=True):
            result[number].append(part)
    return [np.concatenate(parts) for parts in result]
