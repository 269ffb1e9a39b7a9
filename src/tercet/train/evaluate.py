"""Evaluate a network during training: bits per byte of held-out text, and minimal pairs.

Both are sums of `token_losses`. The body of the network computes in the model's own type (bfloat16 where
it trains in bfloat16), the head and the log-softmax in float32, and sums in float64.
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

BATCH_TOKENS = 4096  # tokens in one forward pass: enough for full speed, and few enough for a laptop
LOGITS = 1 << 21  # logits in one chunk: 8 MB, which fit a processor's cache
TOKENS_PER_SOURCE = 32_768  # determines the bits per byte of one source to about 1%

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
    """Return the loss of each token in nats: for row r, ``-log p(rows[r][j] | rows[r][:j])``.

    The first scored token of row r is j = ``begins[r]``.

    Rows are batched by length and padded on the right, which causal attention never sees, so no row
    depends on its neighbours. The loss is computed in float32, whatever the type of the body.

    Args:
        model: The network; its mode and type are restored afterwards.
        rows: Token ids; each row has its own length, at least 2.
        begins: The index of the first scored token of each row, 1 to its length - 1.
        dtype: Type in which the body of the network computes; None: the model's own type.
        batch_tokens: Tokens in one forward pass; a longer row gets a pass of its own.

    Returns:
        For each row float32 [len(row) - begin].

    Raises:
        ValueError: A row has no scored token, or none before it.
    """
    first = np.broadcast_to(np.asarray(begins, dtype=np.int64), len(rows))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(rows) and not ((first >= 1) & (first < lengths)).all():
        raise ValueError("each row must have an unscored first token and at least one scored token")
    results: list[Losses] = [np.zeros(0, dtype=np.float32)] * len(rows)
    training, compute_dtype = model.training, model.compute_dtype
    model.eval()
    model.compute_dtype = compute_dtype if dtype is None else dtype
    try:
        # Not inference_mode: the model caches tables that it makes here, and training uses them next.
        with torch.no_grad(), uncompiled(model):
            for batch in _batches(lengths, batch_tokens):
                losses = _batch_losses(model, [rows[r] for r in batch], first[batch])
                ends = np.cumsum(lengths[batch] - first[batch])
                for r, piece in zip(batch, np.split(losses, ends[:-1]), strict=True):
                    results[r] = piece
    finally:
        model.compute_dtype = compute_dtype
        model.train(training)
    return results


def _batches(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Return batches of row indices, the longest rows first, so that a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


def _batch_losses(model: Transformer, rows: Sequence[Ids], first: NDArray[np.int64]) -> Losses:
    """Return the scored losses of all rows, concatenated; the first of ``rows`` is the longest."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths[0]) - 1
    ids = np.zeros((len(rows), width + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    column = np.arange(width)
    scored = torch.from_numpy((column >= first[:, None] - 1) & (column < lengths[:, None] - 1))
    tokens = torch.from_numpy(ids).to(model.device)
    hidden = _hidden(model, tokens[:, :-1], lengths)[scored.to(model.device)]
    targets = tokens[:, 1:][scored.to(model.device)]
    chunk_rows = max(1, LOGITS // model.config.vocab_size)
    chunks = [
        _losses(model, hidden[start : start + chunk_rows], targets[start : start + chunk_rows])
        for start in range(0, len(targets), chunk_rows)
    ]
    losses: Losses = torch.cat(chunks).cpu().numpy()
    return losses


def _hidden(model: Transformer, tokens: Tensor, lengths: NDArray[np.int64]) -> Tensor:
    if model.rope is None or not model.rope.by_length:
        return model.hidden(tokens)
    # Frequencies that depend on the sequence length must not see the padding, so it is a separate segment.
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    padding = positions >= torch.from_numpy(lengths - 1).to(tokens.device)[:, None]
    return model.hidden(tokens, positions.expand_as(padding), padding.long())


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
    """Return the loss and bits per byte of held-out documents, overall and per source.

    Documents are independent: each begins after an end-of-text token and attends to no other document. A
    document longer than ``context`` is cut into windows of ``context`` predictions without overlap (a window
    begins with the token before its first prediction). With a ``stride`` the windows overlap: each predicts
    ``stride`` further tokens and sees at least ``context - stride`` tokens before them, which costs
    context / stride times as much and gives fewer bits.

    Bits per byte is the sum of the losses of text tokens, in bits, divided by the UTF-8 bytes of these
    tokens, so that tokenizers can be compared; special tokens represent no text and are in neither sum.
    ``loss`` is the mean over all predicted tokens, including each document's end.

    Of a source with more than ``tokens_per_source`` tokens, a fixed sample of windows from all its documents
    is measured. The overall values weight each source by its held-out tokens, so that they describe all
    held-out text and not the sample.

    With ``model.compute_dtype`` bfloat16 the body runs in bfloat16, head and losses in float32;
    ``dtype=torch.float32`` runs everything in float32, for the published number.

    Args:
        model: The network.
        stream: Token ids; begins with an end-of-text token, and each document ends with one.
        starts: [n] or [n + 1] the start of each document: document i is ``stream[starts[i] - 1 :
            starts[i + 1]]``, with the end-of-text token before it and its own.
        source_of: [n] the index of each document's source.
        source_names: Names of the sources, by index.
        byte_counts: [V] UTF-8 bytes of each token id, 0 for special tokens.
        context: Largest number of predictions in a window.
        tokens_per_source: Approximate limit on the measured tokens of each source; None: no limit.
        stride: Predictions in a window, 1 to ``context``; None: ``context``.
        dtype: Type in which the body computes; None: ``model.compute_dtype``.

    Returns:
        ``loss`` (nats per token), ``bits_per_byte``, the measured ``tokens`` and ``bytes``, and ``sources``:
        the same four values by name, for each source that has documents.

    Raises:
        UserError: No text is held out.
        ValueError: The stride is not between 1 and the context.
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
    windows_of: dict[int, NDArray[np.int64]] = {}
    for source in np.unique(sources[lengths > 0]).tolist():
        own = sources == source
        windows_of[source] = _windows(ends[:-1][own], lengths[own], context, step, tokens_per_source)
    if not windows_of:
        raise UserError("no text is held out; the corpus is too small")
    windows = np.concatenate(list(windows_of.values()))
    rows = [np.asarray(stream[begin:end], dtype=np.int64) for begin, _, end in windows]
    losses = token_losses(model, rows, windows[:, 1] - windows[:, 0], dtype=dtype)
    sums = np.array([_sums(row, loss, bytes_of) for row, loss in zip(rows, losses, strict=True)])
    report: dict[str, Any] = {}
    weighted = np.zeros(4)
    at = 0
    for source, own_windows in windows_of.items():
        total = sums[at : at + len(own_windows)].sum(0)
        at += len(own_windows)
        report[source_names[source]] = _report(total, total)
        weighted += total * (lengths[sources == source].sum() / total[1])
    return {**_report(weighted, sums.sum(0)), "sources": report}


def _windows(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], context: int, step: int, limit: int | None
) -> NDArray[np.int64]:
    """Return a sample of at most ``limit`` tokens: windows [m, 3] (first seen, first predicted, end)."""
    counts = -(-lengths // step)
    document = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    predicted = starts[document] + index * step
    end = np.minimum(predicted + step, (starts + lengths)[document])
    seen = np.maximum(starts[document], predicted - (context - step)) - 1
    windows = np.stack((seen, predicted, end), axis=1)
    if limit is None or lengths.sum() <= limit:
        return windows
    order = np.random.default_rng(0).permutation(len(windows))
    within = np.cumsum((end - predicted)[order]) <= limit
    within[0] = True  # measure a source at least once, even where a window exceeds the limit
    return windows[np.sort(order[within])]


def _sums(row: Ids, losses: Losses, byte_counts: NDArray[np.int64]) -> tuple[float, int, float, int]:
    """Return for one window: nats, tokens, nats of text tokens, bytes of text tokens."""
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
    """Return how often the grammatical sentence of a minimal pair is more likely, overall and by group.

    As in Warstadt et al. 2020 (arXiv:1912.00582), the total log-probabilities of both sentences are compared;
    the first token is predicted from the token that begins a text (BOS, else end of text). A tie counts as
    wrong. The common prefix of both sentences adds the same to both sums, so it is not scored.

    Args:
        model: The network.
        tokenizer: Its tokenizer.
        pairs: Minimal pairs; see `tercet.data.minimal_pairs.read_pairs`.
        dtype: Type in which the body of the network computes; None: ``model.compute_dtype``.

    Returns:
        ``accuracy`` over all pairs, ``pairs`` (their number), and ``groups``: the same two values by group.

    Raises:
        UserError: There are no pairs, a sentence is longer than the model's context, or the tokenizer has
            no token that begins a text.
    """
    if not pairs:
        raise UserError("there are no minimal pairs to compare")
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    ids = dict(zip(texts, _sentences(tokenizer, texts), strict=True))
    for text, tokens in ids.items():
        if len(tokens) - 1 > model.config.max_positions:
            raise UserError(
                f"the sentence {text[:60]!r} has {len(tokens) - 1} tokens; the model takes at most "
                f"{model.config.max_positions}"
            )
    both = [(ids[pair.good], ids[pair.bad]) for pair in pairs]
    prefixes = [_common_prefix(good, bad) for good, bad in both]
    # A sentence that is a prefix of the other one has no token to score.
    scored = [
        (sentence, prefix)
        for sentences, prefix in zip(both, prefixes, strict=True)
        for sentence in sentences
        if len(sentence) > prefix
    ]
    losses = iter(
        token_losses(
            model, [sentence for sentence, _ in scored], [prefix for _, prefix in scored], dtype=dtype
        )
    )
    correct: dict[str, list[bool]] = {}
    for pair, sentences, prefix in zip(pairs, both, prefixes, strict=True):
        good, bad = (
            float(next(losses).sum(dtype="f8")) if len(sentence) > prefix else 0.0 for sentence in sentences
        )
        correct.setdefault(pair.group, []).append(good < bad)
    count = sum(map(len, correct.values()))
    return {
        "accuracy": sum(map(sum, correct.values())) / count,
        "pairs": count,
        "groups": {
            group: {"accuracy": sum(rows) / len(rows), "pairs": len(rows)} for group, rows in correct.items()
        },
    }


def _sentences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Encode each text after the tokens that begin one: the encoder's prefix, else BOS, else end of text."""
    probe, offsets = tokenizer.encode_with_offsets("a")
    prefix = probe[: next((index for index, span in enumerate(offsets) if span != (0, 0)), 0)]
    if not prefix:
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is None:
            raise UserError(
                "the tokenizer has neither a BOS nor an EOS token, one of which must begin a sentence"
            )
        prefix = [begin]
    return [
        np.array([*prefix, *tokens], dtype=np.int64)
        for tokens in tokenizer.encode_batch(texts, special=False)
    ]


def _common_prefix(first: Ids, second: Ids) -> int:
    """Return the length of the common prefix, which includes at least the token that begins a text."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
