"""Constraints: random outputs under the mask, checked by independent validators (pydantic, re)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tercet.engine.constraint import COMPILED, Constraints, Matcher
from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.json_schema import JSON_LAYOUT
from tercet.engine.text import TokenBytes
from tercet.model.tokenizer import Tokenizer

PADDING = 5  # rows of an embedding that no token has


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=6)]
    age: Annotated[int, Field(ge=0, le=150)]
    tags: Annotated[list[Literal["a", 'b"c', "日本 é"]], Field(max_length=2)]
    home: Annotated[str, Field(pattern="^[a-zé]{1,4}$")] | None = None


class Walker:
    """Writes random outputs that the mask allows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_id is not None
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size + PADDING
        self.constraints = Constraints(tokenizer, self.vocab_size, [self.eos])
        self.bytes_of = TokenBytes(tokenizer)
        special = {tokenizer.id_of(text) for text in tokenizer.special_tokens}
        self.never = [*sorted(special - {self.eos, None}), *range(tokenizer.vocab_size, self.vocab_size)]  # type: ignore[type-var]
        self.random = random.Random(0)

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode()

    def step(self, matcher: Matcher) -> list[int]:
        """The next token, or the forced ones; [] at the end."""
        forced = matcher.forced()
        mask = matcher.mask()
        assert mask.shape == (self.vocab_size,)
        assert not mask[self.never].any()
        if forced:
            assert mask.nonzero()[0].tolist() == forced[:1]
            assert matcher.valid(forced) == len(forced)
            if self.random.random() < 0.7:
                return forced
        if matcher.ended or (mask[self.eos] and self.random.random() < 0.3):
            assert mask[self.eos]
            return []
        allowed = [int(token) for token in mask.nonzero()[0] if token != self.eos]
        # Prefer the end of a string or list, so that outputs end.
        ends = [token for token in allowed if self.bytes_of(token)[:1] in (b'"', b"]", b"}", b",")]
        token = self.random.choice(ends if ends and self.random.random() < 0.3 else allowed)
        assert matcher.valid([token]) == 1
        return [token]

    def __call__(self, grammar: Grammar) -> str:
        matcher, tokens = self.constraints.matcher(grammar), list[int]()
        while step := self.step(matcher):
            for token in step:
                matcher.accept(token)
            tokens += step
            assert len(tokens) < 2000
        matcher.accept(self.eos)
        assert matcher.ended
        return self.text(tokens)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", "metaspace"])
def walker(request: pytest.FixtureRequest) -> Walker:
    return Walker(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def metaspace(sentencepiece: Tokenizer) -> Tokenizer:
    """As in Mistral's newer files: "▁" from a pre-tokenizer, in front of the first word only."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer.from_str(sentencepiece.backend.to_str())
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer.from_backend(backend, eos="</s>", bos="<s>")


def only_letters(constraints_for: str) -> Tokenizer:
    """A vocabulary that has no bytes: only the characters of ``constraints_for``."""
    from tokenizers import decoders, models

    vocabulary = {character: number for number, character in enumerate(["<unk>", *constraints_for])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return Tokenizer.from_backend(backend, eos="</s>")


# Outputs


def test_json_is_valid_under_its_schema(walker: Walker) -> None:
    grammar = Grammar.json_schema(Person.model_json_schema())
    for _ in range(15):
        Person.model_validate_json(walker(grammar))


@pytest.mark.parametrize(
    "form",
    [
        Annotated[list[bool | float | None], Field(min_length=1, max_length=3)],
        tuple[Annotated[str, Field(max_length=4)], bool],
        Literal["</s>", "<s> <unk>", 7, None],
    ],
)
def test_json_of_other_types_is_valid_too(walker: Walker, form: Any) -> None:
    checked = TypeAdapter(form)
    for _ in range(8):
        checked.validate_json(walker(Grammar.json_schema(checked.json_schema())))


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\d{4}",
        r"^(yes|no|maybe), (he|she) (is|was)$",
        r"[A-Z][a-z]{0,6}( [A-Z][a-z]{0,6}){0,2}\.",
        r"é{1,3}日本(🦊|🐈)/\"",
        r" ?x{0,4}",
        r"[^a-c\n]{2,5}",
        r"(?s).{1,6}",
    ],
)
def test_text_matches_its_regular_expression(walker: Walker, pattern: str) -> None:
    for _ in range(15):
        assert re.fullmatch(pattern, walker(Grammar.regex(pattern)))


@pytest.mark.parametrize(
    "choices",
    [["yes", "no"], ["ab", "abc", "ab cd", " ab"], ["日本語", 'Grüße\n"x"\\', "</s>"], [f"{n * 7919}" for n in range(3000)]],
)  # fmt: skip
def test_text_is_one_of_its_choices(walker: Walker, choices: list[str]) -> None:
    texts = {walker(Grammar.choices(choices)) for _ in range(40)}
    assert texts <= set(choices)
    assert len(texts) >= 2


def test_text_is_derived_from_its_grammar(walker: Walker) -> None:
    for _ in range(15):
        text = walker(Grammar.lark('start: "(" start ")" | "x"'))
        assert re.fullmatch(r"(\(*)x(\)*)", text)
        assert text.count("(") == text.count(")")


def test_masks_are_those_of_llguidance_reading_tokenizer_json_itself(byte_level: Tokenizer) -> None:
    walker = Walker(byte_level)
    table = LLTokenizer(byte_level.backend.to_str(), eos_token=walker.eos)
    source = LLMatcher.grammar_from_json_schema(
        Person.model_json_schema(),
        defaults=JSON_LAYOUT,  # type: ignore[arg-type]
    )
    steps = 0
    for _ in range(10):
        matcher, reference = (
            walker.constraints.matcher(Grammar.json_schema(Person.model_json_schema())),
            LLMatcher(table, source),
        )
        while True:
            bits = np.unpackbits(np.frombuffer(reference.compute_bitmask(), np.uint8), bitorder="little")
            assert matcher.mask()[: byte_level.vocab_size].tolist() == bits[: byte_level.vocab_size].tolist()
            assert matcher.forced() == reference.compute_ff_tokens()
            assert matcher.ended == reference.is_stopped()
            step = walker.step(matcher)
            if not step:
                break
            for token in step:
                matcher.accept(token)
                assert reference.consume_token(token)
            steps += 1
    assert steps > 100


def test_a_schema_with_properties_allows_no_others(byte_level: Tokenizer) -> None:
    def begins(text: str, schema: dict[str, Any]) -> bool:
        matcher = Constraints(byte_level, byte_level.vocab_size, []).matcher(Grammar.json_schema(schema))
        tokens = byte_level.encode(text)
        return matcher.valid(tokens) == len(tokens)

    silent = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert begins('{"a": 1}', silent)
    assert not begins('{"a": 1, ', silent)
    assert begins('{"a": 1, "b": 2}', silent | {"additionalProperties": True})
    assert begins('{"a": 1, "b": 2}', {"allOf": [silent, {"required": ["b"]}]})
    assert begins('{"a": 1, "b": 2}', silent | {"required": ["a", "b"]})
    assert not begins('[{"a": 1, ', {"type": "array", "items": silent})
    tagged = {
        "discriminator": {"propertyName": "k"},
        "oneOf": [{"properties": {"k": {"const": k}}, "required": ["k"], "type": "object"} for k in "xy"],
    }
    assert begins('{"k": "y"}', tagged)
    assert not begins('{"k": "y", ', tagged)
    assert not begins('{"a":1', silent)  # one layout


def test_a_schema_inside_of_a_lark_rule_is_as_strict_as_alone(walker: Walker) -> None:
    schema = Grammar.json_schema(Person.model_json_schema())
    grammar = Grammar.lark(f'start: "person: " {schema.in_lark()} "."')
    for _ in range(5):
        text = walker(grammar)
        assert text.startswith("person: ") and text.endswith(".")
        Person.model_validate_json(text.removeprefix("person: ").removesuffix("."))
    with pytest.raises(ValueError, match="a regex can't be a part"):
        Grammar.regex("a").in_lark()


# Forced tokens, ends, speculation


def test_forced_text_is_encoded_as_the_tokenizer_does(walker: Walker) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    matcher = walker.constraints.matcher(Grammar.choices([text]))
    forced = matcher.forced()
    assert matcher.forced() == forced
    assert walker.text(forced) == text
    inside = walker.tokenizer.encode("\n" + text, special=False)  # not at the beginning, where "▁" is put
    assert forced == inside[-len(forced) :]
    for token in forced:
        assert not matcher.ended
        matcher.accept(token)
    assert matcher.ended
    assert matcher.forced() == []
    assert matcher.mask().nonzero()[0].tolist() == [walker.eos]


def test_a_last_token_that_may_be_joined_with_more_is_left_to_the_model(byte_level: Tokenizer) -> None:
    constraints = Constraints(byte_level, byte_level.vocab_size, [])
    the, over = byte_level.encode(" the"), byte_level.encode(" over")
    assert (len(the), len(over)) == (1, 1)
    matcher = constraints.matcher(Grammar.choices([" the", " tabc"]))
    assert matcher.forced() == []
    assert matcher.mask()[the].all()


def test_a_character_of_several_tokens_is_completed(byte_level: Tokenizer) -> None:
    matcher = Constraints(byte_level, byte_level.vocab_size, []).matcher(Grammar.regex("[語誤]"))
    tokens = byte_level.encode("語")
    assert len(tokens) == 3
    for number, token in enumerate(tokens):
        forced = matcher.forced()
        assert forced in ([], tokens[number : number + len(forced)])
        matcher.accept(token)
    assert matcher.ended


def test_every_stop_id_ends_and_none_is_text(byte_level: Tokenizer) -> None:
    a, b = byte_level.encode("a")[0], byte_level.encode("b")[0]
    assert byte_level.eos_id is not None
    constraints = Constraints(byte_level, byte_level.vocab_size, [byte_level.eos_id, b, 10**6])
    matcher = constraints.matcher(Grammar.regex("[ab]{1,2}"))
    assert matcher.mask().nonzero()[0].tolist() == [a]
    matcher.accept(a)
    assert set(matcher.mask().nonzero()[0].tolist()) == {a, b, byte_level.eos_id}
    assert not matcher.ended
    assert matcher.valid([a, b, a]) == 2  # nothing comes after an end
    matcher.accept(b)
    assert matcher.ended


def test_without_a_stop_id_an_output_ends_where_nothing_can_follow(byte_level: Tokenizer) -> None:
    matcher = Constraints(byte_level, byte_level.vocab_size, []).matcher(Grammar.regex("ab?"))
    a, b = byte_level.encode("a")[0], byte_level.encode("b")[0]
    matcher.accept(a)
    assert matcher.mask().nonzero()[0].tolist() == [b]
    assert not matcher.ended
    matcher.accept(b)
    assert matcher.ended
    assert not matcher.mask().any()


def test_valid_counts_and_changes_nothing(walker: Walker) -> None:
    matcher = walker.constraints.matcher(Grammar.regex("[a-d]{3}"))
    a, z = (walker.constraints.matcher(Grammar.choices([text])).forced()[0] for text in "az")
    before = matcher.mask().copy()
    assert matcher.valid([]) == 0
    assert matcher.valid([a, a, z, a]) == 2
    assert matcher.valid([a, walker.vocab_size, a]) == 1
    assert matcher.valid([a, a, a, walker.eos, a]) == 4
    assert matcher.valid([walker.eos]) == 0
    assert (matcher.mask() == before).all()
    matcher.accept(a)
    assert matcher.valid([a, a, a]) == 2


def test_a_token_that_is_not_allowed_raises_value_error(walker: Walker) -> None:
    for wrong in (walker.eos, walker.vocab_size, -1):
        with pytest.raises(ValueError, match="token") as problem:
            walker.constraints.matcher(Grammar.regex("[a-d]{3}")).accept(wrong)
        assert not isinstance(problem.value, GrammarError)


def test_a_mask_is_read_only_and_as_long_as_the_logits(byte_level: Tokenizer) -> None:
    for size in (byte_level.vocab_size - 40, byte_level.vocab_size, byte_level.vocab_size + 70):
        mask = Constraints(byte_level, size, []).matcher(Grammar.regex("(?s).*")).mask()
        assert mask.shape == (size,)
        assert not mask[byte_level.vocab_size :].any()
        with pytest.raises(ValueError, match="read-only"):
            mask[0] = True


def test_matchers_of_one_grammar_are_independent_and_compiled_once(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_one: Callable[..., LLMatcher] = Grammar.compile
    monkeypatch.setattr(
        Grammar, "compile", lambda self, table: compiled.append(self) or compile_one(self, table)
    )
    constraints = Constraints(byte_level, byte_level.vocab_size, [])
    first, second = constraints.matcher(Grammar.regex("ab")), constraints.matcher(Grammar.regex("ab"))
    first.accept(byte_level.encode("a")[0])
    assert second.mask().nonzero()[0].tolist() == byte_level.encode("a")
    assert len(compiled) == 1
    for number in range(COMPILED):
        constraints.matcher(Grammar.regex(f"ab{number}"))
    constraints.matcher(Grammar.regex("ab"))  # dropped from the cache meanwhile
    assert len(compiled) == COMPILED + 2


# Errors


def test_characters_without_a_token_are_an_error() -> None:
    tokenizer = only_letters("abc ")
    constraints = Constraints(tokenizer, tokenizer.vocab_size, [])
    assert constraints.matcher(Grammar.choices(["a b", "x y"])).mask().nonzero()[0].tolist() == [1]
    for grammar in (Grammar.choices(["xyz"]), Grammar.regex("[xyz]"), Grammar.choices(["éa"])):
        with pytest.raises(GrammarError, match="the tokenizer has no tokens for"):
            constraints.matcher(grammar).mask()
    matcher = constraints.matcher(Grammar.regex("a[xyz]"))
    with pytest.raises(GrammarError, match="the tokenizer has no tokens for"):
        matcher.accept(1)
        matcher.mask()


def test_a_dead_end_is_not_blamed_on_a_tokenizer_that_has_all_bytes(byte_level: Tokenizer) -> None:
    constraints = Constraints(byte_level, byte_level.vocab_size, [])
    matcher = constraints.matcher(Grammar.lark('start: "a" B\nB: /x/ & /y/'))
    with pytest.raises(GrammarError, match="the grammar allows what it has begun, and nothing behind it"):
        matcher.accept(byte_level.encode("a")[0])
        matcher.mask()


def test_a_grammar_beyond_the_parsers_limits_is_reported_as_such(byte_level: Tokenizer) -> None:
    many = " | ".join(f'"a{number}"' for number in range(3000))
    matcher = Constraints(byte_level, byte_level.vocab_size, []).matcher(Grammar.lark(f"start: {many}"))
    with pytest.raises(GrammarError, match=r"too complex to follow \(.*max is 2000.*\); make it simpler"):
        matcher.accept(byte_level.encode("a")[0])
        matcher.mask()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"age": {"type": "integr"}}}, "schema.properties.age: Invalid type: integr"),
        (
            {"items": {"anyOf": [{"type": "string"}, {"not": {"type": "null"}}]}},
            'schema.items.anyOf[1]: JSON Schema keyword "not" is not supported',
        ),
        (
            {
                "$defs": {"A": {"properties": {"q": {"type": "string", "if": {"minLength": 1}}}}},
                "items": {"$ref": "#/$defs/A"},
            },
            'schema.$defs.A.properties.q: JSON Schema keyword "if" is not supported',
        ),
        ({"type": "object", "properties": 3}, "schema: properties must be an object"),
        ({"x-guidance": {"lenient": 3}}, "schema: invalid type: integer `3`, expected a boolean"),
        ({"$ref": "#/$defs/A"}, "schema: Pointer '/$defs/A' does not exist"),
        (
            {"items": {"type": "integer", "minimum": 5, "maximum": 3}, "minItems": 1, "type": "array"},
            "schema.items: Unsatisfiable schema: minimum (5) is greater than maximum (3)",
        ),
    ],
)
def test_the_error_of_an_invalid_schema_names_its_place(
    byte_level: Tokenizer, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrammarError) as problem:
        Constraints(byte_level, byte_level.vocab_size, []).matcher(Grammar.json_schema(schema))
    assert str(problem.value) == message
    with pytest.raises(GrammarError, match=re.escape(message)):
        Grammar.json_schema(schema).check()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("[a-"), "regex '[a-' can't be used: unclosed character class"),
        (Grammar.regex("(a)\\1"), r"regex '(a)\\1' can't be used: backreferences are not supported"),
        (Grammar.regex("a$b"), "regex 'a$b' can't be used: lookarounds not supported yet; End"),
        (Grammar.lark("start: x"), 'grammar: line 1, column 8: unknown name: "x"'),
        (Grammar.lark('x: "a"'), "grammar: no start rule found"),
    ],
)
def test_the_error_of_an_invalid_grammar_is_one_line(grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError) as problem:
        grammar.check()
    assert str(problem.value) == message


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Grammar.json_schema(True), "`schema` is a bool; it must be a JSON Schema as a dict"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"enum": [{1, 2}]}), "`schema` can't be written as JSON"),
        (lambda: Grammar.regex(""), "`regex` is ''; it must be a string that is not empty"),
        (lambda: Grammar.regex("\udcff"), "`regex` is not valid Unicode text"),
        (lambda: Grammar.choices("yes"), "`choices` must be a list of strings"),
        (lambda: Grammar.choices([]), "`choices` must be a list of strings"),
        (lambda: Grammar.choices(["a", ""]), r"`choices\[1\]` is ''"),
        (lambda: Grammar.choices(["a", 3]), r"`choices\[1\]` is 3"),  # type: ignore[list-item]
        (lambda: Grammar.lark(None), "`grammar` is None"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_are_no_grammar_are_refused(build: Callable[[], Grammar], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        build()


def test_grammars_compare_by_their_content() -> None:
    assert Grammar.choices(["a", "b", "a"]) == Grammar.choices(("a", "b"))
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.lark("a")}) == 2
    ascending, descending = ({"properties": {a: {}, b: {}}} for a, b in ("xy", "yx"))
    assert Grammar.json_schema(ascending) != Grammar.json_schema(descending)  # in this order they are written


def test_the_validators_notice_invalid_outputs() -> None:
    with pytest.raises(ValidationError):
        Person.model_validate_json('{"name": "A", "age": 151, "tags": []}')
