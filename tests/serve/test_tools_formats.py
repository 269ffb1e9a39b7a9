"""Formats of calls in templates, and their grammars: random outputs allowed by llguidance are parsed back."""

from __future__ import annotations

import random
from typing import Annotated, Any

import pytest
import tool_templates as templates
from pydantic import BaseModel, Field

from tercet.data.tool_format import GENERIC, ToolFormat, tool_format
from tercet.engine.constraint import Constraints
from tercet.engine.grammar import Grammar
from tercet.engine.request import Delta
from tercet.engine.text import TextStream, TokenBytes
from tercet.model.tokenizer import Tokenizer
from tercet.serve.tools.answer import Answer, gather
from tercet.serve.tools.formats import call_grammar
from tercet.serve.tools.parser import ToolParser

SPECIAL = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]",),
    "named": ("[TOOL_CALLS]", "[ARGS]"),
    "identified": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "bare": ("<|python_tag|>",),
}


class Weather(BaseModel):
    city: Annotated[str, Field(max_length=5)]
    days: Annotated[int, Field(ge=1, le=3)]


FUNCTIONS = {
    "weather": Grammar.json_schema(Weather.model_json_schema()),
    "any": Grammar.json_schema({"type": "object", "properties": {}}),
}


# Detection


@pytest.mark.parametrize("style", templates.ALL)
def test_the_format_is_detected_from_the_template(style: str) -> None:
    form = tool_format(templates.tokenizer_with(templates.ALL[style]))
    key = "parameters" if style == "bare" else "arguments"
    named: Any = "named" if style == "identified" else style
    assert form == ToolFormat(named, key, True, style != "bare", style == "identified")


def test_a_template_that_needs_strings_is_detected() -> None:
    form = tool_format(templates.tokenizer_with(templates.HERMES_STRINGS))
    assert form == ToolFormat("hermes", objects=False)


def test_a_python_tag_before_the_call_is_the_bare_format() -> None:
    tagged = templates.BARE.replace('<|{{ m.role }}|>{"name"', '<|{{ m.role }}|><|python_tag|>{"name"')
    form = tool_format(templates.tokenizer_with(tagged))
    assert form is not None and form.style == "bare"


@pytest.mark.parametrize(
    "template",
    [
        templates.PLAIN,  # leaves tools and calls out
        templates.HERMES.replace(templates.HERMES[: templates.HERMES.index("{% for m")], ""),  # no tools
        templates.PLAIN + "{{ tools | tojson }}",  # shows tools, leaves calls out
        "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + templates.HERMES,
        templates.HERMES.replace("<tool_call>\n{", "<tool_call>\n<function>{"),  # another format
        templates.BARE.replace('{"name"', 'I call {"name"'),  # bare JSON in the middle of a text
        "{% syntax error",
        None,
    ],
)
def test_a_template_without_calls_that_are_known_has_no_format(template: str | None) -> None:
    assert tool_format(templates.tokenizer_with(template)) is None


def test_the_template_for_tools_is_preferred() -> None:
    plain = templates.tokenizer_with(templates.PLAIN)
    both = Tokenizer(plain.backend, plain.config, {**plain.templates, "tool_use": templates.HERMES}, {})
    form = tool_format(both)
    assert form is not None and form.style == "hermes"


# Grammars


class Writer:
    """Writes random outputs that a grammar allows, and parses them."""

    def __init__(self, style: str, special: bool, seed: int = 0) -> None:
        self.tokenizer = templates.tokenizer_with(templates.ALL[style], SPECIAL[style] if special else ())
        form = tool_format(self.tokenizer)
        assert form is not None and self.tokenizer.eos_id is not None
        self.form, self.eos = form, self.tokenizer.eos_id
        self.constraints = Constraints(self.tokenizer, self.tokenizer.vocab_size, [self.eos])
        self.random = random.Random(seed)
        self.markers = {self.tokenizer.id_of(marker) for marker in templates.MARKERS}

    def tokens(self, grammar: Grammar, limit: int = 3000, begin: list[int] | None = None) -> list[int]:
        matcher, tokens = self.constraints.matcher(grammar), list(begin or [])
        for token in tokens:
            matcher.accept(token)
        while not matcher.ended and len(tokens) < limit:
            if forced := matcher.forced():
                new = forced
            else:
                mask = matcher.mask()
                allowed = [int(token) for token in mask.nonzero()[0] if token != self.eos]
                if mask[self.eos] and self.random.random() < 0.3:
                    break
                # Random choice would hardly ever produce calls or ends of values.
                likely = [t for t in allowed if t in self.markers or self.tokenizer.token_text(t) in '"{},]']
                few = likely if likely and self.random.random() < 0.3 else allowed
                new = [self.random.choice(few)]
            for token in new:
                matcher.accept(token)
            tokens += new
        assert len(tokens) < limit
        return tokens

    def text(self, tokens: list[int]) -> str:
        bytes_of = TokenBytes(self.tokenizer)
        return b"".join(bytes_of(token) for token in tokens).decode(errors="replace")

    def answer(self, grammar: Grammar) -> Answer:
        tokens = self.tokens(grammar)
        parser = ToolParser(self.form, FUNCTIONS, self.tokenizer, whole=True)
        return gather([*parser.push(Delta(0, self.text(tokens), tokens, None)), *parser.finish()])


def check(answer: Answer) -> None:
    for call in answer.calls:
        if call.name == "weather":
            Weather.model_validate_json(call.arguments)
        else:
            assert call.name == "any" and call.arguments == "{}"


EVERY = pytest.mark.parametrize(
    ("style", "special"), [(style, special) for style in templates.ALL for special in (False, True)]
)


@EVERY
@pytest.mark.parametrize("several", [False, True])
def test_an_output_that_must_call_is_calls_and_nothing_else(style: str, special: bool, several: bool) -> None:
    writer = Writer(style, special)
    grammar = call_grammar(writer.form, FUNCTIONS, writer.tokenizer, required=True, several=several)
    counts = set()
    for _ in range(12):
        answer = writer.answer(grammar)
        check(answer)
        assert answer.content is None
        counts.add(len(answer.calls))
    assert min(counts) == 1
    assert (max(counts) > 1) == (several and style != "bare")


@EVERY
def test_an_output_that_may_call_is_text_or_right_calls(style: str, special: bool) -> None:
    writer = Writer(style, special)
    grammar = call_grammar(writer.form, FUNCTIONS, writer.tokenizer, required=False, several=True)
    kinds = set()
    for _ in range(30):
        answer = writer.answer(grammar)
        check(answer)
        assert writer.form.trigger == "" or writer.form.trigger not in (answer.content or "")
        kinds.add(bool(answer.calls))
    assert kinds == {True, False}


@EVERY
def test_an_output_of_a_form_is_that_or_calls(style: str, special: bool) -> None:
    if style == "bare":
        return  # refused: see test_tools_requests
    writer = Writer(style, special)
    otherwise = Grammar.json_schema({"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]})
    grammar = call_grammar(
        writer.form, FUNCTIONS, writer.tokenizer, required=False, several=False, otherwise=otherwise
    )
    contents = set()
    for _ in range(20):
        answer = writer.answer(grammar)
        check(answer)
        assert len(answer.calls) == (answer.content is None)
        contents.add(answer.content)
    assert contents == {None, '{"n": 1}'}


def test_references_in_a_schema_lead_to_its_own_definitions() -> None:
    schema = {
        "type": "object",
        "properties": {"shirt": {"$ref": "#/$defs/size"}},
        "required": ["shirt"],
        "$defs": {"size": {"enum": ["S", "M"]}},
    }
    writer = Writer("hermes", special=False)
    grammar = call_grammar(
        writer.form, {"any": Grammar.json_schema(schema)}, writer.tokenizer, required=True, several=False
    )
    assert writer.answer(grammar).calls[0].arguments in ('{"shirt": "S"}', '{"shirt": "M"}')


def test_text_that_begins_like_a_trigger_is_text() -> None:
    writer = Writer("hermes", special=False)
    grammar = call_grammar(writer.form, FUNCTIONS, writer.tokenizer, required=False, several=True)
    matcher = writer.constraints.matcher(grammar)
    for token in writer.tokenizer.encode("a <tool_cal> b", special=False):
        matcher.accept(token)
    assert matcher.mask()[writer.eos]


def test_text_that_breaks_off_is_read_all_the_same() -> None:
    # An engine may cut an output at any token.
    writer: Any = Writer("named", special=True)
    grammar = call_grammar(writer.form, FUNCTIONS, writer.tokenizer, required=True, several=True)
    tokens = writer.tokens(grammar)
    for length in range(len(tokens)):
        parser = ToolParser(writer.form, FUNCTIONS, writer.tokenizer)
        stream = TextStream()
        bytes_of = TokenBytes(writer.tokenizer)
        pieces = []
        for token in tokens[:length]:
            pieces += parser.push(Delta(0, stream.push(bytes_of(token)), [token], None))
        answer = gather([*pieces, *parser.finish()])
        assert all(call.name in FUNCTIONS for call in answer.calls)


# The generic format


class Item(BaseModel):
    sort: Annotated[str, Field(max_length=3)]


class Order(BaseModel):
    items: Annotated[list[Item], Field(min_length=1, max_length=2)]


class Report(BaseModel):
    name: Annotated[str, Field(max_length=4)]
    items: Annotated[list[Item], Field(max_length=1)]


@pytest.mark.parametrize("opening", ["", '{"name": "order", "arg', '{"name": "w'])
def test_a_form_and_calls_in_the_generic_format_are_told_apart(opening: str) -> None:
    tokenizer = templates.tokenizer_with(templates.PLAIN)
    writer = Writer("hermes", special=False)
    functions = {"order": Grammar.json_schema(Order.model_json_schema()), "weather": FUNCTIONS["weather"]}
    form = Grammar.json_schema(Report.model_json_schema())
    grammar = call_grammar(GENERIC, functions, tokenizer, required=False, several=True, otherwise=form)
    kinds = set()
    for _ in range(20):
        text = writer.text(writer.tokens(grammar, begin=tokenizer.encode(opening, special=False)))
        parser = ToolParser(GENERIC, functions, tokenizer, whole=True, exact=True)
        answer = gather([*parser.push(Delta(0, text, [], None)), *parser.finish()])
        for call in answer.calls:
            (Order if call.name == "order" else Weather).model_validate_json(call.arguments)
        if not answer.calls:
            Report.model_validate_json(answer.content or "")
        kinds.add(bool(answer.calls))
    assert kinds == {True} if "arg" in opening else False in kinds


def test_an_answer_of_the_form_that_names_a_function_is_no_call() -> None:
    text = '{"name": "order"}'
    for exact, count in ((True, 0), (False, 1)):
        parser = ToolParser(GENERIC, {"order"}, templates.tokenizer_with(None), whole=True, exact=exact)
        assert len(gather([*parser.push(Delta(0, text, [], None)), *parser.finish()]).calls) == count


def test_text_that_begins_as_a_generic_call_is_one_and_other_json_is_text() -> None:
    tokenizer = templates.tokenizer_with(templates.PLAIN)
    constraints = Constraints(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])
    grammar = call_grammar(GENERIC, FUNCTIONS, tokenizer, required=False, several=True)

    def allows(text: str) -> bool:
        matcher = constraints.matcher(grammar)
        tokens = tokenizer.encode(text, special=False)
        return matcher.valid(tokens) == len(tokens)

    assert allows('{"name": "other", "age": 3}') and allows('[{"name": "any"}]') and allows("Say {}")
    assert allows('{"name": "any", "arguments": {}}\n{"name": "any", "arguments": {}}')
    assert not allows('{"name": "any", "x') and not allows('{"name": "weather", "arguments": {"x')
    assert not allows('{"name": "any", "arguments": {}} and text')
