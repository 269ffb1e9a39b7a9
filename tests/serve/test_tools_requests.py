"""Tools in requests: reading them, the prompt that the model gets, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tool_templates as templates

from tercet.data import prompt_tokens
from tercet.data.tool_format import GENERIC
from tercet.engine.grammar import Grammar
from tercet.serve.errors import APIError
from tercet.serve.tools.messages import checked_messages
from tercet.serve.tools.plan import plan_tools
from tercet.serve.tools.request import MAX_TOOLS, ToolRequest, read_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
HERMES = templates.tokenizer_with(templates.HERMES)


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def template_messages(messages: Any, tokenizer: Any, tools: Any = None) -> list[dict[str, Any]]:
    """Return a request's messages as the template gets them."""
    return prompt_tokens.template_messages(tokenizer, checked_messages(messages), tools)[0]


def refusal(call: Any, *args: Any, **options: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        call(*args, **options)
    assert caught.value.status == 400
    return caught.value


# Reading


def test_no_tools_is_a_plan_without_any() -> None:
    plan = plan_tools(read_tools(None), None)
    assert (plan.tools, plan.constraint) == (None, None)
    form = Grammar.json_schema({"type": "object"})
    assert plan_tools(read_tools([]), None, form).constraint == form


def test_a_tool_is_read_with_its_description_schema_and_strictness() -> None:
    (function,) = read_tools([tool(description="d", strict=True)]).functions
    assert (function.name, function.description, function.strict) == ("weather", "d", True)
    assert function.for_template() == {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": SCHEMA},
    }
    flat = {"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
    (same,) = read_tools([flat], flat=True).functions
    assert same.for_template() == function.for_template() and same.strict


def test_a_function_without_parameters_takes_none() -> None:
    (function,) = read_tools([{"type": "function", "function": {"name": "now"}}]).functions
    assert function.parameters == {"type": "object", "properties": {}}


NAMED = {"type": "function", "function": {"name": "b"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "mode", "only", "names"),
    [
        (None, "auto", None, "ab"),
        ("auto", "auto", None, "ab"),
        ("none", "none", None, "ab"),
        ("required", "required", None, "ab"),
        (NAMED, "required", "b", "ab"),
        (ALLOWED, "required", None, "b"),
    ],
)
def test_a_choice_is_a_mode_and_perhaps_a_function(
    choice: Any, mode: str, only: str | None, names: str
) -> None:
    tools = read_tools([tool("a"), tool("b")], choice)
    assert (tools.mode, tools.only) == (mode, only)
    assert "".join(function.name for function in tools.functions) == names


@pytest.mark.parametrize(
    ("choice", "mode", "only", "names"),
    [
        ({"type": "function", "name": "b"}, "required", "b", "ab"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "b"}]},
            "auto",
            None,
            "b",
        ),
    ],
)
def test_a_choice_of_responses_is_flat(choice: Any, mode: str, only: str | None, names: str) -> None:
    tools = [{"type": "function", "name": name} for name in "ab"]
    request = read_tools(tools, choice, flat=True)
    assert (request.mode, request.only, "".join(function.name for function in request.functions)) == (
        mode,
        only,
        names,
    )


@pytest.mark.parametrize(
    ("tools", "choice", "param", "code"),
    [
        ({}, None, "tools", "invalid_value"),
        (["x"], None, "tools[0]", "invalid_value"),
        ([{}], None, "tools[0].type", "missing_required_parameter"),
        ([{"type": "web_search"}], None, "tools[0].type", "unsupported_parameter"),
        ([{"type": "function"}], None, "tools[0].function", "missing_required_parameter"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name", "missing_required_parameter"),
        ([tool("a b")], None, "tools[0].function.name", "invalid_value"),
        ([tool(), tool()], None, "tools[1].function.name", "invalid_value"),
        ([tool(description=3)], None, "tools[0].function.description", "invalid_value"),
        ([tool(strict="yes")], None, "tools[0].function.strict", "invalid_value"),
        ([tool(parameters=[])], None, "tools[0].function.parameters", "invalid_value"),
        ([tool(parameters={"type": "array"})], None, "tools[0].function.parameters", "invalid_function_parameters"),
        ([tool(extra=1)], None, "tools[0].function.extra", "unknown_parameter"),
        ([tool() | {"extra": 1}], None, "tools[0].extra", "unknown_parameter"),
        ([tool(f"f{n}") for n in range(MAX_TOOLS + 1)], None, "tools", "invalid_value"),
        ([tool()], "any", "tool_choice", "invalid_value"),
        ([tool()], {"type": "function"}, "tool_choice.function", "missing_required_parameter"),
        ([tool()], {"type": "function", "function": {"name": "other"}}, "tool_choice.function.name", "invalid_value"),
        ([tool()], {"type": "custom", "custom": {"name": "x"}}, "tool_choice.type", "unsupported_parameter"),
        ([], "required", "tool_choice", "invalid_value"),
        ([tool()], {"type": "allowed_tools"}, "tool_choice.allowed_tools", "missing_required_parameter"),
        (None, {"type": "function", "function": {"name": "f"}}, "tool_choice.function.name", "invalid_value"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_place(tools: Any, choice: Any, param: str, code: str) -> None:
    problem = refusal(read_tools, tools, choice)
    assert (problem.param, problem.code) == (param, code)
    assert param in problem.message or problem.code == "unknown_parameter"


# Plans


def test_a_free_choice_is_not_constrained() -> None:
    plan = plan_tools(read_tools([tool()]), HERMES)
    assert plan.constraint is None
    assert plan.tools == [tool()]


def test_no_choice_keeps_tools_from_the_model() -> None:
    plan = plan_tools(read_tools([tool()], "none"), templates.tokenizer_with(templates.PLAIN))
    assert plan.tools is None and plan.constraint is None


@pytest.mark.parametrize(
    ("choice", "parallel", "strict"),
    [
        ("required", True, False),
        ({"type": "function", "function": {"name": "weather"}}, True, False),
        ("auto", False, False),
        ("auto", True, True),
    ],
)
def test_required_and_strict_calls_are_enforced_by_a_grammar(
    choice: Any, parallel: bool, strict: bool
) -> None:
    plan = plan_tools(read_tools([tool(strict=strict)], choice, parallel), HERMES)
    assert plan.constraint is not None and plan.constraint.kind == "lark"


def test_a_named_function_is_the_only_one_that_can_be_called() -> None:
    choice = {"type": "function", "function": {"name": "b"}}
    plan = plan_tools(read_tools([tool("a"), tool("b")], choice), HERMES)
    assert plan.names == {"b"}
    assert plan.tools is not None and len(plan.tools) == 2


UNENFORCEABLE = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}


@pytest.mark.parametrize(("choice", "strict"), [("auto", True), ("required", False)])
def test_a_schema_that_has_to_be_enforced_and_cannot_is_refused(choice: str, strict: bool) -> None:
    request = read_tools([tool(parameters=UNENFORCEABLE, strict=strict)], choice)
    problem = refusal(plan_tools, request, HERMES)
    assert problem.param == "tools[0].function.parameters"
    assert problem.code == "invalid_function_parameters"
    assert "properties.a" in problem.message


def test_a_schema_that_is_only_a_hint_may_be_anything() -> None:
    request = read_tools([tool(parameters=UNENFORCEABLE)], "auto", False)
    assert plan_tools(request, HERMES).constraint is not None


def test_a_template_without_a_format_gets_the_functions_as_text_and_holds_calls() -> None:
    plain = templates.tokenizer_with(templates.PLAIN)
    for choice in (None, "required", NAMED | {"function": {"name": "weather"}}):
        plan = plan_tools(read_tools([tool()], choice), plain)
        assert (plan.tools, plan.form) == ([tool()], GENERIC)
        assert plan.constraint is not None
    system, *_ = template_messages([{"role": "user", "content": "Rain?"}], plain, plan.tools)
    assert system["role"] == "system" and json.dumps(SCHEMA) in system["content"]


def test_a_schema_that_the_generic_format_cannot_hold_is_a_hint_where_the_choice_is_free() -> None:
    plain = templates.tokenizer_with(templates.PLAIN)
    hint = tool(parameters=UNENFORCEABLE)
    assert plan_tools(read_tools([hint]), plain).constraint is not None
    assert refusal(plan_tools, read_tools([hint], "required"), plain).code == "invalid_function_parameters"


def test_without_a_tokenizer_there_are_no_tools() -> None:
    assert refusal(plan_tools, read_tools([tool()]), None).param == "tools"


def test_a_form_beside_tools_is_refused_where_calls_look_like_answers() -> None:
    form = Grammar.json_schema({"type": "object"})
    bare = templates.tokenizer_with(templates.BARE)
    problem = refusal(plan_tools, read_tools([tool()]), bare, form, "text.format")
    assert problem.param == "text.format"
    assert plan_tools(read_tools([tool()], "required"), bare, form).constraint is not None
    for other in (HERMES, templates.tokenizer_with(templates.PLAIN)):
        assert plan_tools(read_tools([tool()]), other, form).constraint is not None


# Earlier calls


def conversation(call_id: str = "call_1", arguments: str = '{"city": "Köln"}') -> list[dict[str, Any]]:
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("style", "written"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln"}, "id": "'),
        ("named", '[TOOL_CALLS]weather[ARGS]{"city": "Köln"}'),
        ("identified", "[TOOL_CALLS]weather[CALL_ID]"),
        ("bare", '<|assistant|>{"name": "weather", "parameters": {"city": "Köln"}}<|end|>'),
    ],
)
def test_earlier_calls_and_results_are_rendered_as_the_model_writes_them(style: str, written: str) -> None:
    tokenizer = templates.tokenizer_with(templates.ALL[style])
    messages = template_messages(conversation(), tokenizer)
    text = tokenizer.render(messages, tools=[tool()], add_generation_prompt=True)
    assert written in text and "<|tool|>yes" in text


def test_a_template_that_wants_strings_gets_them() -> None:
    tokenizer = templates.tokenizer_with(templates.HERMES_STRINGS)
    text = tokenizer.render(template_messages(conversation(), tokenizer), tools=[tool()])
    assert '"arguments": {"city": "Köln"}}' in text


def test_an_identifier_is_made_to_fit_and_still_joins_call_and_result() -> None:
    mistral = templates.tokenizer_with(templates.MISTRAL)
    messages = template_messages(conversation("call_0123456789"), mistral)
    made = messages[1]["tool_calls"][0]["id"]
    assert made.isalnum() and len(made) == 9 and messages[2]["tool_call_id"] == made
    assert template_messages(conversation("abcdefghi"), mistral)[2]["tool_call_id"] == "abcdefghi"
    assert template_messages(conversation("call_0"), HERMES)[2]["tool_call_id"] == "call_0"


def test_a_result_carries_the_name_of_its_function_and_the_conversation_stays_as_it_was() -> None:
    before = conversation()
    messages = template_messages(before, HERMES)
    assert messages[2]["name"] == "weather" and messages[1]["content"] == ""
    assert before == conversation()


def test_a_conversation_without_calls_needs_no_format() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert template_messages(messages, templates.tokenizer_with(templates.PLAIN)) == messages


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_calls": []}, "messages[0].tool_calls"),
        ({"tool_calls": ["x"]}, "messages[0].tool_calls[0]"),
        ({"tool_calls": [{"id": "1", "function": {"name": "f"}}]}, "messages[0].tool_calls[0]"),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_malformed_call_is_refused_with_its_place(change: dict[str, Any], param: str) -> None:
    message = {"role": "assistant", "content": None} | change
    assert refusal(checked_messages, [message]).param == param


def test_a_template_that_cannot_show_the_calls_gets_them_as_text() -> None:
    messages = template_messages(conversation(), templates.tokenizer_with(templates.PLAIN))
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == '{"name": "weather", "arguments": {"city": "Köln"}}'
    assert messages[2]["content"].startswith("weather returned:\nyes\n")


def test_several_calls_are_several_messages_where_the_template_takes_one() -> None:
    before = conversation()
    call = before[1]["tool_calls"][0]
    before[1]["tool_calls"] = [call, {**call, "id": "call_2"}, {**call, "id": "call_3"}]
    before[2:] = [
        {"role": "tool", "tool_call_id": call_id, "content": f"of {call_id}"}
        for call_id in ("call_3", "call_1", "call_2")
    ]
    bare = templates.tokenizer_with(templates.BARE)
    messages = template_messages(before, bare)
    assert [message["role"] for message in messages] == ["user", *["assistant", "tool"] * 3]
    assert [message["content"] for message in messages[2::2]] == ["of call_1", "of call_2", "of call_3"]
    text = bare.render(messages, tools=[tool()], add_generation_prompt=True)
    assert text.count('{"name": "weather", "parameters": {"city"') == 3
    assert len(template_messages(before, HERMES)) == 5


def test_what_a_model_writes_comes_back_to_it_as_it_was() -> None:
    from tercet.engine.request import Completion, Usage

    for style, template in templates.ALL.items():
        tokenizer = templates.tokenizer_with(template)
        plan = plan_tools(read_tools([tool()]), tokenizer)
        written = tokenizer.render(template_messages(conversation(), tokenizer)[:2], tools=plan.tools)
        text = (
            written[written.rindex("Rain?<|end|>") + 12 :]
            .replace("<|assistant|>", "")
            .removesuffix("<|end|>")
        )
        answer = plan.read(Completion(text, [], None, Usage(1, 1), "stop", 0.0))
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
            ("weather", {"city": "Köln"})
        ], style
        assert answer.content is None


def test_the_defaults_are_those_of_a_request_without_tools() -> None:
    assert read_tools(None) == ToolRequest()
