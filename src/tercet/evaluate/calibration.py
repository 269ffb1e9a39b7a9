"""Correct label scores for how much a model prefers each label whatever the input is.

A model gives some labels a high probability after every input: short ones, frequent words, those that the prompt
showed last. Each correction adds one number, the offset, to a label's log-probability. It cancels the length of a
label and the tokens that it shares with others too, since both weigh in every input alike: with the log-probability
of the whole label, its end included, and an offset, labels of any length are compared fairly (the domain
conditional of Holtzman et al. 2021, arXiv:2104.08315, is such an offset).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Calibration = Literal["none", "contextual", "batch", "frequencies"]
CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)

# Inputs without content (Zhao et al. 2021, arXiv:2102.09690, section 5).
CONTENT_FREE = ("N/A", "[MASK]", "")
_SMALLEST = 1e-12  # a label's mean probability; its logarithm stays finite
_ROUNDS, _PACE = 200, 0.7  # of fitting offsets to the frequencies; converges to 4 digits within about 50


def normalised(scores: Floats) -> Floats:
    """Return log-probabilities over the labels alone, [N, L], from the log-probabilities of texts, [N, L]."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def contextual_offsets(scores: Floats) -> Floats:
    """Return the offsets, [L], that make all labels equally likely after inputs without content.

    This is contextual calibration (Zhao et al. 2021, arXiv:2102.09690).

    Args:
        scores: of the labels after the prompts of `CONTENT_FREE`, [N, L].
    """
    return _against(np.exp(normalised(scores)).mean(axis=0))


def batch_offsets(scores: Floats) -> Floats:
    """Return the offsets, [L], that divide by a label's mean probability over a batch of inputs.

    This is batch calibration (Zhou et al. 2023, arXiv:2309.17249).

    Args:
        scores: of the labels after real inputs, [N, L].
    """
    return _against(np.exp(normalised(scores)).mean(axis=0))


def frequency_offsets(scores: Floats, frequencies: Floats) -> Floats:
    """Return the offsets, [L], with which the mean probability of each label over a batch is its frequency.

    Batch calibration supposes equally frequent labels; where nine messages of ten are of one label, that costs
    more than no correction. The offsets are found by iteration, as in the adjustment of outputs to new class
    frequencies of Saerens et al. 2002.

    Args:
        scores: of the labels after real inputs, [N, L].
        frequencies: of the labels among the training examples, [L]; their sum is 1.
    """
    start = normalised(scores)
    target = np.log(np.maximum(frequencies, 1 / (10 * len(scores))))
    offsets = np.zeros(scores.shape[1])
    for _ in range(_ROUNDS):
        mean = np.exp(normalised(start + offsets)).mean(axis=0)
        step = target - np.log(np.maximum(mean, _SMALLEST))
        offsets += _PACE * (step - step.mean())
    return offsets


def label_frequencies(targets: Sequence[str], labels: Sequence[str]) -> Floats:
    """Return the share of each label among targets, [L], with one more of each so that none is 0."""
    counts = np.array([sum(target == label for target in targets) for label in labels], np.float64) + 1
    result: Floats = counts / counts.sum()
    return result


def _against(mean: Floats) -> Floats:
    offsets: Floats = -np.log(np.maximum(mean, _SMALLEST))
    offsets -= offsets.mean()
    return offsets
