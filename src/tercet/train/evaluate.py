"""How good a network is while it is trained: bits per byte of held-out text, and minimal pairs.

Both are sums of `token_losses`: the body of the network computes in the model's own type (bfloat16
where it trains in that), the head and the logarithm of the softmax in float32, sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tercet.data.minimal_pairs import Pair
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer

BATCH_TOKENS = 4096  # in one pass of the body: large enough for full speed, small enough for a laptop
LOGITS = 1 << 21  # numbers in one piece of logits: 8 MB, which a processor's cache holds
TOKENS_PER_SOURCE = 32_768  # pins the bits per byte of one source to about 1%

Ids = NDArray[np.int64]
Losses = NDArray[np.float32]


def token_losses(
    model: Transformer,
    rows: Sequence[Ids],
    begins: ArrayLike,
    *,
    dtype: torch.dtype | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Losses]:
    """How unlikely each token is, in nats: for row r, ``-log p(rows[r][j] | rows[r][:j])``, j from ``begins[r]``.

    Rows are put into batches by length and padded on the right, where causal attention never looks, so
    no row depends on its neighbours. The loss is computed in float32 whatever the body computes in.

    Args:
        rows: token ids, each row with its own length, at least 2.
        begins: the first token of each row that is scored, 1 to its length - 1.
        dtype: what the body of the network computes in; None: the model's own type.
        batch_tokens: tokens in one pass, or a single row.

    Returns:
        For each row float32 [len(row) - begin].
    """
    first = np.broadcast_to(np.asarray(begins, dtype=np.int64), len(rows))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(rows) and not ((first >= 1) & (first < lengths)).all():
        raise ValueError("a row must begin with a token that is not scored and have one that is")
    found: list[Losses] = [np.zeros(0, dtype=np.float32)] * len(rows)
    training, kept = model.training, model.compute_dtype
    model.eval()
    model.compute_dtype = kept if dtype is None else dtype
    try:
        with torch.inference_mode():
            for batch in _batches(lengths, batch_tokens):
                losses = _batch_losses(model, [rows[r] for r in batch], first[batch])
                ends = np.cumsum(lengths[batch] - first[batch])
                for r, piece in zip(batch, np.split(losses, ends[:-1]), strict=True):
                    found[r] = piece
    finally:
        model.compute_dtype = kept
        model.train(training)
    return found


def _batches(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers, the longest first, so that what does not fit into memory fails at once."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


def _batch_losses(model: Transformer, rows: Sequence[Ids], first: NDArray[np.int64]) -> Losses:
    """The scored losses of all rows, one after the other; ``rows`` has the longest first."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths[0]) - 1
    ids = np.zeros((len(rows), width + 1), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    column = np.arange(width)
    scored = torch.from_numpy((column >= first[:, None] - 1) & (column < lengths[:, None] - 1))
    tokens = torch.from_numpy(ids).to(model.device)
    hidden = _hidden(model, tokens[:, :-1], lengths)[scored.to(model.device)]
    targets = tokens[:, 1:][scored.to(model.device)]
    rows_a_piece = max(1, LOGITS // model.config.vocab_size)
    pieces = [
        _losses(model, hidden[start : start + rows_a_piece], targets[start : start + rows_a_piece])
        for start in range(0, len(targets), rows_a_piece)
    ]
    losses: Losses = torch.cat(pieces).cpu().numpy()
    return losses


def _hidden(model: Transformer, tokens: Tensor, lengths: NDArray[np.int64]) -> Tensor:
    if model.rope is None or not model.rope.by_length:
        return model.hidden(tokens)
    # Frequencies that depend on a sequence's length must not see the padding: it is a segment of its own.
    place = torch.arange(tokens.shape[1], device=tokens.device)
    padding = place >= torch.from_numpy(lengths - 1).to(tokens.device)[:, None]
    return model.hidden(tokens, place.expand_as(padding), padding.long())


def _losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(hidden.float())  # the head takes its input's type: float32
    return torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None])[:, 0]


# Held-out text


def heldout_bits(
    model: Transformer,
    stream: NDArray[np.unsignedinteger],
    starts: NDArray[np.int64],
    source_of: NDArray[np.integer[Any]],
    source_names: Sequence[str],
    byte_counts: ArrayLike,
    context: int,
    *,
    tokens_per_source: int | None = TOKENS_PER_SOURCE,
    stride: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Loss and bits per byte of held-out documents, in all and for each source.

    A document stands by itself: it begins after an end-of-text token and sees nothing of the one
    before. One that is longer than ``context`` is cut into windows of ``context`` predictions (plain
    cuts: a window begins with the token before its first prediction). With a ``stride`` windows
    overlap instead: each predicts ``stride`` tokens more and sees at least ``context - stride`` before
    them, which costs context / stride times as much and gives fewer bits.

    Bits per byte is the sum of the losses of text tokens, in bits, over the UTF-8 bytes of these
    tokens, so that it compares across tokenizers; special tokens stand for no text and are left out
    of both. ``loss`` is the mean over all tokens that are predicted, each document's end among them.

    Where a source has more than ``tokens_per_source`` tokens, windows are drawn from all over its
    documents, always the same ones. "In all" is then weighted by how many tokens each source has
    held out, so that it means all held-out text and not what was drawn of it.

    With ``model.compute_dtype`` bfloat16 the body runs in that, head and losses in float32;
    ``dtype=torch.float32`` runs everything in float32, for the number that is published.

    Args:
        stream: token ids; begins with an end-of-text token, and each document ends with one.
        starts: where each document begins, [n] or [n + 1]: document i is ``stream[starts[i] - 1 :
            starts[i + 1]]`` with the end-of-text before it and its own.
        source_of: number of each document's source, [n].
        source_names: names by that number.
        byte_counts: UTF-8 bytes of each token id, 0 for special ones, [V].
        context: predictions in a window at most.
        tokens_per_source: about so many tokens are measured of each source; None: all.
        stride: predictions in a window, 1 to ``context``; None: ``context``.
        dtype: what the body computes in; None: ``model.compute_dtype``.

    Returns:
        ``loss`` (nats a token), ``bits_per_byte``, ``tokens`` and ``bytes`` that were measured, and
        ``sources``: the same four by name, for each source that has documents.

    Raises:
        UserError: no text is held out.
    """
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise ValueError(f"the stride is {stride}; it must be from 1 to the context, {context}")
    sources = np.asarray(source_of)
    ends = np.append(np.asarray(starts, dtype=np.int64)[: len(sources)], len(stream))
    lengths = np.diff(ends)  # predictions in each document
    bytes_of = np.asarray(byte_counts, dtype=np.int64)
    drawn: list[tuple[int, NDArray[np.int64]]] = []
    for source in np.unique(sources[lengths > 0]).tolist():
        documents = np.flatnonzero((sources == source) & (lengths > 0))
        drawn.append((source, _draw(ends[documents], lengths[documents], context, step, tokens_per_source)))
    if not drawn:
        raise UserError("no text is held out; the corpus is too small")
    windows = np.concatenate([rows for _, rows in drawn])
    rows = [np.asarray(stream[begin:end], dtype=np.int64) for begin, _, end in windows]
    losses = token_losses(model, rows, windows[:, 1] - windows[:, 0], dtype=dtype)
    measured: dict[str, dict[str, float]] = {}
    weights: list[float] = []
    at = 0
    for source, own in drawn:
        here = slice(at, at + len(own))
        at += len(own)
        nats = np.concatenate(losses[here]).astype(np.float64)
        targets = np.concatenate([row[len(row) - len(loss) :] for row, loss in zip(rows[here], losses[here])])
        sums = _Sums.of(nats, bytes_of[targets])
        measured[source_names[source]] = sums.report()
        weights.append(int(lengths[sources == source].sum()) / sums.tokens)
        totals = sums.times(weights[-1]) if len(weights) == 1 else totals + sums.times(weights[-1])
    return {}
