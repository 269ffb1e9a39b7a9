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
from tercet.train.compilation import uncompiled

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
        # Not inference_mode: the model keeps tables it makes here, and training uses them next.
        with torch.no_grad(), uncompiled(model):
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
    ends = np.asarray(starts, dtype=np.int64)
    if len(ends) == len(sources):
        ends = np.append(ends, len(stream))
    lengths = np.diff(ends)  # predictions in each document
    bytes_of = np.asarray(byte_counts, dtype=np.int64)
    drawn: dict[int, NDArray[np.int64]] = {}
    for source in np.unique(sources[lengths > 0]).tolist():
        mine = sources == source
        drawn[source] = _draw(ends[:-1][mine], lengths[mine], context, step, tokens_per_source)
    if not drawn:
        raise UserError("no text is held out; the corpus is too small")
    windows = np.concatenate(list(drawn.values()))
    rows = [np.asarray(stream[begin:end], dtype=np.int64) for begin, _, end in windows]
    losses = token_losses(model, rows, windows[:, 1] - windows[:, 0], dtype=dtype)
    sums = np.array([_sums(row, loss, bytes_of) for row, loss in zip(rows, losses, strict=True)])
    report: dict[str, Any] = {}
    weighted = np.zeros(4)
    at = 0
    for source, own in drawn.items():
        total = sums[at : at + len(own)].sum(0)
        at += len(own)
        report[source_names[source]] = _report(total, total)
        weighted += total * (lengths[sources == source].sum() / total[1])
    return {**_report(weighted, sums.sum(0)), "sources": report}


def _draw(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], context: int, step: int, most: int | None
) -> NDArray[np.int64]:
    """Windows [m, 3] of documents: first token seen, first token predicted, end; of ``most`` tokens in all."""
    counts = -(-lengths // step)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    predicted = starts[document] + number * step
    end = np.minimum(predicted + step, (starts + lengths)[document])
    seen = np.maximum(starts[document], predicted - (context - step)) - 1
    windows = np.stack((seen, predicted, end), axis=1)
    if most is None or lengths.sum() <= most:
        return windows
    order = np.random.default_rng(0).permutation(len(windows))
    within = np.cumsum((end - predicted)[order]) <= most
    within[0] = True  # a window longer than what is wanted of the source is better than nothing of it
    return windows[np.sort(order[within])]


def _sums(row: Ids, losses: Losses, byte_counts: NDArray[np.int64]) -> tuple[float, int, float, int]:
    """Of one window: nats, tokens, nats of text tokens, bytes of these."""
    sizes = byte_counts[row[len(row) - len(losses) :]]
    nats = losses.astype(np.float64)
    return float(nats.sum()), len(nats), float(nats[sizes > 0].sum()), int(sizes.sum())


def _report(sums: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    nats, tokens, text_nats, size = sums.tolist()
    return {
        "loss": nats / tokens,
        "bits_per_byte": text_nats / math.log(2) / max(size, 1.0),
        "tokens": int(measured[1]),
        "bytes": int(measured[3]),
    }


# Minimal pairs


def pair_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """How often the grammatical sentence of a minimal pair is the likelier one, in all and by group.

    Warstadt et al. 2020 (arXiv:1912.00582): the sums of the log-probabilities of all tokens of each
    sentence are compared, the first token being predicted from the token that begins a text (BOS, else
    end of text). A tie counts as wrong. What both sentences begin with adds the same to both sums, so
    it is read but not scored.

    Args:
        pairs: see `tercet.data.minimal_pairs.read_pairs`.
        dtype: what the body of the network computes in; None: ``model.compute_dtype``.

    Returns:
        ``accuracy`` over all pairs, ``pairs`` (how many), and ``groups``: the same two by group.

    Raises:
        UserError: there are no pairs, a sentence is longer than the model's context, or the
            tokenizer has no token to begin a text with.
    """
    if not pairs:
        raise UserError("there are no minimal pairs to compare")
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    ids = dict(zip(texts, _sentences(tokenizer, texts), strict=True))
    for text, one in ids.items():
        if len(one) - 1 > model.config.max_positions:
            raise UserError(
                f"the sentence {text[:60]!r} has {len(one) - 1} tokens; the model takes at most "
                f"{model.config.max_positions}"
            )
    both = [(ids[pair.good], ids[pair.bad]) for pair in pairs]
    shared = [_shared(good, bad) for good, bad in both]
    # A sentence that the other one only goes on from has nothing left to score, and costs nothing.
    asked = [(one, same) for pair, same in zip(both, shared, strict=True) for one in pair if len(one) > same]
    losses = iter(token_losses(model, [one for one, _ in asked], [same for _, same in asked], dtype=dtype))
    right: dict[str, list[bool]] = {}
    for pair, sentences, same in zip(pairs, both, shared, strict=True):
        good, bad = (float(next(losses).sum(dtype="f8")) if len(one) > same else 0.0 for one in sentences)
        right.setdefault(pair.group, []).append(good < bad)
    count = sum(map(len, right.values()))
    return {
        "accuracy": sum(map(sum, right.values())) / count,
        "pairs": count,
        "groups": {
            group: {"accuracy": sum(rows) / len(rows), "pairs": len(rows)} for group, rows in right.items()
        },
    }


def _sentences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Each text after the tokens that begin one: what encoding puts in front, else BOS, else end of text."""
    probe, offsets = tokenizer.encode_with_offsets("a")
    front = probe[: next((place for place, span in enumerate(offsets) if span != (0, 0)), 0)]
    if not front:
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is None:
            raise UserError("the tokenizer has neither a BOS nor an EOS token to begin a sentence with")
        front = [begin]
    return [
        np.array([*front, *tokens], dtype=np.int64) for tokens in tokenizer.encode_batch(texts, special=False)
    ]


def _shared(one: Ids, other: Ids) -> int:
    """How many tokens both begin with, the token that begins a text at least."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
