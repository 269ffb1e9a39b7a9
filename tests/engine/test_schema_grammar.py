"""JSON Schemas as grammars: random schemas, walked along random allowed bytes; every output ends and is valid."""

from __future__ import annotations

import json
import random
from decimal import Decimal, InvalidOperation
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from tercet.engine.grammar import Grammar, GrammarError

BYTES = LLTokenizer("byte")
END = BYTES.eos_token
LONGEST = 1500


def valid(schema: dict[str, Any], text: str) -> bool:
    """The verdict of a validator that has nothing to do with grammars."""
    try:
        value = json.loads(text, parse_float=Decimal)
    except InvalidOperation:  # 1E999999999999999999, which the grammar of a number without bounds allows
        return False
    return bool(jsonschema_rs.Draft202012Validator(schema, validate_formats=True).is_valid(value))


def allows(grammar: Grammar, text: str) -> bool:
    matcher = grammar.compile(BYTES)
    tokens = BYTES.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def walk(start: LLMatcher, chance: random.Random) -> str:
    """A random output; it prefers bytes that close what is open, so that outputs end."""
    matcher, output = start.deep_copy(), bytearray()
    while not matcher.is_stopped():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        assert not matcher.is_error(), (output, matcher.get_error()[:200])
        assert allowed, f"nothing can follow {bytes(output)!r}"
        closing = [byte for byte in allowed if byte == END or chr(byte) in '"]}']
        byte = chance.choice(closing if closing and chance.random() < 0.4 + len(output) / 300 else allowed)
        if byte == END:
            break
        assert matcher.consume_token(byte)
        output.append(byte)
        assert len(output) < LONGEST, f"no end: {bytes(output[:80])!r}"
    return output.decode()


def check_walks(schema: dict[str, Any], walks: int = 4, seed: int = 0) -> list[str]:
    grammar = Grammar.json_schema(schema)
    matcher, chance, texts = grammar.compile(BYTES), random.Random(seed), []
    for _ in range(walks):
        text = walk(matcher, chance)
        verdict = valid(schema, text)
        assert (grammar.violation(text) == "") == verdict, text
        assert verdict or grammar.unheld or "E" in text.upper(), f"{text} is not valid"
        texts.append(text)
    return texts


# Random schemas

NAMES = st.sampled_from(["a", "b", "ab", "x-1", "grade"])
BOUNDS = st.one_of(st.integers(-20, 20), st.sampled_from([0.1, 0.25, -0.5, 1.5, 99.99, 1e-6]))
PATTERNS = ["^a$", "^(a|b)$", "^x-", "^[ab]{1,2}$", "^grade$", "^[xyz]b$"]


def refers_to_itself(schema: Any) -> bool:
    """Whether a validator, too, would never come to an end with it."""
    if not isinstance(schema, dict):
        return False
    return "$ref" in schema or any(
        refers_to_itself(part) for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ())
    )


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def typed(
    kind: str | list[str], fields: st.SearchStrategy[dict[str, Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    return fields.map(lambda values: {"type": kind, **values})


COUNT = st.integers(0, 3)
NUMBERS = optional(
    minimum=BOUNDS, maximum=BOUNDS, exclusiveMinimum=BOUNDS, exclusiveMaximum=BOUNDS,
    multipleOf=st.sampled_from([1, 2, 3, 0.5, 0.25, 0.1, 10, 0.15]),
)  # fmt: skip
SCALARS = st.one_of(
    typed("number", NUMBERS),
    typed("integer", NUMBERS),
    typed(["integer", "null"], NUMBERS),
    typed(
        "string",
        optional(minLength=COUNT, maxLength=COUNT, pattern=st.sampled_from(["^[a-c]*$", "^b", '^[^"]*$'])),
    ),
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"const": "a"}, {"type": "string", "format": "color-name"}]
    ),
    st.lists(st.sampled_from(["a", "b", 1, 2.5, None, True, [1], {"a": 1}]), min_size=1, max_size=4).map(
        lambda values: {"enum": [json.loads(text) for text in dict.fromkeys(map(json.dumps, values))]}
    ),
)


def composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    further = st.one_of(st.booleans(), inner)
    objects = optional(
        properties=st.dictionaries(NAMES, inner, max_size=3),
        required=st.lists(NAMES, max_size=2, unique=True),
        additionalProperties=further,
        patternProperties=st.dictionaries(st.sampled_from(PATTERNS), inner, max_size=2),
        propertyNames=st.sampled_from([{"enum": ["a", "b"]}, {"maxLength": 3}, {"pattern": "^[a-z-]+$"}]),
        minProperties=COUNT,
        maxProperties=COUNT,
    )
    arrays = optional(
        items=further, prefixItems=st.lists(inner, min_size=1, max_size=2),
        minItems=COUNT, maxItems=COUNT, uniqueItems=st.booleans(),
    )  # fmt: skip
    return st.one_of(
        typed("object", objects),
        typed("array", arrays),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"oneOf": parts}),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
        st.just({"$ref": "#/$defs/shared"}),
    )


SCHEMAS = st.recursive(SCALARS, composed, max_leaves=6)


@settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip
@given(st.tuples(SCHEMAS, SCHEMAS), st.integers(0, 3))
def test_every_walk_ends_and_is_valid(schemas: tuple[dict[str, Any], dict[str, Any]], seed: int) -> None:
    schema, shared = schemas
    assume(not refers_to_itself(shared))
    whole = {**schema, "$defs": {"shared": shared}}
    try:
        Grammar.json_schema(whole).check()
    except GrammarError:
        assume(False)
    check_walks(whole, walks=2, seed=seed)


# Objects


def test_a_pattern_of_names_that_are_used_up_is_no_dead_end() -> None:
    mark = {"type": "integer"}
    schema = {
        "type": "object",
        "properties": {"mark": mark},
        "required": ["mark"],
        "patternProperties": {"^mark$": mark},
        "additionalProperties": False,
    }
    for text in check_walks(schema, 8):
        assert json.loads(text).keys() == {"mark"}
    assert not allows(Grammar.json_schema(schema), '{"mark": 1, "mark": 2}')


def test_a_key_of_a_pattern_comes_once() -> None:
    flag = {"type": "boolean"}
    grammar = Grammar.json_schema(
        {
            "type": "object",
            "patternProperties": {"^(on|off)$": flag},
            "additionalProperties": False,
            "minProperties": 2,
        }
    )
    assert allows(grammar, '{"on": true, "off": false}')
    assert not allows(grammar, '{"on": true, "on": false}')
    assert not allows(grammar, '{"on": true}')


def test_counted_properties_keep_their_order() -> None:
    number = {"type": "integer"}
    schema = {
        "type": "object",
        "properties": dict.fromkeys("abcd", number),
        "required": ["b"],
        "minProperties": 2,
        "maxProperties": 3,
        "additionalProperties": False,
    }
    grammar = Grammar.json_schema(schema)
    for names in ("ab", "bc", "abd", "bcd"):
        assert allows(grammar, json.dumps(dict.fromkeys(names, 1)))
    for names in ("b", "ac", "abcd", "ba"):
        assert not allows(grammar, json.dumps(dict.fromkeys(names, 1)))
    check_walks(schema, 8)


def test_names_of_properties_have_their_form() -> None:
    listed = Grammar.json_schema(
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "integer"}}
    )
    assert allows(listed, '{"y": 1}') and allows(listed, '{"x": 1, "y": 2}')
    assert not allows(listed, '{"z": 1}') and not allows(listed, '{"x": 1, "x": 2}')
    formed = Grammar.json_schema({"type": "object", "propertyNames": {"pattern": "^[a-z]+$", "maxLength": 3}})
    assert allows(formed, '{"abc": 1, "z": [null]}')
    assert not allows(formed, '{"abcd": 1}') and not allows(formed, '{"A": 1}')


def test_further_properties_have_other_names_than_the_known_ones() -> None:
    grammar = Grammar.json_schema(
        {
            "type": "object",
            "properties": {"id": {"type": "integer", "minimum": 1}, 'a"b\n': {"type": "null"}},
            "additionalProperties": {"type": "string"},
        }
    )
    assert allows(grammar, '{"id": 1, "idx": "x", "i": "", "": "", "a\\"b": "z"}')
    assert not allows(grammar, '{"id": 1, "id": "x"}') and not allows(grammar, '{"a\\"b\\n": "x"}')


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ('^[^"]*$', ["a", "it's", "a\\\\b", "é"], ['"', 'a"b']),
        (r"^[^\\]+$", ["a", 'say "a"'], ["\\", "a\\n"]),
        (r"^[^\x21-\x7e]$", ["é", " "], ['"', "\\", "a"]),
        (r"^\[[^\]\"]\]$", ["[a]"], ['["]', "[]]"]),
        (r"^[^,]+$", ['a"b', "tab\t", "\\"], [","]),
    ],
)
def test_a_class_that_excludes_the_quote_or_the_backslash(
    pattern: str, right: list[str], wrong: list[str]
) -> None:
    text = Grammar.json_schema({"type": "string", "pattern": pattern})
    names = Grammar.json_schema(
        {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    )
    for value in right:
        assert allows(text, json.dumps(value, ensure_ascii=False))
        assert allows(names, json.dumps({value: 1}, ensure_ascii=False))
    for value in wrong:
        assert not allows(text, json.dumps(value, ensure_ascii=False))
        assert not allows(names, json.dumps({value: 1}, ensure_ascii=False))


# Lists without repetition


def test_a_list_of_different_listed_items_in_any_order() -> None:
    schema = {
        "type": "array",
        "items": {"enum": ["a", "b", 3, None]},
        "uniqueItems": True,
        "minItems": 1,
        "maxItems": 3,
    }
    grammar = Grammar.json_schema(schema)
    assert grammar.unheld == frozenset()
    assert allows(grammar, '["b", "a"]') and allows(grammar, '[null, 3, "a"]')
    assert not allows(grammar, '["a", "a"]') and not allows(grammar, "[]")
    assert not allows(grammar, '["a", "b", 3, null]')
    check_walks(schema, 8)


def test_what_the_grammar_cannot_hold_is_named_and_validated() -> None:
    cases: list[tuple[dict[str, Any], str, str, str]] = [
        (
            {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            "uniqueItems",
            "[1, 2]",
            "[1, 1]",
        ),
        ({"type": "string", "format": "json-pointer"}, "format", '"/a"', '"a"'),
        ({"type": "string", "pattern": "^(?!x)[a-z]+$"}, "pattern", '"ab"', '"xa"'),
        ({"type": "array", "contains": {"const": 1}}, "contains", "[0, 1]", "[0]"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", '{"b": 1}', '{"a": 1}'),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "oneOf", "2", "4"),
        ({"type": "object", "minProperties": 2}, "minProperties", '{"a": 1, "b": 1}', '{"a": 1, "a": 2}'),
    ]
    for schema, keyword, right, wrong in cases:
        grammar = Grammar.json_schema(schema)
        assert grammar.unheld == {keyword}
        assert allows(grammar, right) and grammar.violation(right) == ""
        assert allows(grammar, wrong) and grammar.violation(wrong)


def test_unknown_formats_are_annotations() -> None:
    grammar = Grammar.json_schema({"type": "string", "format": "color-name"})
    assert allows(grammar, '"anything"') and grammar.violation('"anything"') == ""


@pytest.mark.parametrize("keyword", ["not", "if", "dependentSchemas", "unevaluatedProperties"])
def test_forms_that_no_rule_can_express_are_refused(keyword: str) -> None:
    with pytest.raises(GrammarError, match=f'JSON Schema keyword "{keyword}" is not supported'):
        Grammar.json_schema({"type": "object", "minProperties": 1, keyword: {}}).check()


# Recursion


def test_a_schema_without_a_last_value_is_refused() -> None:
    chain = {"type": "object", "properties": {"next": {"$ref": "#/$defs/link"}}, "required": ["next"]}
    with pytest.raises(GrammarError, match="no answer can end"):
        Grammar.json_schema({"$ref": "#/$defs/link", "$defs": {"link": chain}}).check()
    either = {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}], "$defs": {"link": chain}}
    assert set(check_walks(either)) == {"null"}


def test_a_tree_of_bounded_numbers() -> None:
    node = {
        "type": "object",
        "properties": {
            "weight": {"type": "number", "exclusiveMinimum": 0},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["weight", "parts"],
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    check_walks(schema)
    assert allows(Grammar.json_schema(schema), '{"weight": 0.50, "parts": [{"weight": 7, "parts": []}]}')


def test_a_large_number_is_not_rounded() -> None:
    grammar = Grammar.json_schema({"enum": [2**53 + 1, 1]})
    assert allows(grammar, str(2**53 + 1))
    assert not allows(grammar, str(2**53))


def test_malformed_schemas_are_refused() -> None:
    for wrong in (
        {"required": 3},
        {"properties": 3},
        {"enum": 5},
        {"minimum": "x"},
        {"minProperties": -1},
        {"items": 3},
    ):
        with pytest.raises(GrammarError):
            Grammar.json_schema({"type": "object", "maxProperties": 2, **wrong}).check()
