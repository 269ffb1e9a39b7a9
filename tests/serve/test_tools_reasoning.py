"""Reasoning in answers with tools: nothing in it is a call, in any format, whole, in pieces and constrained."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tool_templates as templates
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.reasoning import REASONING, open_reasoning, reasoning_of
from tercet.data.tool_format import GENERIC, ToolFormat, tool_format
from tercet.engine.constraint import Constraints
from tercet.engine.grammar import Grammar
from tercet.engine.request import Delta
from tercet.engine.text import TextStream, TokenBytes
from tercet.serve.tools.answer import Answer, Piece, gather
from tercet.serve.tools.formats import call_grammar, end_of_reasoning
from tercet.serve.tools.parser import ToolParser
from tercet.serve.tools.plan import plan_tools
from tercet.serve.tools.request import read_tools

FORMS = {
    "hermes": ToolFormat("hermes"),
    "mistral": ToolFormat("mistral"),
    "named": ToolFormat("named"),
    "bare": ToolFormat("bare", "parameters", several=False),
    "lines": GENERIC,
}
CALLS = {
    "hermes": '<tool_call>\n{"name": "erase", "arguments": {"disk": 1}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "erase", "arguments": {"disk": 1}}]',
    "named": '[TOOL_CALLS]erase[ARGS]{"disk": 1}',
    "bare": '{"name": "erase", "parameters": {"disk": 1}}',
    "lines": '{"name": "erase", "arguments": {"disk": 1}}',
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def pieces_of(form: str, texts: Any, whole: bool = False, **options: Any) -> list[Piece]:
    parser = ToolParser(FORMS[form], {"erase"}, templates.tokenizer_with(None), whole=whole, **options)
    pieces = [piece for text in texts for piece in parser.push(Delta(0, text, [], None))]
    return [*pieces, *parser.finish()]


def both_ways(form: str, text: str, **options: Any) -> tuple[str | None, list[str]]:
    """Return content and arguments, the same whole, as a stream of characters and as a stream in one piece."""
    answers = [
        plain(gather(pieces_of(form, texts, whole, **options)))
        for whole in (False, True)
        for texts in (text, [text])
    ]
    assert answers.count(answers[0]) == len(answers)
    return answers[0]


def plain(answer: Answer) -> tuple[str | None, list[str]]:
    return answer.content, [call.arguments for call in answer.calls]


# Without a constraint


@EVERY_FORM
@pytest.mark.parametrize("begin", REASONING)
def test_a_call_in_reasoning_is_none_and_a_call_behind_it_is_one(form: str, begin: str) -> None:
    thought = f"{begin}\nShould I? {CALLS[form]} No.{REASONING[begin]}"
    text = f"{thought}\n\nWhich disk?"
    assert both_ways(form, text) == (text, [])
    content, calls = both_ways(form, f"{thought}\n\n{CALLS[form]}")
    assert calls == ['{"disk": 1}'] and (content or "").strip() == thought


@EVERY_FORM
def test_a_call_at_the_beginning_of_reasoning_is_none(form: str) -> None:
    text = f"<think>{CALLS[form]}</think>"
    assert both_ways(form, text) == (text, [])


@EVERY_FORM
def test_reasoning_without_an_end_has_no_call(form: str) -> None:
    text = f" [THINK]One could do {CALLS[form]}"
    assert both_ways(form, text) == (text, [])
    assert both_ways(form, f"{text} </think> {CALLS[form]}")[1] == []  # another marker ends nothing


@EVERY_FORM
def test_reasoning_that_the_prompt_has_opened_ends_with_its_marker(form: str) -> None:
    text = f"Hm. {CALLS[form]}</think>{CALLS[form]}"
    assert both_ways(form, text, reasoning="</think>")[1] == ['{"disk": 1}']
    assert both_ways(form, f"Hm. {CALLS[form]}", reasoning="</think>")[1] == []


@pytest.mark.parametrize("form", ["hermes", "mistral", "named"])
def test_a_model_may_think_again(form: str) -> None:
    text = f"First.<think>{CALLS[form]}</think>Then {CALLS[form]} and <think>{CALLS[form]}</think>"
    content, calls = both_ways(form, text)
    assert calls == ['{"disk": 1}'] and content is not None and content.count(CALLS[form]) == 2


@pytest.mark.parametrize("form", ["hermes", "mistral", "named"])
@pytest.mark.parametrize("quote", ["`", "'", '"'])
def test_a_marker_between_quotation_marks_begins_no_reasoning(form: str, quote: str) -> None:
    text = f"I remove {quote}<think>{quote} from it."
    assert both_ways(form, f"{text} {CALLS[form]}") == (text, ['{"disk": 1}'])


@EVERY_FORM
def test_a_marker_in_arguments_begins_no_reasoning(form: str) -> None:
    call = CALLS[form].replace("1", '"<think>"')
    assert both_ways(form, call) == (None, ['{"disk": "<think>"}'])


@EVERY_FORM
@settings(max_examples=60)
@given(data=st.data())
def test_pieces_make_no_difference(form: str, data: st.DataObject) -> None:
    parts = [
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        CALLS[form],
        "`",
        " ",
        "\n",
        "<",
        "th",
        "text",
        "{",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for whole in (False, True):
        assert plain(gather(pieces_of(form, texts, whole))) == plain(gather(pieces_of(form, [text], whole)))


# Markers that are special tokens


SPECIAL = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")


@pytest.mark.parametrize("form", ["mistral", "named"])
@pytest.mark.parametrize("stops", [(), ("No.x",)])
def test_special_tokens_around_reasoning_are_seen_and_add_no_text(form: str, stops: tuple[str, ...]) -> None:
    tokenizer = templates.tokenizer_with(None, SPECIAL)
    text = f"[THINK]Should I? {CALLS[form]} No.[/THINK]Sure: {CALLS[form]}"
    tokens = tokenizer.encode(text, special=False)
    content = f"Should I? {CALLS[form]} No.Sure:"
    bytes_of, stream, waiting = TokenBytes(tokenizer), TextStream(stops), list[int]()
    parser, pieces = ToolParser(FORMS[form], {"erase"}, tokenizer), list[Piece]()
    for token in tokens:
        waiting.append(token)
        if piece := stream.push(bytes_of(token)):
            pieces += parser.push(Delta(0, piece, waiting, None))
            waiting = []
    pieces += [*parser.push(Delta(0, stream.finish(), waiting, None)), *parser.finish()]
    assert plain(gather(pieces)) == (content, ['{"disk": 1}'])
    parser = ToolParser(FORMS[form], {"erase"}, tokenizer, whole=True)
    whole = parser.push(Delta(0, tokenizer.decode(tokens), tokens, None))
    assert plain(gather([*whole, *parser.finish()])) == (content, ['{"disk": 1}'])


# Prompts


@pytest.mark.parametrize(
    ("ending", "end"),
    [
        ("<think>\n", "</think>"),
        ("<think>\n\n</think>\n\n", None),
        ("", None),
        ("<think>So far, so", "</think>"),  # a continued message
        ("<think>x</think>y", None),
        ("[THINK]", "[/THINK]"),
    ],
)
@pytest.mark.parametrize("special", [(), SPECIAL])
def test_a_prompt_may_open_reasoning(ending: str, end: str | None, special: tuple[str, ...]) -> None:
    tokenizer = templates.tokenizer_with(None, special)
    prompt = tokenizer.encode(f"<|user|>What is <think>?<|end|><|assistant|>{ending}", special=False)
    assert open_reasoning(tokenizer, prompt) == end


def test_a_question_about_a_marker_opens_no_reasoning_where_roles_are_text() -> None:
    tokenizer = templates.tokenizer_with(None)
    assert open_reasoning(tokenizer, tokenizer.encode("### User: Why <think>?\n### Answer:\n")) is None
    assert open_reasoning(tokenizer, tokenizer.encode("### User: Why?\n### Answer:\n<think>\n")) == "</think>"


def test_a_model_has_the_markers_of_its_template_and_vocabulary() -> None:
    assert reasoning_of(templates.tokenizer_with(templates.HERMES)) == {}
    thinks = templates.tokenizer_with(templates.HERMES + "{% if add_generation_prompt %}<think>{% endif %}")
    assert reasoning_of(thinks) == {"<think>": "</think>"}
    assert reasoning_of(templates.tokenizer_with(None, SPECIAL)) == {"[THINK]": "[/THINK]"}


# Constrained


PLAIN = templates.PLAIN
STYLES = {**templates.ALL, "lines": PLAIN}
PAIRS = [("<think>", "</think>", False), ("[THINK]", "[/THINK]", True)]
ERASE = {"type": "object", "properties": {"disk": {"enum": [1, 2]}}, "required": ["disk"]}
FUNCTIONS = {"erase": Grammar.json_schema(ERASE)}


def follow(tokenizer: Any, grammar: Grammar, text: str) -> str:
    """Return as much of the text as the grammar allows."""
    matcher = Constraints(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id]).matcher(grammar)
    tokens = tokenizer.encode(text, special=False)
    for number, token in enumerate(tokens):
        try:
            matcher.accept(token)
        except ValueError:
            return tokenizer.decode(tokens[:number], skip_special=False)
    return text if matcher.mask()[tokenizer.eos_id] else text + "…"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("begin", "end", "special"), PAIRS)
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("special_calls", [False, True])
def test_a_constraint_lets_a_model_think_and_holds_its_calls(
    style: str, begin: str, end: str, special: bool, opened: bool, special_calls: bool
) -> None:
    markers = ((begin, end) if special else ()) + (templates.MARKERS if special_calls else ())
    tokenizer = templates.tokenizer_with(STYLES[style] + "{# " + begin + " #}", markers)
    form = tool_format(tokenizer) or GENERIC
    wrong = CALLS.get(style, CALLS["named"]).replace("1", "7")
    if style == "identified":
        wrong = wrong.replace("[ARGS]", "[CALL_ID]abcdefghi[ARGS]")
    right = wrong.replace("7", "1")
    grammar = call_grammar(
        form, FUNCTIONS, tokenizer, required=False, several=False, reasoning=end if opened else None
    )
    thought = ("" if opened else begin) + "Hm" + end
    assert follow(tokenizer, grammar, f"{thought}\n\n{right}") == f"{thought}\n\n{right}"
    assert follow(tokenizer, grammar, f"{thought}\n\nNo.") == f"{thought}\n\nNo."
    assert follow(tokenizer, grammar, thought.removesuffix(end)) == thought.removesuffix(end)
    followed = follow(tokenizer, grammar, f"{thought}\n\n{wrong}")
    assert followed.startswith(thought) and "7" not in followed
    if not special_calls or not form.trigger:
        considered = thought.replace("Hm", f"Hm {wrong} no") if form.trigger else thought.replace("Hm", wrong)
        assert follow(tokenizer, grammar, f"{considered}\n\n{right}") == f"{considered}\n\n{right}"


class RandomWriter:
    """Writes random outputs of a grammar, in which markers are frequent."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.constraints = Constraints(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])

    def tokens(self, grammar: Grammar, texts: list[str], limit: int = 400) -> list[int]:
        matcher, tokens = self.constraints.matcher(grammar), list[int]()
        texts = [*texts, "a", " ", "\n"]
        while not matcher.ended and len(tokens) < limit:
            if forced := matcher.forced():
                new = forced
            elif matcher.mask()[self.tokenizer.eos_id] and self.random.random() < 0.2:
                break
            else:
                new = self.tokenizer.encode(self.random.choice(texts), special=False)
                new = new[: matcher.valid(new)]
                if not new:
                    allowed = [int(n) for n in matcher.mask().nonzero()[0] if n != self.tokenizer.eos_id]
                    new = [self.random.choice(allowed)]
            for token in new:
                matcher.accept(token)
            tokens += new
        return tokens


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("begin", "end", "special"), PAIRS)
@pytest.mark.parametrize("opened", [False, True])
def test_grammar_and_parser_agree_on_what_is_a_call(
    style: str, begin: str, end: str, special: bool, opened: bool
) -> None:
    tokenizer = templates.tokenizer_with(
        STYLES[style] + "{# " + begin + " #}", (begin, end) if special else ()
    )
    form = tool_format(tokenizer) or GENERIC
    reasoning = end if opened else None
    grammar = call_grammar(form, FUNCTIONS, tokenizer, required=False, several=True, reasoning=reasoning)
    writer, bytes_of = RandomWriter(tokenizer, 1), TokenBytes(tokenizer)
    call = CALLS.get(style, CALLS["named"])
    called = 0
    for _ in range(25):
        tokens = writer.tokens(grammar, [begin, end, call, call])
        text = b"".join(bytes_of(token) for token in tokens).decode(errors="replace")
        parser = ToolParser(form, FUNCTIONS, tokenizer, reasoning=reasoning, whole=True)
        answer = gather([*parser.push(Delta(0, text, tokens, None)), *parser.finish()])
        called += len(answer.calls)
        complete = answer.calls if len(tokens) < 400 else answer.calls[:-1]
        assert all(call.arguments in ('{"disk": 1}', '{"disk": 2}') for call in complete)
    assert called


TOOL = {"type": "function", "function": {"name": "erase", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("begin", "end", "special"), PAIRS)
def test_an_answer_that_must_call_ends_opened_reasoning_at_once(
    style: str, begin: str, end: str, special: bool
) -> None:
    tokenizer = templates.tokenizer_with(STYLES[style], (begin, end) if special else ())
    prompt = tokenizer.encode(f"<|user|>?<|assistant|>{begin}\n", special=False)
    for choice, form in (
        ("required", None),
        ("auto", Grammar.json_schema({"type": "object", "required": ["a"]})),
    ):
        if form is not None and not (tool_format(tokenizer) or GENERIC).trigger:
            continue  # refused
        plan = plan_tools(read_tools([TOOL], choice, False), tokenizer, form).after(prompt)
        assert plan.constraint is not None
        tokens = RandomWriter(tokenizer, 3).tokens(plan.constraint, ["x"])
        text = b"".join(TokenBytes(tokenizer)(token) for token in tokens).decode()
        assert tokenizer.decode(tokens, skip_special=False).startswith(end_of_reasoning(end))
        for whole in (False, True):
            parser = plan.parser(whole=whole)
            answer = gather([*parser.push(Delta(0, text, tokens, None)), *parser.finish()])
            assert len(answer.calls) == 1 or (form is not None and (answer.content or "").startswith("{"))
            assert bool(answer.calls) == (answer.content is None)
