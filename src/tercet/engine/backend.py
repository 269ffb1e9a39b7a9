"""The interface between the engine and the code that computes the network.

The engine decides which tokens are computed for which sequence, and in which pages their keys and
values are stored; a backend computes and stores them. Only Python integers and numpy arrays cross the
interface.

Keys and values are stored in *pages* of ``page_size`` positions (Kwon et al. 2023, arXiv:2309.06180).
A sequence is a list of pages, and a token's slot in it is its position. Feeding n tokens from position
p on overwrites the slots p to p + n - 1; the slots after them are void. A sequence is therefore rewound
by feeding it from an earlier position again.
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
    """Tokens of one sequence, fed at positions ``start``, ``start + 1``, ...

    Attributes:
        sequence: the number of the sequence, which stays the same from its first chunk until it is
            released. Backends with pages may ignore it.
        tokens: at least one.
        start: the position of the first of ``tokens``.
        pages: the sequence's pages in order; they cover at least ``start + len(tokens)`` positions.
        outputs: ascending indices into ``tokens``, one for each row of the result: the backend returns
            the logits after these tokens. May be empty.
        adapter: the number that `Backend.add_adapter` returned, or 0 for the weights alone. All chunks
            of a sequence have the same one.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    outputs: Sequence[int]
    adapter: int = 0


class Backend(Protocol):
    """Computes one network.

    The chunks of one call belong to different sequences, so no chunk depends on another chunk of the
    same call. Sequences may share pages before the starts of their chunks, where pages are only read; a
    page that is written to belongs to one sequence.

    An *output* below is one of the tokens that ``Chunk.outputs`` names.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        ...

    @property
    def max_positions(self) -> int:
        """The largest number of tokens that a sequence may hold."""
        ...

    @property
    def page_size(self) -> int:
        """Positions in a page."""
        ...

    @property
    def num_pages(self) -> int:
        """The number of pages, which are numbered from 0: the memory budget."""
        ...

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens in one call, over all its chunks."""
        ...

    @property
    def max_chunks(self) -> int:
        """The largest number of chunks in one call."""
        ...

    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks; return the logits [outputs, V], a row for each output in order of chunks."""
        ...

    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Compute the chunks; return how likely each of ``targets[n]`` is after the n-th output.

        An output may have any number of targets. The logits of all outputs are never in memory at once.

        Returns:
            For all targets in order: their natural log-probabilities, and whether each is the likeliest
            token after its output.
        """
        ...

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks; return the input of the output head, the final norm's output [outputs, H].

        Raises:
            UserError: the network does not expose it.
        """
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of pages; each pair is (source, target)."""
        ...

    def add_adapter(self, directory: str | Path) -> int:
        """Load a LoRA adapter beside the weights, which stay unchanged; return its number, from 1 on.

        Raises:
            UserError: the directory holds no adapter for this network, or the backend supports none.
        """
        ...

    def release(self, sequence: int) -> None:
        """Forget a sequence that has ended; does nothing in a backend that stores everything in pages."""
        ...


def split_calls(backend: Backend, chunks: Sequence[Chunk], limit: int | None = None) -> Iterator[list[Chunk]]:
    """Divide ``chunks`` into calls within the backend's bounds; cut long chunks at the end of a call.

    The outputs keep their order over all calls.

    Args:
        backend: gives the bounds.
        chunks: of any length and number.
        limit: the largest number of tokens in a call, where that is below the backend's own bound.
    """
    call: list[Chunk] = []
    limit = min(backend.max_tokens, limit or backend.max_tokens)
    room = limit
    for chunk in chunks:
        begin = 0
        while begin < len(chunk.tokens):
            if begin or not room or len(call) == backend.max_chunks:
                yield call
                call, room = [], limit
            end = min(begin + room, len(chunk.tokens))
            outputs = [index - begin for index in chunk.outputs if begin <= index < end]
            call.append(
                replace(chunk, tokens=chunk.tokens[begin:end], start=chunk.start + begin, outputs=outputs)
            )
            room -= end - begin
            begin = end
    if call:
        yield call
