"""The seam between the engine and whatever computes the network.

The engine decides what is computed for whom, and where its keys and values are kept; a backend
computes and keeps. Everything that crosses is Python integers and numpy arrays.

Keys and values lie in *pages* of ``page_size`` positions (Kwon et al. 2023, arXiv:2309.06180). A
sequence is a list of pages, and a token's slot in it is its position. Feeding from position p
overwrites what was at p and after it, as far as tokens are fed; what lies beyond is void. So a
sequence is rewound by feeding it from an earlier position again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of one sequence, fed at positions ``start``, ``start + 1``, ...

    sequence: which sequence; stays the same while it lives. Backends with pages may ignore it.
    tokens: at least one.
    pages: the sequence's pages in order; they cover ``start + len(tokens)`` positions at least.
    wanted: ascending indices into ``tokens``: the logits after these are wanted. May be empty.
    adapter: what `Backend.add_adapter` gave; 0: the weights alone. The same for all of a sequence.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: Sequence[int]
    adapter: int = 0


class Backend(Protocol):
    """Computes one network.

    The chunks of one call are of different sequences, so that none depends on another of the same
    call. Several may have pages in common before their starts, which are only read; a page that is
    written to belongs to one sequence.

    vocab_size: V, the width of the logits.
    max_positions: how many tokens a sequence may hold at most.
    page_size: positions in a page.
    num_pages: how many pages there are, numbered from 0: the memory budget.
    max_tokens: tokens in one call at most, over all its chunks.
    max_chunks: chunks in one call at most.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def max_chunks(self) -> int: ...

    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks; logits [places, V], a row for each wanted place in order of chunks."""
        ...

    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Compute the chunks; how likely is each of ``targets[n]`` at the n-th wanted place?

        A place may have any number of targets. Returns for all targets in order their natural
        log-probabilities, and whether each is the likeliest token at its place. The logits of all
        places are never in memory at once.
        """
        ...

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks; what the head reads at each wanted place: the final norm's output [places, H].

        Raises:
            UserError: the network does not show it.
        """
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of pages: (source, target) each."""
        ...

    def add_adapter(self, directory: str | Path) -> int:
        """Keep a LoRA adapter beside the weights, which stay as they are; its number, from 1 on.

        Raises:
            UserError: the directory holds no adapter for this network, or the backend takes none.
        """
        ...

    def release(self, sequence: int) -> None:
        """The sequence is over. Nothing to do for a backend that keeps all it knows in pages."""
        ...


def split_calls(backend: Backend, chunks: Sequence[Chunk], most: int | None = None) -> Iterator[list[Chunk]]:
    """``chunks`` in calls that keep the backend's bounds; long ones are cut and go on in the next call.

    All wanted places come in the order they had.

    most: tokens in a call at most, where that is fewer than the backend's own bound.
    """
    call: list[Chunk] = []
    most = min(backend.max_tokens, most or backend.max_tokens)
    room = most
    for chunk in chunks:
        at = 0
        while at < len(chunk.tokens):
            if at or not room or len(call) == backend.max_chunks:
                yield call
                call, room = [], most
            end = min(at + room, len(chunk.tokens))
            wanted = [place - at for place in chunk.wanted if at <= place < end]
            part = replace(chunk, tokens=chunk.tokens[at:end], start=chunk.start + at, wanted=wanted)
            call.append(part)
            room -= end - at
            at = end
    if call:
        yield call
