"""Suggestions for mistyped names, and the check of seeds."""

from __future__ import annotations

import pytest

from tercet.errors import UserError, check_seed, nearest


def test_the_most_similar_names_come_first() -> None:
    assert nearest("temprature", ["top_p", "temperature"]) == ["temperature"]
    assert nearest("run", ["runs", "ruin", "train"], limit=2) == ["runs", "ruin"]


def test_a_name_without_its_suffix_is_similar_enough() -> None:
    assert nearest("smollm2", ["smollm2-135m-instruct"]) == ["smollm2-135m-instruct"]


@pytest.mark.parametrize(("name", "other"), [("seed", "schema"), ("logprobs", "prompt"), ("", "name")])
def test_unrelated_names_are_not_suggested(name: str, other: str) -> None:
    assert nearest(name, [other]) == []


def test_a_very_long_name_is_compared_quickly() -> None:
    assert nearest("a" * 100_000, ["b" * 100_000]) == []


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_some_generator_refuses_is_named_as_the_setting(seed: int) -> None:
    with pytest.raises(UserError, match=f"`seed` is {seed}; it must be from 0 to 4294967295"):
        check_seed(seed)


def test_the_largest_seed_is_accepted() -> None:
    check_seed(2**32 - 1)
