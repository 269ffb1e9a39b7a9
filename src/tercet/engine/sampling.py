"""From one row of logits to one token.

Everything is in float64 on one row, so that a request's tokens never depend on its neighbours.
The order of the steps, and what each does at its edges (ties stay, the best token always stays),
are those of transformers' logits processors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tercet.engine.request import Sampling
from tercet.errors import UserError

Floats = NDArray[np.float64]


class Choice(NamedTuple):
    """A chosen token; its log-probability and the likeliest tokens, where the request wants them."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class History:
    """Which tokens one request has seen: those of the prompt, and how often each was generated."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.prompt = set(prompt)
        self.output: Counter[int] = Counter()


def next_token(
    logits: NDArray[np.float32], sampling: Sampling, history: History, rng: np.random.Generator
) -> Choice:
    """Choose from ``logits`` [V]. Greedy at temperature 0, otherwise one draw from ``rng``.

    Log-probabilities are of the unmodified distribution: log-softmax of ``logits`` as they are.

    Raises:
        UserError: the logits hold NaN or infinity (weights that are broken or overflow).
    """
    scores = logits.astype(np.float64)
    if not np.isfinite(scores.max()):
        raise UserError("the model's logits are not finite; its weights are broken or overflow in this dtype")
    raw = scores.copy() if sampling.logprobs is not None else scores
    penalize(scores, sampling, history)
    if sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        probabilities = distribution(scores, sampling)
        reach = probabilities.cumsum()
        # Scaled to the sum, so that rounding can't leave the draw beyond the last token.
        token = int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))
    if sampling.logprobs is None:
        return Choice(token, None, [])
    logprobs = log_softmax(raw)
    top = [(int(one), float(logprobs[one])) for one in largest(logprobs, sampling.logprobs)]
    return Choice(token, float(logprobs[token]), top)


def penalize(scores: Floats, sampling: Sampling, history: History) -> None:
    """Apply the three penalties to ``scores`` [V] in place.

    Repetition: tokens of prompt and output; positive logits are divided, negative ones multiplied
    (Keskar et al. 2019, arXiv:1909.05858). Presence and frequency: tokens of the output only, by
    OpenAI's formula ``logit - count * frequency - (count > 0) * presence``.
    """
    if sampling.repetition_penalty != 1:
        seen = np.fromiter(history.prompt | history.output.keys(), dtype=np.int64)
        old = scores[seen]
        scores[seen] = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
    if history.output and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = np.fromiter(history.output.keys(), dtype=np.int64)
        counts = np.fromiter(history.output.values(), dtype=np.float64)
        scores[seen] -= counts * sampling.frequency_penalty + sampling.presence_penalty


def distribution(scores: Floats, sampling: Sampling) -> Floats:
    """Probabilities [V] after temperature (above 0), top-k, top-p and min-p; tokens cut off have 0."""
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < kth, -np.inf, scores)
    probabilities: Floats = np.exp(scores)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        # A token stays while those before it do not reach top_p yet. Tokens below this floor weigh at
        # most 1 - top_p together, so none of them can stay, and few are left to be sorted.
        probabilities[probabilities < (1 - sampling.top_p) / len(probabilities)] = 0
        order = np.flatnonzero(probabilities)
        order = order[np.argsort(-probabilities[order], kind="stable")]
        ranked = probabilities[order]
        probabilities[order[1:][ranked.cumsum()[:-1] >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    return probabilities


def log_softmax(logits: Floats) -> Floats:
    """Natural log-probabilities [V]."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, best first, lower index first among equals."""
    count = min(count, len(values))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    # Everything as large as the last place, so that equals there are decided by index.
    candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
