"""Offsets for label scores, against the formulas of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from tercet.evaluate.calibration import (
    CALIBRATIONS,
    batch_offsets,
    contextual_offsets,
    frequency_offsets,
    label_frequencies,
    normalised,
)

SCORES = np.random.default_rng(3).normal([0, -4, -9], 2, (200, 3))


def test_scores_are_normalised_over_the_labels() -> None:
    assert np.allclose(normalised(SCORES), log_softmax(SCORES, axis=1))


def test_contextual_calibration_makes_inputs_without_content_undecided() -> None:
    free = np.array([[-1.0, -5.0, -9.0]])
    corrected = softmax(free + contextual_offsets(free), axis=1)
    assert np.allclose(corrected, 1 / 3)


def test_batch_calibration_divides_by_the_mean_probability() -> None:
    expected = softmax(SCORES, axis=1) / softmax(SCORES, axis=1).mean(axis=0)
    chosen = (SCORES + batch_offsets(SCORES)).argmax(axis=1)
    assert (chosen == expected.argmax(axis=1)).all()


def test_a_constant_preference_for_a_label_changes_no_calibrated_answer() -> None:
    """A label's length or frequent tokens add about the same to each of its scores."""
    biased = SCORES + np.array([7.0, 0.0, -3.0])
    frequencies = np.array([0.5, 0.3, 0.2])
    first = (SCORES + frequency_offsets(SCORES, frequencies)).argmax(axis=1)
    second = (biased + frequency_offsets(biased, frequencies)).argmax(axis=1)
    assert (first == second).all()


@pytest.mark.parametrize("frequencies", [[0.34, 0.33, 0.33], [0.9, 0.08, 0.02]])
def test_the_mean_probability_of_a_label_becomes_its_frequency(frequencies: list[float]) -> None:
    offsets = frequency_offsets(SCORES, np.array(frequencies))
    assert np.allclose(softmax(SCORES + offsets, axis=1).mean(axis=0), frequencies, atol=1e-3)
    assert offsets.sum() == pytest.approx(0, abs=1e-6)


def test_a_label_that_is_never_likely_has_finite_offsets() -> None:
    scores = np.array([[0.0, -800.0], [-1.0, -900.0]])
    for offsets in (batch_offsets(scores), frequency_offsets(scores, np.array([1.0, 0.0]))):
        assert np.isfinite(offsets).all()


def test_frequencies_count_each_label_once_more() -> None:
    assert label_frequencies(["a", "a", "b"], ["a", "b", "c"]).tolist() == [3 / 6, 2 / 6, 1 / 6]
    assert CALIBRATIONS[0] == "none"
