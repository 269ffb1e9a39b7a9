"""Documents into rows of equal length: nothing crosses a document, little is padding, nothing is lost.

A stream of tokens begins with an end-of-text token and every document in it ends with one. So a document
is trained on as the run [end-of-text before it, its tokens, its own end-of-text]: every token of it and
the end are predicted, once a pass, and the model knows that it is at a beginning.

Documents longer than a row are cut into full rows; what remains of them, and the short ones, are packed
best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): longest first, each into the fullest row that
has room. numpy only; everything follows from the lengths, so a resumed run packs alike.
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
    """Which pieces of the stream each row holds.

    begins, lengths: [P] the place of each piece's first input token, and how many tokens it predicts.
    offsets: [R + 1]; row r holds pieces offsets[r] to offsets[r + 1] - 1, one after the other.
    """

    width: int  # predictions in a row
    begins: Places
    lengths: Places
    offsets: Places

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def waste(self) -> float:
        """The share of positions that predict nothing."""
        return 1 - float(self.lengths.sum()) / max(1, self.rows * self.width)


def pack(starts: Places, width: int) -> Packing:
    """The packing of documents whose first tokens stand at ``starts[:-1]``; ``starts[-1]``: the stream's length.

    width: predictions in a row, at least 1.
    """
    starts = np.asarray(starts, np.int64)
    lengths = np.diff(starts)  # of predictions: the document's tokens and its end
    begins = starts[:-1] - 1  # the end of text before it
    full = lengths // width
    owner = np.repeat(np.arange(len(lengths)), full)
    # The how-manieth full row of its document each is.
    place = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    whole = begins[owner] + place * width
    rest = lengths - full * width
    kept = np.flatnonzero(rest)
    rest_begins, rest_lengths = begins[kept] + full[kept] * width, rest[kept]
    row_of = best_fit(rest_lengths, width)
    order = np.argsort(row_of, kind="stable")
    rest_begins, rest_lengths, row_of = rest_begins[order], rest_lengths[order], row_of[order]
    found = _joined(whole, width, rest_begins, rest_lengths, row_of)
    if found.waste > WASTE:
        found = _joined(whole, width, *_cut_to_fill(rest_begins, rest_lengths, row_of, width))
    return found


def _joined(whole: Places, width: int, begins: Places, lengths: Places, row_of: Places) -> Packing:
    """Full rows of one piece each, then the packed ones; ``row_of`` ascends without gaps."""
    counts = np.bincount(row_of) if len(row_of) else np.zeros(0, np.int64)
    return Packing(
        width,
        np.concatenate((whole, begins)),
        np.concatenate((np.full(len(whole), width, np.int64), lengths)),
        np.concatenate(([0], np.cumsum(np.concatenate((np.ones(len(whole), np.int64), counts))))),
    )


def best_fit(lengths: Places, width: int) -> Places:
    """The row of each piece: longest first, each into the row with the least room that is enough.

    lengths: from 1 to ``width``. Rows are numbered from 0. Pieces of one length are placed together, so
    the work grows with the number of lengths, not of pieces.
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    rows = 0
    open_rows: list[list[Places]] = [[] for _ in range(width + 1)]  # by the room that is left

    def close(which: Places, room: int) -> None:
        if room and len(which):
            open_rows[room].append(which)

    counts = np.bincount(lengths, minlength=width + 1)
    ends = np.cumsum(counts[::-1])[::-1]  # in ``order``, where pieces of each length end
    for length in np.flatnonzero(counts)[::-1].tolist():
        pieces = order[ends[length] - counts[length] : ends[length]]
        room = length
        while len(pieces) and room <= width:
            if not open_rows[room]:
                room += 1
                continue
            stack = open_rows[room].pop()
            taken = stack[: len(pieces)]
            close(stack[len(taken) :], room)
            row_of[pieces[: len(taken)]] = taken
            pieces = pieces[len(taken) :]
            close(taken, room - length)
            room = max(length, room - length)  # what is left there may be the best fit for the next
        if len(pieces):
            each = width // length
            fresh = rows + np.arange(len(pieces)) // each
            row_of[pieces] = fresh
            count = int(fresh[-1]) - rows + 1
            last = len(pieces) - (count - 1) * each  # pieces in the last of the new rows
            close(rows + np.arange(count - 1), width - each * length)
            close(np.array([rows + count - 1]), width - last * length)
            rows += count
    return row_of


def _cut_to_fill(
    begins: Places, lengths: Places, row_of: Places, width: int
) -> tuple[Places, Places, Places]:
    """Rows that are not nearly full are laid end to end and cut at every ``width``.

    A cut costs the second part its context, padding costs all of its computing.
    """
    filled = np.bincount(row_of, weights=lengths)
    keep = filled[row_of] >= (1 - WASTE / 2) * width
    _, kept_rows = np.unique(row_of[keep], return_inverse=True)
    offset = int(kept_rows.max()) + 1 if len(kept_rows) else 0
    loose_begins, loose_lengths = begins[~keep], lengths[~keep]
    ends = np.cumsum(loose_lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Every place where a piece begins or a row does is where a part begins.
    cuts = np.union1d(ends - loose_lengths, np.arange(0, total, width))
    piece = np.searchsorted(ends, cuts, "right")
    part_lengths = np.diff(np.append(cuts, total))
    part_begins = loose_begins[piece] + cuts - (ends - loose_lengths)[piece]
    return (
        np.concatenate((begins[keep], part_begins)),
        np.concatenate((lengths[keep], part_lengths)),
        np.concatenate((kept_rows.astype(np.int64), offset + cuts // width)),
    )


def batch(
    stream: Stream, packing: Packing, rows: list[int]
) -> tuple[Tokens, Tokens, Tokens | None, Tokens | None]:
    """Inputs, targets, positions and segments [B, width] of the numbered rows.

    Positions restart with every piece, segments number a row's pieces, padding is a segment of its own
    whose targets are `IGNORED`. Both are None where every row is one piece: plain causal attention.
    """
    shape = (len(rows), packing.width)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, segments = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
    plain = True
    for place, row in enumerate(rows):
        first, last = int(packing.offsets[row]), int(packing.offsets[row + 1])
        at = 0
        for number, piece in enumerate(range(first, last)):
            begin, length = int(packing.begins[piece]), int(packing.lengths[piece])
            run = stream[begin : begin + length + 1]
            tokens[place, at : at + length], targets[place, at : at + length] = run[:-1], run[1:]
            positions[place, at : at + length] = np.arange(length)
            segments[place, at : at + length] = number
            at += length
        segments[place, at:] = last - first
        positions[place, at:] = np.arange(packing.width - at)
        # Padding at the end of a single piece is never seen by it, and its own results are not used.
        plain = plain and last - first == 1
    if plain:
        return tokens, targets, None, None
    return tokens, targets, positions, cast(Tokens, segments)
