"""Conversations in the forms that programs and data sets write are read into one form, or refused with the place."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.data.conversation import ConversationError, read_messages, read_tools, text_of

CALL = {"type": "function", "function": {"name": "dice", "arguments": '{"sides": 6}'}}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": "a", "name": ""}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": "a", "name": "Ann"}, {"role": "user", "content": "a", "name": "Ann"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": [{"text": "a", "image": None}]}, {"role": "user", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "assistant", "reasoning": "hm", "tool_calls": None},
            {"role": "assistant", "content": None, "reasoning": "hm"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1", "index": 0}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "dice", "arguments": {"sides": 6}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "dice", "arguments": {"sides": 6}}}],
            },
        ),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "dice", "arguments": ""}},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "dice", "arguments": {}}}],
            },
        ),
        (
            {"role": "function", "name": "dice", "content": "4"},
            {"role": "tool", "name": "dice", "content": "4"},
        ),
        ({"role": "user", "content": "a", "mood": "calm"}, {"role": "user", "content": "a", "mood": "calm"}),
    ],
)
def test_a_message_is_read_into_one_form(message: dict[str, Any], read: dict[str, Any]) -> None:
    assert read_messages([message]) == [read]
    assert read_messages([read]) == [read]


@pytest.mark.parametrize(
    ("message", "place", "problem"),
    [
        ("hi", "messages[0]", "is a str"),
        ({"content": "a"}, "messages[0]", "has no role"),
        ({"role": "user"}, "messages[0]", "has no content"),
        ({"role": "user", "content": None}, "messages[0]", "has no content"),
        ({"role": "guest", "content": "a"}, "messages[0]", "has the role 'guest'"),
        ({"role": "user", "content": 3}, "messages[0] content", "is a int"),
        ({"role": "user", "content": []}, "messages[0].content", "empty list"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]", "is a str"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0].type",
            "text parts only",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "must be a string"),
        ({"role": "user", "content": "a", "name": 3}, "messages[0].name", "must be a string"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages[0].tool_calls", "role assistant"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls", "must be a list"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]", "has no function.name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "is not JSON",
        ),
        ({"role": "assistant", "content": "", "thinking": True}, "messages[0].thinking", "must be a string"),
    ],
)
def test_a_mistake_is_refused_with_its_place(message: Any, place: str, problem: str) -> None:
    with pytest.raises(ConversationError) as caught:
        read_messages([message])
    assert caught.value.place == place and problem in caught.value.problem
    assert str(caught.value).startswith(place)


def test_a_role_that_the_template_names_is_read() -> None:
    [message] = read_messages([{"role": "critic", "content": "a"}], template="{% if m.role == 'critic' %}")
    assert message["role"] == "critic"


def test_the_text_of_a_message_joins_its_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of({"content": parts}) == "a\nb"
    assert [text_of({"content": content}) for content in ("a", None)] == ["a", ""]


SHOWN = {"name": "dice", "description": "d", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": SHOWN}],
        [{"type": "function", "function": {**SHOWN, "strict": True, "parameters": None}}],
        [SHOWN],
        [{"type": "function", **SHOWN}],
        '[{"name": "dice", "description": "d"}]',
        ['{"parameters": {"type": "object", "properties": {}}, "description": "d", "name": "dice"}'],
        [{**SHOWN, "parameters": '{"type": "object", "properties": {}}'}],
    ],
)
def test_functions_are_read_in_every_usual_shape(tools: Any) -> None:
    [tool] = read_tools(tools) or []
    assert tool == {"type": "function", "function": SHOWN}
    assert list(tool["function"]) == ["name", "description", "parameters"]


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_functions_are_none(tools: Any) -> None:
    assert read_tools(tools) is None


@pytest.mark.parametrize(
    ("tools", "line"),
    [
        ("[", "tools is not JSON"),
        ({"name": "f"}, "tools is a dict"),
        ([{"type": "web_search"}], r"tools\[0\] must be a tool of type function"),
        ([{"description": "d"}], r"tools\[0\] has no function.name"),
        ([{"name": "f", "parameters": [1]}], r"tools\[0\].parameters must be a JSON Schema"),
    ],
)
def test_other_tools_are_refused_with_the_place(tools: Any, line: str) -> None:
    with pytest.raises(ConversationError, match=line):
        read_tools(tools)
