"""From one row of logits to one token.

Everything is on one row, so that a request's tokens never depend on its neighbours, and what is drawn
from is in float64. The order of the steps, and what each does at its edges (ties stay, the best token
always stays), are those of transformers' logits processors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tercet.engine.request import Sampling
from tercet.errors import UserError

Floats = NDArray[np.float64]
Scores = NDArray[np.float32] | NDArray[np.float64]

# Values summed or compared at a time where a running sum, or a selection, over all V would take
# most of the time. Chosen by measurement at V = 50,000 and 150,000; flat between 128 and 1,024.
BLOCK = 256

LARGEST = 1e300  # of a score that a penalty has changed


class Choice(NamedTuple):
    """A chosen token; its log-probability, the likeliest tokens and the entropy, where the request wants them."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    entropy: float | None = None


class Distribution(NamedTuple):
    """Which tokens may come, and their weights: probabilities times some factor above 0.

    tokens: ascending ids; None: all of the vocabulary.
    """

    tokens: NDArray[np.int64] | None
    weights: Floats

    def dense(self, size: int) -> Floats:
        """Probabilities [size] of all tokens."""
        probabilities = np.zeros(size)
        probabilities[slice(None) if self.tokens is None else self.tokens] = self.weights
        probabilities /= self.weights.sum()
        return probabilities

    def draw(self, rng: np.random.Generator) -> int:
        """One token, by one number of ``rng``."""
        place = _draw(self.weights, rng)
        return place if self.tokens is None else int(self.tokens[place])


class History:
    """Which tokens one request has seen: those of the prompt, and how often each was generated."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.prompt = set(prompt)
        self.output: Counter[int] = Counter()


def next_token(
    logits: NDArray[np.float32],
    sampling: Sampling,
    history: History,
    rng: np.random.Generator,
    allowed: NDArray[np.bool_] | None = None,
    drafted: tuple[int, Distribution] | None = None,
) -> Choice:
    """Choose from ``logits`` [V]. Greedy at temperature 0, otherwise drawn with ``rng``.

    Log-probabilities are of the unmodified distribution: log-softmax of ``logits`` as they are.

    allowed: [V], which tokens may come; None: all.
    drafted: a token drawn from another distribution, which is taken if it may be (see `take_draft`).

    Raises:
        UserError: the logits hold NaN or infinity (weights that are broken or overflow), or no
            token is allowed.
    """
    best = int(logits.argmax())  # the first NaN where there is one
    if not math.isfinite(logits[best]):
        raise UserError("the model's logits are not finite; its weights are broken or overflow in this dtype")
    scores: Scores = logits
    if sampling.penalizes:
        scores = logits.astype(np.float64)
        penalize(scores, sampling, history)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
        if scores.max() == -np.inf:
            raise UserError("no token may come next under the request's constraint")
    if sampling.temperature == 0:
        token = best if scores is logits else int(scores.argmax())
    elif drafted is None:
        token = distribution(scores, sampling).draw(rng)
    else:
        token = take_draft(distribution(scores, sampling), *drafted, rng)
    return report(logits, token, sampling)


def report(logits: NDArray[np.float32], token: int, sampling: Sampling) -> Choice:
    """``token`` as the choice after ``logits`` [V], with the log-probabilities that are wanted."""
    if sampling.logprobs is None:
        return Choice(token, None, [])
    logprobs = log_softmax(logits.astype(np.float64))
    top = [(int(one), float(logprobs[one])) for one in largest(logprobs, sampling.logprobs)]
    return Choice(token, float(logprobs[token]), top, entropy(logprobs))


def entropy(logprobs: Floats) -> float:
    """The surprise to be expected, in nats, of a distribution's log-probabilities [V], none of them infinite."""
    return -float(np.dot(np.exp(logprobs), logprobs))


def penalize(scores: Floats, sampling: Sampling, history: History) -> None:
    """Add the bias to ``scores`` [V] and apply the three penalties, in place.

    Repetition: tokens of prompt and output; positive logits are divided, negative ones multiplied
    (Keskar et al. 2019, arXiv:1909.05858). Presence and frequency: tokens of the output only, by
    OpenAI's formula ``logit - count * frequency - (count > 0) * presence``.
    """
    for token, bias in (sampling.logit_bias or {}).items():
        if token >= len(scores):
            raise UserError(f"logit_bias has token {token}; the model knows 0 to {len(scores) - 1}")
        scores[token] += bias
    if sampling.repetition_penalty != 1:
        seen = np.fromiter(history.prompt | history.output.keys(), dtype=np.int64)
        old = scores[seen]
        with np.errstate(over="ignore"):
            new = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
        scores[seen] = new.clip(-LARGEST, LARGEST)  # two infinite ones would have no distance
    if history.output and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = np.fromiter(history.output.keys(), dtype=np.int64)
        counts = np.fromiter(history.output.values(), dtype=np.float64)
        scores[seen] -= counts * sampling.frequency_penalty + sampling.presence_penalty


def distribution(scores: Scores, sampling: Sampling) -> Distribution:
    """``scores`` [V] after temperature (above 0), top-k, top-p and min-p."""
    tokens: NDArray[np.int64] | None = None
    if 0 < sampling.top_k < len(scores):
        tokens = np.flatnonzero(scores >= _kth_largest(scores, sampling.top_k))
        scores = scores[tokens]
    weights: Floats = scores.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore"):
        weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1:
        # A token stays while those before it do not reach top_p yet. Tokens below this floor weigh at
        # most 1 - top_p together, so none of them can stay, and few are left to be sorted.
        total = weights.sum()
        order = np.flatnonzero(weights >= (1 - sampling.top_p) * total / len(weights))
        order = order[np.argsort(-weights[order], kind="stable")]
        # The best token stays whatever top_p is, even where rounding says that it does not.
        stay = np.count_nonzero(weights[order].cumsum()[:-1] < sampling.top_p * total) + 1
        tokens, weights = _among(tokens, weights, np.sort(order[:stay]))
    if sampling.min_p > 0:
        tokens, weights = _among(tokens, weights, np.flatnonzero(weights >= sampling.min_p * weights.max()))
    return Distribution(tokens, weights)


def take_draft(target: Distribution, token: int, draft: Distribution, rng: np.random.Generator) -> int:
    """A token distributed as ``target``, and often ``token``, which was drawn from ``draft``.

    Rejection sampling: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1. The token is kept with
    probability min(1, p / q); otherwise one is drawn from what ``target`` has more than ``draft``.
    """
    p = _at(target, np.array([token])) / target.weights.sum()
    q = _at(draft, np.array([token])) / draft.weights.sum()
    if rng.random() * q[0] < p[0]:
        return token
    tokens = np.arange(len(target.weights)) if target.tokens is None else target.tokens
    more = target.weights / target.weights.sum() - _at(draft, tokens) / draft.weights.sum()
    more = np.maximum(more, 0)
    if not more.any():  # equal but for rounding
        return target.draw(rng)
    return Distribution(target.tokens, more).draw(rng)


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
    candidates = np.flatnonzero(values >= _kth_largest(values, count))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _kth_largest(values: Scores, k: int) -> float:
    """The k-th largest of ``values``, k from 1 to their number."""
    blocks = len(values) // BLOCK
    if k <= blocks:
        # k blocks have a value as large as the k-th largest of their maxima: few values need selection.
        maxima = values[: blocks * BLOCK].reshape(BLOCK, blocks).max(axis=0)
        values = values[values >= np.partition(maxima, -k)[-k]]
    return float(np.partition(values, -k)[-k])


def _draw(weights: Floats, rng: np.random.Generator) -> int:
    """An index, each by its share of the sum: first a block, then a place in it."""
    edges = np.arange(0, len(weights), BLOCK)
    reach = np.add.reduceat(weights, edges).cumsum()
    # Scaled to the sum, so that rounding can't leave the draw beyond the last block.
    aim = rng.random() * reach[-1]
    block = int(np.searchsorted(reach, aim, side="right"))
    inside = weights[edges[block] : edges[block] + BLOCK]
    aim -= reach[block - 1] if block else 0.0
    place = int(np.searchsorted(inside.cumsum(), aim, side="right"))
    # The block's own running sum may end a rounding error before its share of the whole.
    return int(edges[block]) + min(place, int(np.flatnonzero(inside)[-1]))


def _among(
    tokens: NDArray[np.int64] | None, weights: Floats, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats]:
    return (places if tokens is None else tokens[places]), weights[places]


def _at(distribution: Distribution, tokens: NDArray[np.int64]) -> Floats:
    """The weights of ``tokens``; 0 for those that can't come."""
    if distribution.tokens is None:
        return distribution.weights[tokens]
    places = np.searchsorted(distribution.tokens, tokens).clip(max=len(distribution.tokens) - 1)
    return np.where(distribution.tokens[places] == tokens, distribution.weights[places], 0.0)
