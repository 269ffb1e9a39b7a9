"""Texts of bounded numbers: every decimal of up to three digits against a validator of JSON Schema."""

from __future__ import annotations

import itertools
import json
import random
import re
from decimal import Decimal
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer

from tercet.engine.grammar import Grammar
from tercet.engine.number_bounds import Bounds, UnsatisfiableError, number_texts

BYTES = LLTokenizer("byte")
BOUNDS: list[dict[str, Any]] = [
    {"exclusiveMinimum": 0},
    {"minimum": 0},
    {"exclusiveMaximum": 0},
    {"maximum": -3},
    {"minimum": 1e-9},
    {"maximum": 1e300},
    {"exclusiveMinimum": -1e300, "maximum": 0.5},
    {"exclusiveMinimum": 0, "maximum": 0.1},
    {"exclusiveMinimum": 1, "maximum": 1.5},
    {"minimum": 1, "exclusiveMaximum": 1.5},
    {"exclusiveMinimum": 100, "maximum": 100.5},
    {"minimum": -0.5, "exclusiveMaximum": 0},
    {"exclusiveMinimum": -0.5, "exclusiveMaximum": 0.5},
    {"minimum": 0.25, "maximum": 0.75},
    {"exclusiveMinimum": 0.25, "exclusiveMaximum": 0.75},
    {"minimum": -12.5, "maximum": 37.25},
    {"minimum": -3, "maximum": -3},
    {"minimum": 0.05, "maximum": 12},
    {"minimum": 9.9, "exclusiveMaximum": 10},
    {"minimum": 0.001, "maximum": 0.002},
    {"minimum": 0, "exclusiveMinimum": 0, "maximum": 5, "exclusiveMaximum": 7},
    {"multipleOf": 0.25},
    {"multipleOf": 0.5, "minimum": 0},
    {"multipleOf": 0.01, "minimum": 0, "maximum": 1},
    {"multipleOf": 0.05, "minimum": 0.1},
    {"multipleOf": 0.2, "exclusiveMaximum": 0.6},
    {"multipleOf": 2.5, "exclusiveMinimum": 0, "maximum": 10},
    {"multipleOf": 0.125},
    {"multipleOf": 1},
    {"multipleOf": 5},
    {"multipleOf": 10, "minimum": -50},
    {"multipleOf": 4, "maximum": 100},
]
DRAFT_4: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"minimum": 0, "exclusiveMinimum": True}, {"exclusiveMinimum": 0}),
    ({"minimum": 0, "maximum": 1, "exclusiveMaximum": True}, {"minimum": 0, "exclusiveMaximum": 1}),
    ({"minimum": 2, "exclusiveMinimum": False}, {"minimum": 2}),
]
OTHER_STEPS: list[dict[str, Any]] = [  # with another factor than 2 and 5
    {"multipleOf": 3},
    {"multipleOf": 7, "minimum": -20, "exclusiveMaximum": 21},
    {"multipleOf": 0.3, "exclusiveMinimum": -0.6, "maximum": 1.2},
    {"multipleOf": 1.5, "minimum": -3, "maximum": 9},
]


def decimals(digits: int) -> list[str]:
    """Every JSON decimal of up to so many digits: signs, zeros at the beginning and at the end."""
    texts = []
    for count in range(1, digits + 1):
        for number in itertools.product("0123456789", repeat=count):
            for point in range(1, count + 1):
                whole, fraction = "".join(number[:point]), "".join(number[point:])
                if whole == "0" or whole[0] != "0":
                    texts += [sign + whole + (f".{fraction}" if fraction else "") for sign in ("", "-")]
    return texts


DECIMALS = decimals(3)


def patterns(bounds: dict[str, Any], whole: bool) -> list[re.Pattern[str]]:
    """The expressions that a text matches all; one that nothing matches where no number is within the bounds."""
    try:
        (texts,) = number_texts(Bounds.of(bounds, whole))
    except UnsatisfiableError:
        return [re.compile("$^")]
    return [re.compile(pattern) for pattern in texts.patterns]


def expected(validator: jsonschema_rs.Draft202012Validator, text: str, whole: bool) -> bool:
    value = Decimal(text)
    if value == 0 and text.startswith("-"):
        return False  # there is no negative zero
    return bool(validator.is_valid(value)) and not (whole and "." in text)


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize(("bounds", "modern"), [*((bounds, bounds) for bounds in BOUNDS), *DRAFT_4])
def test_exactly_the_decimals_within_the_bounds_are_allowed(
    kind: str, bounds: dict[str, Any], modern: dict[str, Any]
) -> None:
    whole = kind == "integer"
    validator = jsonschema_rs.Draft202012Validator({"type": kind, **modern})
    parts = patterns(bounds, whole)
    wrong = [
        text
        for text in DECIMALS
        if all(part.fullmatch(text) for part in parts) != expected(validator, text, whole)
    ]
    assert wrong == []


def allowed(matcher: LLMatcher, text: str) -> bool:
    matcher = matcher.deep_copy()
    tokens = BYTES.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize("bounds", BOUNDS[::3])
def test_the_matcher_agrees_with_the_expressions(bounds: dict[str, Any]) -> None:
    matcher = Grammar.json_schema({"type": "number", **bounds}).compile(BYTES)
    parts = patterns(bounds, False)
    for text in random.Random(0).sample(DECIMALS, 150):
        assert allowed(matcher, text) == all(part.fullmatch(text) for part in parts), text


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("bounds", OTHER_STEPS)
def test_multiples_of_other_steps_are_valid_and_each_has_a_text(kind: str, bounds: dict[str, Any]) -> None:
    schema = {"type": kind, **bounds}
    matcher = Grammar.json_schema(schema).compile(BYTES)
    validator = jsonschema_rs.Draft202012Validator(schema)
    texts = [text for text in DECIMALS if len(text) <= 4]
    written = {Decimal(text) for text in texts if allowed(matcher, text)}
    values = {Decimal(text) for text in texts if expected(validator, text, kind == "integer")}
    assert all(validator.is_valid(value) for value in written)
    assert written == values


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-30},
        {"type": "integer", "minimum": 0},
        {"type": "number", "exclusiveMaximum": 1000},
    ],
)
def test_digits_come_to_an_end_and_the_double_is_within_the_bounds(schema: dict[str, Any]) -> None:
    validator = jsonschema_rs.Draft202012Validator(schema)
    for digit in b"09":
        matcher, text = Grammar.json_schema(schema).compile(BYTES), ""
        for _ in range(80):
            if matcher.is_stopped():
                break
            allowed_next = [byte for byte in b"0123456789." if matcher.deep_copy().consume_token(byte)]
            if not allowed_next:
                break
            byte = digit if digit in allowed_next else max(allowed_next)
            assert matcher.consume_token(byte)
            text += chr(byte)
        assert len(text) < 60
        assert validator.is_valid(json.loads(text)), text


def test_the_bounds_of_int64() -> None:
    low, high = -(2**63), 2**63 - 1
    matcher = Grammar.json_schema({"type": "integer", "minimum": low, "maximum": high}).compile(BYTES)
    for value in (low, high, 0, -1):
        assert allowed(matcher, str(value))
    for value in (low - 1, high + 1, 10**20):
        assert not allowed(matcher, str(value))


def test_bounds_without_a_number_say_so() -> None:
    for bounds, message in (
        ({"minimum": 5, "maximum": 3}, r"minimum \(5\) is greater than maximum \(3\)"),
        ({"exclusiveMinimum": 1, "maximum": 1}, "no number satisfies"),
    ):
        with pytest.raises(UnsatisfiableError, match=message):
            number_texts(Bounds.of(bounds, False))
    with pytest.raises(UnsatisfiableError, match="no whole number satisfies"):
        number_texts(Bounds.of({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, True))
    with pytest.raises(ValueError, match="it must be above 0"):
        Bounds.of({"multipleOf": 0}, False)
