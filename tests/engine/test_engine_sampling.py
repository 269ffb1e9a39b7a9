from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tercet.engine.request import Sampling
from tercet.engine.sampling import History, distribution, largest, log_softmax, next_token, penalize
from tercet.errors import UserError

VOCAB = 50


def logits(seed: int, spread: float = 3, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def transformers_distribution(raw: np.ndarray, sampling: Sampling) -> np.ndarray:
    warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(raw.astype(np.float64))[None])
    probabilities: np.ndarray = scores.softmax(-1)[0].numpy()
    return probabilities


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([3.0, 0.1]),  # a clear choice; nearly equal tokens
    st.floats(0.05, 3),
    st.sampled_from([0, 1, 2, 10, 49, 50, 90]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_temperature_and_truncation_are_those_of_transformers(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    raw = logits(seed, spread)
    np.testing.assert_allclose(
        distribution(raw, sampling).dense(VOCAB), transformers_distribution(raw, sampling), atol=1e-9
    )


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 300}, {"top_k": 40, "top_p": 0.7}]
)
@pytest.mark.parametrize("size", [255, 256, 3000, 5000])
def test_blocks_give_the_same_result_for_large_vocabularies(settings: dict[str, float], size: int) -> None:
    sampling = Sampling(temperature=0.9, **settings)  # type: ignore[arg-type]
    for seed in range(3):
        raw = logits(seed, size=size)
        if "top_p" not in settings:  # no rule says which of two equal tokens is cut there
            raw = np.round(raw, 1)
        expected = transformers_distribution(raw, sampling)
        result = distribution(raw, sampling)
        np.testing.assert_allclose(result.dense(size), expected, atol=1e-9)
        # A number u draws the token at which the running sum passes u.
        for u in (0.0, 0.2, 0.5, 0.9, 1 - 2**-53):
            token = result.draw(SimpleNamespace(random=lambda u=u: u))  # type: ignore[arg-type]
            reach = expected.cumsum()
            assert expected[token] > 0
            assert reach[token] - expected[token] - 1e-9 <= u * reach[-1] <= reach[token] + 1e-9
    assert largest(raw.astype(np.float64), 9).tolist() == np.argsort(-raw, kind="stable")[:9].tolist()


def test_equal_logits_at_the_kth_place_all_stay_as_in_transformers() -> None:
    raw = np.array([1, 3, 1, 1, 0], dtype=np.float32)
    sampling = Sampling(temperature=1, top_k=2)
    np.testing.assert_allclose(distribution(raw, sampling).dense(5), transformers_distribution(raw, sampling))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output(penalty: float) -> None:
    raw = logits(3)
    history = History([1, 2, 2, 7])
    history.output.update([7, 9, 9])
    scores = raw.astype(np.float64)
    penalize(scores, Sampling(repetition_penalty=penalty), history)
    seen = torch.tensor([[1, 2, 2, 7, 7, 9, 9]])
    reference = RepetitionPenaltyLogitsProcessor(penalty)(
        seen, torch.from_numpy(raw.astype(np.float64))[None]
    )
    np.testing.assert_allclose(scores, reference[0].numpy())


def test_presence_and_frequency_follow_the_formula_over_the_output_only() -> None:
    raw = logits(4)
    history = History([1, 2])
    history.output.update([7, 9, 9])
    scores = raw.astype(np.float64)
    penalize(scores, Sampling(presence_penalty=0.5, frequency_penalty=0.25), history)
    expected = raw.astype(np.float64)
    expected[7] -= 0.5 + 1 * 0.25
    expected[9] -= 0.5 + 2 * 0.25
    np.testing.assert_allclose(scores, expected)


def test_a_bias_is_that_of_transformers_and_comes_before_the_penalties() -> None:
    raw, bias = logits(5), {3: 2.5, 7: -100.0, 49: 1.0}
    scores = raw.astype(np.float64)
    penalize(scores, Sampling(logit_bias=bias), History([]))
    add = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = add(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(raw.astype(np.float64))[None])[0]
    np.testing.assert_allclose(scores, expected.numpy())
    both = raw.astype(np.float64)
    penalize(both, Sampling(logit_bias=bias, repetition_penalty=2.0), History([3]))
    assert both[3] == pytest.approx(scores[3] / 2 if scores[3] > 0 else scores[3] * 2)


def test_a_bias_of_100_is_always_taken_and_one_of_minus_100_never() -> None:
    raw, rng = logits(6), np.random.default_rng(0)
    best = int(raw.argmax())
    for temperature in (0.0, 1.0):
        always = Sampling(temperature=temperature, logit_bias={11: 100})
        never = Sampling(temperature=temperature, logit_bias={best: -100})
        assert {next_token(raw, always, History([]), rng).token for _ in range(50)} == {11}
        assert best not in {next_token(raw, never, History([]), rng).token for _ in range(50)}


def test_a_bias_on_an_unknown_token_is_refused() -> None:
    with pytest.raises(UserError, match="the model knows 0 to 49"):
        next_token(logits(1), Sampling(logit_bias={VOCAB: 1.0}), History([]), np.random.default_rng(0))
    for wrong in ({-1: 1.0}, {"3": 1.0}, {3: 101}, {3: float("nan")}, {3: True}):
        with pytest.raises(UserError, match="logit_bias"):
            Sampling(logit_bias=wrong)  # type: ignore[arg-type]


def test_greedy_takes_the_best_after_penalties_and_reports_the_unmodified_probability() -> None:
    raw = np.array([2.0, 1.9, 0.0], dtype=np.float32)
    history = History([])
    history.output[0] = 1
    sampling = Sampling(temperature=0, frequency_penalty=1.0, logprobs=2)
    choice = next_token(raw, sampling, history, np.random.default_rng(0))
    expected = torch.log_softmax(torch.from_numpy(raw), -1)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(expected[1]), abs=1e-6)
    assert [token for token, _ in choice.top] == [0, 1]
    assert [value for _, value in choice.top] == pytest.approx(expected[:2].tolist(), abs=1e-6)


def test_draws_follow_the_distribution_and_repeat_with_their_seed() -> None:
    raw, sampling = logits(5), Sampling(temperature=1.5, top_k=8)

    def draws(seed: int, count: int) -> list[int]:
        rng, history = np.random.default_rng(seed), History([])
        return [next_token(raw, sampling, history, rng).token for _ in range(count)]

    share = np.bincount(draws(0, 20_000), minlength=VOCAB) / 20_000
    # Five standard errors of a share: sqrt(1/4 / 20000) = 0.0035.
    np.testing.assert_allclose(share, transformers_distribution(raw, sampling), atol=0.018)
    assert draws(1, 20) == draws(1, 20) != draws(2, 20)


def test_only_allowed_tokens_come_and_log_probabilities_stay_the_models_own() -> None:
    raw, rng = logits(9), np.random.default_rng(0)
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[[4, 8]] = True
    expected = torch.log_softmax(torch.from_numpy(raw), -1)
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, logprobs=1)
        choice = next_token(raw, sampling, History([]), rng, allowed)
        assert choice.token in (4, 8)
        assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=1e-6)
        assert choice.top[0][0] == int(raw.argmax())
    assert next_token(raw, Sampling(temperature=0), History([]), rng, allowed).token == (
        4 if raw[4] > raw[8] else 8
    )
    with pytest.raises(UserError, match="no token may come next"):
        next_token(raw, sampling, History([]), rng, np.zeros(VOCAB, dtype=np.bool_))


def test_a_temperature_next_to_zero_is_greedy_not_an_overflow() -> None:
    raw = logits(6)
    sampling = Sampling(temperature=1e-300)
    assert next_token(raw, sampling, History([]), np.random.default_rng(0)).token == int(raw.argmax())


def test_log_softmax_and_largest_agree_with_torch() -> None:
    raw = logits(7).astype(np.float64)
    np.testing.assert_allclose(log_softmax(raw), torch.log_softmax(torch.from_numpy(raw), -1).numpy())
    assert largest(raw, 5).tolist() == torch.topk(torch.from_numpy(raw), 5).indices.tolist()
    assert largest(np.array([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [1, 3, 0], "lower index first"
    assert largest(raw, 0).tolist() == [] and len(largest(raw, 1000)) == VOCAB


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(broken: float) -> None:
    raw = logits(8)
    raw[3] = broken
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(temperature=0, presence_penalty=1)):
        with pytest.raises(UserError, match="not finite"):
            next_token(raw, sampling, History([]), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", -1),
        ("seed", True),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop", (3,)),
    ],
)
def test_the_error_of_a_value_out_of_range_is_one_line_with_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^`{field}` (is|holds) [^\n]+$"):
        Sampling(**{field: value})


def test_a_single_stop_string_needs_no_tuple() -> None:
    assert Sampling(stop="\n").stop == ("\n",)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [1e-320, 1e-308, 1e308])
def test_the_most_extreme_penalty_leaves_a_token_to_sample(penalty: float) -> None:
    logits = np.array([3.0, 2.0, -1.0, 0.5], np.float32)
    sampling = Sampling(repetition_penalty=penalty)
    result = next_token(logits, sampling, History([0, 1]), np.random.default_rng(0))
    assert result.token in ((0, 1) if penalty < 1 else (2, 3))
