"""Tokens that several sequences begin with, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from tercet.engine.backend import Backend, State

WORTH = 32  # a shorter prefix costs more in masks and copies than it saves


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all ``sequences`` begin with."""
    # The first and the last in lexicographic order differ the earliest.
    first, last = min(sequences), max(sequences)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


class SharedPrefix(Generic[State]):
    """The prefix of a call's sequences (a few-shot header, a system prompt); ``length`` 0 if not worth it."""

    def __init__(self, backend: Backend[State], sequences: Sequence[list[int]]) -> None:
        length = common_prefix(sequences) if len(sequences) > 1 else 0
        self.length = length if length >= WORTH else 0
        self._backend = backend
        if self.length:
            self._state = backend.new_state(1, self.length)
            backend.next_logits(self._state, [sequences[0][: self.length]], [0])

    def rows(self, count: int, capacity: int) -> State:
        """A new state whose rows all hold the prefix already: feed them from position ``length`` on."""
        if not self.length:
            return self._backend.new_state(count, capacity)
        return self._backend.gather([(self._state, [0] * count)], capacity)
