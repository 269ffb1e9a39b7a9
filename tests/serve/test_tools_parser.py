"""Answers parsed into content and calls: whole, in pieces, and with text that only begins like a call."""

from __future__ import annotations

import json

import pytest
import tool_templates as templates
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.tool_format import ToolFormat
from tercet.engine.request import Delta
from tercet.engine.text import TextStream, TokenBytes
from tercet.serve.tools.answer import Answer, CallDelta, Piece, gather
from tercet.serve.tools.parser import ToolParser

NAMES = ("weather", "f")
FORMS = {
    "hermes": ToolFormat("hermes"),
    "mistral": ToolFormat("mistral"),
    "named": ToolFormat("named"),
    "bare": ToolFormat("bare", "parameters", several=False),
    "several bare": ToolFormat("bare", "parameters"),
}


def pieces_of(form: str, *texts: str, whole: bool = False) -> list[Piece]:
    parser = ToolParser(FORMS[form], NAMES, templates.tokenizer_with(None), whole=whole)
    pieces: list[Piece] = []
    for text in texts:
        pieces += parser.push(Delta(0, text, [], None))
    return [*pieces, *parser.finish()]


def read(form: str, text: str) -> tuple[str | None, list[tuple[str, str]]]:
    return plain(gather(pieces_of(form, text, whole=True)))


def plain(answer: Answer) -> tuple[str | None, list[tuple[str, str]]]:
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


# Answers of each format: text, content and calls.
GOOD = [
    ("hermes", "Hello.", "Hello.", []),
    ("hermes", "", "", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', None, [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n', None, [("f", '{"a":1}')]),
    (
        "hermes",
        'Let me look.\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln {"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "Let me look.",
        [("weather", '{"city": "Köln {"}'), ("f", "{}")],
    ),
    (
        "hermes",  # keys in another order, arguments as a string of JSON
        '<tool_call>{"arguments": "{\\"a\\": [1, {}]}", "name": "f"}</tool_call>',
        None,
        [("f", '{"a": [1, {}]}')],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\\"}"}}', None, [("f", '{"a": "x\\"}"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.', "Done.", [("f", "{}")]),
    ("hermes", "a < b and <tool_cal> is no marker ", "a < b and <tool_cal> is no marker ", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}]', None, [("f", '{"a": "]"}')]),
    (
        "mistral",
        'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc"}, {"name": "weather", "arguments": {}}]',
        "Yes.",
        [("f", "{}"), ("weather", "{}")],
    ),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("named", '[TOOL_CALLS]f[ARGS]{"a": {}}', None, [("f", '{"a": {}}')]),
    (
        "named",
        'Yes.[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}[TOOL_CALLS]weather[ARGS]{"city": "a"}',
        "Yes.",
        [("f", "{}"), ("weather", '{"city": "a"}')],
    ),
    ("bare", '{"name": "f", "parameters": {"a": 1}}', None, [("f", '{"a": 1}')]),
    ("bare", ' <|python_tag|>{"name": "f", "parameters": {}}', None, [("f", "{}")]),
    ("bare", '{"type": "function", "name": "f", "parameters": {"a": {}}}', None, [("f", '{"a": {}}')]),
    ("bare", '{"name": "f", "arguments": {}}\n', None, [("f", "{}")]),
    ("bare", 'Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', []),
    ("bare", '{"a": 1}', '{"a": 1}', []),
    ("several bare", '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 2}}', None,
     [("f", "{}"), ("f", '{"a": 2}')]),
]  # fmt: skip
# Texts without calls; every character is content.
BAD = [
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>\nf(a=1)\n</tool_call>"),
    ("hermes", 'Look: <tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "line\nbreak"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ]}}</tool_call>'),
    ("hermes", "This is a <tool_call>"),
    ("hermes", '<tool_call>{"name": "we'),
    ("hermes", '<tool_call>{"name": {"f": 1}, "arguments": {}}</tool_call>'),
    ("mistral", "[TOOL_CALLS] no list"),
    ("mistral", '[TOOL_CALLS][{"name": "g", "arguments": {}}]'),
    ("mistral", "[TOOL_CALLS]["),
    ("named", "[TOOL_CALLS]f and more"),
    ("named", "[TOOL_CALLS]g[ARGS]{}"),
    ("named", "[TOOL_CALLS]f[ARGS]1"),
    ("named", "[TOOL_CALLS]f[AR"),
    ("bare", '{"name": "g", "parameters": {}}'),
    ("bare", '{"name": "Ann", "age": 3}'),
    ("bare", '{"name": "f", "parameters": {"a": 1,}}'),
    ("bare", "{"),
    ("bare", "\n "),
    ("bare", "<|python"),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), GOOD)
def test_an_answer_is_content_and_calls(
    form: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    text_before, parsed_calls = read(form, text)
    assert ((text_before or "").strip(), parsed_calls) == ((content or "").strip(), calls)
    assert (text_before is None) == (content is None)


@pytest.mark.parametrize(("form", "text"), BAD)
def test_a_malformed_call_is_content(form: str, text: str) -> None:
    assert read(form, text) == (text, [])


@pytest.mark.parametrize(("form", "text", "content", "calls"), GOOD)
def test_a_stream_gives_the_same_character_by_character(
    form: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert plain(gather(pieces_of(form, *text))) == read(form, text)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_in_any_pieces_is_read_and_cut_makes_no_difference(form: str, data: st.DataObject) -> None:
    parts = [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f", ', '"arguments": ',
        '"parameters": ', '{"a": 1}', "}", "{", "[", "]", ", ", ";", "f", "weather", '"', "\\", "\n", " ", "é", "text",
    ]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for whole in (False, True):
        at_once, in_pieces = (gather(pieces_of(form, *chunks, whole=whole)) for chunks in ([text], texts))
        assert plain(at_once) == plain(in_pieces)
    # Only the last call may be cut off.
    assert all(isinstance(json.loads(call.arguments), dict) for call in at_once.calls[:-1])


def test_arguments_come_as_they_are_written_and_name_and_id_once() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "long"}}</tool_call>'
    pieces = [piece for piece in pieces_of("hermes", *text) if isinstance(piece, CallDelta)]
    first, *rest = pieces
    assert first.name == "f" and first.id is not None and first.arguments == ""
    assert all(piece.id is None and piece.name is None and piece.index == 0 for piece in rest)
    assert len(rest) == len('{"a": "long"}')


def test_every_call_has_an_identifier_of_its_own() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = [
        piece.id for piece in pieces_of("hermes", call + call) if isinstance(piece, CallDelta) and piece.id
    ]
    assert len(set(ids)) == 2 and all(identifier.startswith("call_") for identifier in ids)


def test_text_that_may_begin_a_call_is_held_back_and_no_other() -> None:
    parser = ToolParser(FORMS["hermes"], NAMES, templates.tokenizer_with(None))

    def push(text: str) -> list[Piece]:
        return parser.push(Delta(0, text, [], None))

    assert push("Hi <to") == ["Hi"]
    assert push("ol") == []
    assert push(" x") == [" <tool x"]
    assert push(" \n") == []
    assert push("y") == [" \ny"]
    assert parser.finish() == []


def test_json_that_is_no_call_comes_as_soon_as_its_first_key_is_there() -> None:
    parser = ToolParser(FORMS["bare"], NAMES, templates.tokenizer_with(None))
    assert parser.push(Delta(0, '{"answer', [], None)) == []
    assert parser.push(Delta(0, '": ', [], None)) == ['{"answer": ']
    assert parser.push(Delta(0, "1", [], None)) == ["1"]


def test_what_is_nested_too_deeply_to_be_read_is_content() -> None:
    text = '{"type": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert read("bare", text) == (text, [])


def test_a_stream_keeps_what_it_has_sent_of_a_call_that_goes_wrong() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>'
    content, calls = plain(gather(pieces_of("hermes", *text)))
    assert calls == [("f", '{"a": "x')]
    assert content == '\ny"}}</tool_call>'


@pytest.mark.parametrize("whole", [False, True])
def test_a_call_that_was_cut_off_in_its_arguments_is_one(whole: bool) -> None:
    pieces = pieces_of("hermes", '<tool_call>{"name": "f", "arguments": {"a": "lo', whole=whole)
    assert plain(gather(pieces)) == (None, [("f", '{"a": "lo')])


def test_without_a_format_everything_is_content() -> None:
    parser = ToolParser(None, (), None)
    assert parser.push(Delta(0, " <tool_call> [TOOL_CALLS]", [], None)) == [" <tool_call> [TOOL_CALLS]"]
    assert parser.finish() == []


# Special tokens


@pytest.mark.parametrize("stops", [(), ("}x", "é<")])
@pytest.mark.parametrize(
    ("form", "special", "text"),
    [
        (
            "hermes",
            ("<tool_call>", "</tool_call>"),
            'é日<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        ),
        ("named", ("[TOOL_CALLS]", "[ARGS]"), "日本[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f[ARGS]{}"),
        ("mistral", ("[TOOL_CALLS]",), '[TOOL_CALLS][{"name": "f", "arguments": {"é": "日"}}]'),
        ("bare", ("<|python_tag|>",), '<|python_tag|>{"name": "f", "parameters": {}}'),
    ],
)
def test_markers_that_are_special_tokens_are_found_by_their_tokens(
    form: str, special: tuple[str, ...], text: str, stops: tuple[str, ...]
) -> None:
    tokenizer = templates.tokenizer_with(None, special)
    tokens = tokenizer.encode(text, special=False)
    bytes_of, stream = TokenBytes(tokenizer), TextStream(stops)
    parser = ToolParser(FORMS[form], NAMES, tokenizer)
    pieces: list[Piece] = []
    waiting: list[int] = []
    for token in tokens:  # like an engine: tokens without text are sent with the next piece
        waiting.append(token)
        if piece := stream.push(bytes_of(token)):
            pieces += parser.push(Delta(0, piece, waiting, None))
            waiting = []
    pieces += parser.push(Delta(0, stream.finish(), waiting, None))
    assert plain(gather([*pieces, *parser.finish()])) == read(form, text)
    whole = Delta(0, tokenizer.decode(tokens), tokens, None)
    parser = ToolParser(FORMS[form], NAMES, tokenizer, whole=True)
    assert plain(gather([*parser.push(whole), *parser.finish()])) == read(form, text)
