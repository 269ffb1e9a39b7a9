"""Pack documents into rows of equal length: no attention across documents, little padding, no lost token.

A stream of tokens begins with an end-of-text token, and every document in it ends with one. A document is
trained on as the run [end-of-text before it, its tokens, its own end-of-text]. Each of its tokens and its
end are predicted once per epoch, and the first token marks the beginning of a document.

Documents longer than a row are cut into full rows. Their remainders and the short documents are packed
best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): longest first, each into the fullest row that
has room. The packing, in numpy only, depends on nothing but the lengths, so a resumed run makes the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tercet.data.batches import IGNORED, Tokens

Stream = NDArray[np.unsignedinteger]
Places = NDArray[np.int64]

WASTE = 0.02  # a packing with more padding than this cuts some of its pieces to fill rows


@dataclass(frozen=True)
class Packing:
    """The pieces of the stream that each row holds.

    Attributes:
        width: predictions per row.
        begins: [P] position in the stream of each piece's first input token.
        lengths: [P] number of tokens that each piece predicts.
        offsets: [R + 1]; row r holds the pieces offsets[r] to offsets[r + 1] - 1 in sequence.
    """

    width: int
    begins: Places
    lengths: Places
    offsets: Places

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.offsets) - 1

    @property
    def waste(self) -> float:
        """Fraction of positions that predict nothing."""
        return 1 - float(self.lengths.sum()) / max(1, self.rows * self.width)


def pack(starts: Places, width: int) -> Packing:
    """Pack the documents of a stream.

    Args:
        starts: [D + 1] position of each document's first token, then the length of the stream.
        width: predictions per row, at least 1.
    """
    starts = np.asarray(starts, np.int64)
    lengths = np.diff(starts)  # predictions: the document's tokens and its end
    begins = starts[:-1] - 1  # the end-of-text token before the document
    full = lengths // width
    owner = np.repeat(np.arange(len(lengths)), full)
    # For each full row, its index within its document.
    index = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    whole = begins[owner] + index * width
    rest = lengths - full * width
    unfinished = np.flatnonzero(rest)
    rest_begins, rest_lengths = begins[unfinished] + full[unfinished] * width, rest[unfinished]
    row_of = best_fit(rest_lengths, width)
    order = np.argsort(row_of, kind="stable")
    rest_begins, rest_lengths, row_of = rest_begins[order], rest_lengths[order], row_of[order]
    packing = _joined(whole, width, rest_begins, rest_lengths, row_of)
    if packing.waste > WASTE:
        packing = _joined(whole, width, *_cut_to_fill(rest_begins, rest_lengths, row_of, width))
    return packing


def _joined(whole: Places, width: int, begins: Places, lengths: Places, row_of: Places) -> Packing:
    """Join full rows of a single piece each and packed rows; ``row_of`` ascends without gaps."""
    counts = np.bincount(row_of) if len(row_of) else np.zeros(0, np.int64)
    return Packing(
        width,
        np.concatenate((whole, begins)),
        np.concatenate((np.full(len(whole), width, np.int64), lengths)),
        np.concatenate(([0], np.cumsum(np.concatenate((np.ones(len(whole), np.int64), counts))))),
    )


def best_fit(lengths: Places, width: int) -> Places:
    """Assign each piece to a row: longest first, each into the row with the least sufficient room.

    Pieces of equal length are placed together, so the work grows with the number of distinct lengths, not
    with the number of pieces.

    Args:
        lengths: [P] from 1 to ``width``.
        width: the capacity of a row.

    Returns:
        [P] the row of each piece, from 0.
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    rows = 0
    open_rows: list[list[Places]] = [[] for _ in range(width + 1)]  # by remaining room

    def reopen(row_numbers: Places, room: int) -> None:
        if room and len(row_numbers):
            open_rows[room].append(row_numbers)

    counts = np.bincount(lengths, minlength=width + 1)
    ends = np.cumsum(counts[::-1])[::-1]  # of the pieces of each length in ``order``
    for length in np.flatnonzero(counts)[::-1].tolist():
        pieces = order[ends[length] - counts[length] : ends[length]]
        room = length
        while len(pieces) and room <= width:
            if not open_rows[room]:
                room += 1
                continue
            stack = open_rows[room].pop()
            taken = stack[: len(pieces)]
            reopen(stack[len(taken) :], room)
            row_of[pieces[: len(taken)]] = taken
            pieces = pieces[len(taken) :]
            reopen(taken, room - length)
            room = max(length, room - length)  # the remaining room may be the best fit for the next piece
        if len(pieces):
            per_row = width // length
            fresh = rows + np.arange(len(pieces)) // per_row
            row_of[pieces] = fresh
            count = int(fresh[-1]) - rows + 1
            last = len(pieces) - (count - 1) * per_row  # pieces in the last of the new rows
            reopen(rows + np.arange(count - 1), width - per_row * length)
            reopen(np.array([rows + count - 1]), width - last * length)
            rows += count
    return row_of


def _cut_to_fill(
    begins: Places, lengths: Places, row_of: Places, width: int
) -> tuple[Places, Places, Places]:
    """Concatenate the pieces of rows that are not nearly full and cut them at every ``width``.

    A cut costs the second part its context; padding costs all of its computation.
    """
    filled = np.bincount(row_of, weights=lengths)
    full = filled[row_of] >= (1 - WASTE / 2) * width
    _, full_rows = np.unique(row_of[full], return_inverse=True)
    offset = int(full_rows.max()) + 1 if len(full_rows) else 0
    loose_begins, loose_lengths = begins[~full], lengths[~full]
    ends = np.cumsum(loose_lengths)
    total = int(ends[-1]) if len(ends) else 0
    # A part begins wherever a piece or a row begins.
    cuts = np.union1d(ends - loose_lengths, np.arange(0, total, width))
    piece = np.searchsorted(ends, cuts, "right")
    part_lengths = np.diff(np.append(cuts, total))
    part_begins = loose_begins[piece] + cuts - (ends - loose_lengths)[piece]
    return (
        np.concatenate((begins[full], part_begins)),
        np.concatenate((lengths[full], part_lengths)),
        np.concatenate((full_rows.astype(np.int64), offset + cuts // width)),
    )


def batch(
    stream: Stream, packing: Packing, rows: list[int]
) -> tuple[Tokens, Tokens, Tokens | None, Tokens | None]:
    """Return inputs, targets, positions and segments [B, width] of the rows with the given numbers.

    Positions restart with every piece, and segments number the pieces of a row. Padding is a separate segment
    whose targets are `IGNORED`. Positions and segments are None if every row is a single piece, for which
    plain causal attention is enough.
    """
    shape = (len(rows), packing.width)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, segments = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
    plain = True
    for index, row in enumerate(rows):
        first, last = int(packing.offsets[row]), int(packing.offsets[row + 1])
        at = 0
        for number, piece in enumerate(range(first, last)):
            begin, length = int(packing.begins[piece]), int(packing.lengths[piece])
            run = stream[begin : begin + length + 1]
            tokens[index, at : at + length], targets[index, at : at + length] = run[:-1], run[1:]
            positions[index, at : at + length] = np.arange(length)
            segments[index, at : at + length] = number
            at += length
        segments[index, at:] = last - first
        positions[index, at:] = np.arange(packing.width - at)
        # A single piece never attends to the padding after it, whose results are unused.
        plain = plain and last - first == 1
    if plain:
        return tokens, targets, None, None
    return tokens, targets, positions, cast(Tokens, segments)
