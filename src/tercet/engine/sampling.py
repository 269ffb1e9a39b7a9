"""Sampling: from one row of logits to one token.

Every function works on a single row, so the tokens of a request never depend on the rest of its batch,
and tokens are drawn from weights in float64. The order of the steps, and their behaviour at the edges
(ties stay, the best token always stays), are those of transformers' logits processors.
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

# The number of values that are summed or compared at a time, because a running sum or a selection over
# all V would dominate the time. Measured at V = 50,000 and 150,000: no difference between 128 and 1,024.
BLOCK = 256

LARGEST = 1e300  # the largest magnitude of a score that a penalty has changed


class Choice(NamedTuple):
    """A chosen token, with its log-probability, the likeliest tokens and the entropy where they are requested."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    entropy: float | None = None


class Distribution(NamedTuple):
    """The tokens that may come next, and their weights: probabilities times a common factor above 0.

    Attributes:
        tokens: ascending ids; None for the whole vocabulary.
        weights: of these tokens, in the same order.
    """

    tokens: NDArray[np.int64] | None
    weights: Floats

    def dense(self, size: int) -> Floats:
        """Return the probabilities [size] of all tokens."""
        probabilities = np.zeros(size)
        probabilities[slice(None) if self.tokens is None else self.tokens] = self.weights
        probabilities /= self.weights.sum()
        return probabilities

    def draw(self, rng: np.random.Generator) -> int:
        """Draw a token with one number of ``rng``."""
        place = _draw(self.weights, rng)
        return place if self.tokens is None else int(self.tokens[place])


class History:
    """The tokens of one request so far: the set of the prompt, and the counts of the output."""

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
    """Choose a token from ``logits`` [V]: the likeliest at temperature 0, otherwise drawn with ``rng``.

    Log-probabilities are those of the unmodified distribution, the log-softmax of ``logits``.

    Args:
        logits: after the last token of the request.
        sampling: the settings of the request.
        history: its tokens so far.
        rng: its generator.
        allowed: [V], the tokens that may come next; None for all.
        drafted: a token that was drawn from another distribution, and that distribution; the token is
            accepted or replaced by `take_draft`.

    Raises:
        UserError: the logits contain NaN or infinity (the weights are broken, or overflow), or no
            token is allowed.
    """
    best = int(logits.argmax())  # the first NaN if there is any
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
    """Return ``token`` as the choice after ``logits`` [V], with the requested log-probabilities."""
    if sampling.logprobs is None:
        return Choice(token, None, [])
    logprobs = log_softmax(logits.astype(np.float64))
    top = [(int(index), float(logprobs[index])) for index in largest(logprobs, sampling.logprobs)]
    return Choice(token, float(logprobs[token]), top, entropy(logprobs))


def entropy(logprobs: Floats) -> float:
    """Return the entropy, in nats, of a distribution's log-probabilities [V], none of them infinite."""
    return -float(np.dot(np.exp(logprobs), logprobs))


def penalize(scores: Floats, sampling: Sampling, history: History) -> None:
    """Add the bias to ``scores`` [V] and apply the three penalties, in place.

    The repetition penalty applies to tokens of prompt and output: positive logits are divided by it,
    negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858). The presence and frequency penalties
    apply to tokens of the output, by OpenAI's formula
    ``logit - count * frequency - (count > 0) * presence``.
    """
    for token, bias in (sampling.logit_bias or {}).items():
        if token >= len(scores):
            raise UserError(f"`logit_bias` has token {token}; the model knows 0 to {len(scores) - 1}")
        scores[token] += bias
    if sampling.repetition_penalty != 1:
        seen = np.fromiter(history.prompt | history.output.keys(), dtype=np.int64)
        old = scores[seen]
        with np.errstate(over="ignore"):
            new = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
        scores[seen] = new.clip(-LARGEST, LARGEST)  # two infinite scores would have no difference
    if history.output and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = np.fromiter(history.output.keys(), dtype=np.int64)
        counts = np.fromiter(history.output.values(), dtype=np.float64)
        scores[seen] -= counts * sampling.frequency_penalty + sampling.presence_penalty


def distribution(scores: Scores, sampling: Sampling) -> Distribution:
    """Return the distribution of ``scores`` [V] after temperature (above 0), top-k, top-p and min-p."""
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
        # A token stays if the tokens before it do not reach top_p. Tokens below this floor weigh at most
        # 1 - top_p together, so none of them can stay, and few tokens are left to be sorted.
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
    """Return a token distributed as ``target``, which is often ``token``, drawn from ``draft``.

    Rejection sampling: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1. The token is accepted with
    probability min(1, p / q); otherwise another one is drawn from the positive part of p - q.
    """
    p = _at(target, np.array([token])) / target.weights.sum()
    q = _at(draft, np.array([token])) / draft.weights.sum()
    if rng.random() * q[0] < p[0]:
        return token
    tokens = np.arange(len(target.weights)) if target.tokens is None else target.tokens
    excess = target.weights / target.weights.sum() - _at(draft, tokens) / draft.weights.sum()
    excess = np.maximum(excess, 0)
    if not excess.any():  # the distributions are equal up to rounding
        return target.draw(rng)
    return Distribution(target.tokens, excess).draw(rng)


def log_softmax(logits: Floats) -> Floats:
    """Return the natural log-probabilities [V]."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` largest values, largest first, lower index first among equals."""
    count = min(count, len(values))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    # All values as large as the last of them, so that ties are decided by index.
    candidates = np.flatnonzero(values >= _kth_largest(values, count))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _kth_largest(values: Scores, k: int) -> float:
    """Return the k-th largest of ``values``, k from 1 to their number."""
    blocks = len(values) // BLOCK
    if k <= blocks:
        # k blocks have a value as large as the k-th largest of their maxima: few values remain to select from.
        maxima = values[: blocks * BLOCK].reshape(BLOCK, blocks).max(axis=0)
        values = values[values >= np.partition(maxima, -k)[-k]]
    return float(np.partition(values, -k)[-k])


def _draw(weights: Floats, rng: np.random.Generator) -> int:
    """Draw an index in proportion to its weight: first a block, then a place in it."""
    edges = np.arange(0, len(weights), BLOCK)
    reach = np.add.reduceat(weights, edges).cumsum()
    # Scaled to the sum, so that rounding can't place the draw beyond the last block.
    aim = rng.random() * reach[-1]
    block = int(np.searchsorted(reach, aim, side="right"))
    inside = weights[edges[block] : edges[block] + BLOCK]
    aim -= reach[block - 1] if block else 0.0
    place = int(np.searchsorted(inside.cumsum(), aim, side="right"))
    # The block's own running sum may end a rounding error below its share of the total.
    return int(edges[block]) + min(place, int(np.flatnonzero(inside)[-1]))


def _among(
    tokens: NDArray[np.int64] | None, weights: Floats, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats]:
    """Return the tokens and weights at ``places`` of a distribution."""
    return (places if tokens is None else tokens[places]), weights[places]


def _at(distribution: Distribution, tokens: NDArray[np.int64]) -> Floats:
    """Return the weights of ``tokens``; 0 for tokens that the distribution does not contain."""
    if distribution.tokens is None:
        return distribution.weights[tokens]
    places = np.searchsorted(distribution.tokens, tokens).clip(max=len(distribution.tokens) - 1)
    return np.where(distribution.tokens[places] == tokens, distribution.weights[places], 0.0)
