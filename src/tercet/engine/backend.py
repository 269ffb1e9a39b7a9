"""The seam between the engine and whatever computes the network.

The engine decides what is computed for whom; a backend computes it. Everything that crosses is
Python integers and numpy arrays. `TorchBackend` is one; another can stand in its place if it keeps
the rules below.

A *state* holds the keys and values of some rows (sequences). A token's slot in its row is its
position. Feeding a row from position p overwrites what was at p and makes what lies after the fed
tokens void, so that a row can be rewound by feeding it from an earlier position again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

State = TypeVar("State")
Tokens = Sequence[Sequence[int]]  # for each row the tokens it is fed, at least one; lengths may differ


class Backend(Protocol[State]):
    """Computes one network."""

    @property
    def vocab_size(self) -> int:
        """V: the width of the logits."""
        ...

    @property
    def max_positions(self) -> int:
        """How many tokens a row may hold at most."""
        ...

    @property
    def cache_tokens(self) -> int:
        """Rows times capacity that a state should not exceed: the memory budget in tokens."""
        ...

    def new_state(self, rows: int, capacity: int) -> State:
        """A state of empty rows, each with room for ``capacity`` tokens."""
        ...

    def gather(self, parts: Sequence[tuple[State, Sequence[int]]], capacity: int) -> State:
        """A state made of the named rows of each part, in order; a row may be named repeatedly.

        The parts stay valid, and what is fed to the result does not change them.
        """
        ...

    def next_logits(self, state: State, tokens: Tokens, starts: Sequence[int]) -> NDArray[np.float32]:
        """Feed row i ``tokens[i]`` from position ``starts[i]``; logits [rows, V] after its last token."""
        ...

    def logprobs(
        self,
        state: State,
        tokens: Tokens,
        starts: Sequence[int],
        places: Sequence[tuple[int, int]],
        targets: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Feed the same way; how likely is ``targets[n]`` after token ``places[n]`` (row, index in tokens)?

        A place may be named with several targets. Returns natural log-probabilities [N], and [N]
        whether the target is the likeliest token there.
        """
        ...
