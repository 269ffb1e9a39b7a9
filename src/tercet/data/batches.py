"""Choose the examples of a training step and arrange them in rectangular arrays, with numpy only.

Every function is a pure function of the seed and the step number, so a resumed run gets the same batches as
an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
IGNORED = -100  # target of a position that is not trained on
# Fills the inputs of short rows. Causal attention and the targets hide it, so any id of the embedding serves;
# a tokenizer's own pad token may lie beyond the embedding.
PADDING = 0


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of ``count`` items in an epoch: a new permutation for each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def items_at(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Return the ``per_step`` items of optimizer step ``step``; each item comes once an epoch."""
    first = step * per_step
    orders: dict[int, NDArray[np.int64]] = {}
    chosen = []
    for position in range(first, first + per_step):
        epoch = position // count
        if epoch not in orders:
            orders[epoch] = epoch_order(count, seed, epoch)
        chosen.append(int(orders[epoch][position % count]))
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A training example: token ids [T], and for each token whether the loss covers it.

    Both are arrays because all examples stay in memory during training: 5 bytes per token.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    @classmethod
    def of(cls, ids: Sequence[int], supervised: Sequence[bool]) -> Encoded:
        """Make an example of ids and a mask of the same length."""
        return cls(np.array(ids, np.int32), np.array(supervised, np.bool_))

    @property
    def count(self) -> int:
        """Number of tokens in the loss: supervised tokens that have a predecessor to predict them from."""
        return int(np.count_nonzero(self.supervised[1:]))

    def truncated(self, length: int) -> Encoded:
        """Return the first ``length`` tokens, as copies: a view would keep the whole example in memory."""
        return Encoded(self.ids[:length].copy(), self.supervised[:length].copy())


def padded(examples: Sequence[Encoded]) -> tuple[Tokens, Tokens]:
    """Return inputs and targets [B, T] of next-token prediction, padded on the right.

    Targets are set before padding, so the stop token is in the loss also where its id is `PADDING`.
    """
    width = max(len(example.ids) for example in examples) - 1
    tokens = np.full((len(examples), width), PADDING, dtype=np.int64)
    targets = np.full((len(examples), width), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.ids) - 1
        tokens[row, :length] = example.ids[:-1]
        targets[row, :length] = np.where(example.supervised[1:], example.ids[1:], IGNORED)
    return tokens, targets


def micro_batches(examples: Sequence[Encoded], budget: int) -> list[tuple[Tokens, Tokens]]:
    """Divide the examples of a step into rectangles of at most ``budget`` tokens, or of a single row.

    Examples are sorted by length first to keep padding low. The loss weighs every token equally, so the
    division does not change the gradient.
    """
    pieces: list[list[Encoded]] = []
    for example in sorted(examples, key=lambda example: len(example.ids)):
        # In sorted order this example is the longest of its piece so far.
        if pieces and (len(pieces[-1]) + 1) * len(example.ids) <= budget:
            pieces[-1].append(example)
        else:
            pieces.append([example])
    return [padded(piece) for piece in pieces]
