"""Tools as text for templates without a format: every template shows all of them, and roles stay valid."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tercet.data.generic_tools import call_text, generic_tools, has_tools, tools_text
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
# The rule of Llama 2, Mistral 7B and Zephyr.
ALTERNATE = (
    "{% if messages[0].role == 'system' %}({{ messages[0].content }}){% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "[{{ m.role }}]{{ m.content.strip() }}{% endfor %}"
)
# The rule of Gemma 2.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATE
ROLES_LEFT_OUT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}"
    "{% endif %}{% endfor %}"
)
EVERY = [PLAIN, ALTERNATE, NO_SYSTEM, ROLES_LEFT_OUT]

TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "the height of the tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
        "strict": True,
    },
}


def tokenizer_with(template: str) -> Tokenizer:
    import tokenizers
    from tokenizers import models

    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0}, "</s>"))
    return Tokenizer.from_backend(backend, eos="</s>", chat_template=template)


def call(call_id: str, arguments: Any, name: str = "tide") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How high at Brest and Malo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("1", '{"port": "Brest"}'), call("2", {"port": "Malo"})],
    },
    {"role": "tool", "tool_call_id": "2", "content": "3 m"},
    {"role": "tool", "tool_call_id": "1", "content": "5 m"},
    {"role": "assistant", "content": "5 m and 3 m"},
    {"role": "user", "content": "And tomorrow?"},
]


@pytest.mark.parametrize("template", EVERY)
def test_every_template_shows_functions_calls_and_results_in_their_order(template: str) -> None:
    tokenizer = tokenizer_with(template)
    text = tokenizer.render(generic_tools(tokenizer, CONVERSATION, [TIDE]))
    shown = [
        "Be brief.",
        '{"name": "tide", "description": "the height of the tide", "parameters": ',
        "How high",
        '{"name": "tide", "arguments": {"port": "Brest"}}\n{"name": "tide", "arguments": {"port": "Malo"}}',
        "tide returned:\n3 m\ntide returned:\n5 m\n\nNow answer in words",
        "5 m and 3 m",
        "And tomorrow?",
    ]
    places = [text.find(part) for part in shown]
    assert -1 not in places and places == sorted(places)
    assert "strict" not in text


def test_calls_and_results_keep_the_order_of_user_and_assistant() -> None:
    messages = generic_tools(tokenizer_with(PLAIN), CONVERSATION, None)
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert all(message.keys() == {"role", "content"} for message in messages)
    assert messages[0]["content"] == "Be brief."  # no functions: their description is left out


def test_a_question_after_a_result_is_the_same_message() -> None:
    conversation = [*CONVERSATION[:5], {"role": "user", "content": "In feet?"}]
    messages = generic_tools(tokenizer_with(ALTERNATE), conversation, [TIDE])
    assert messages[-1]["content"] == "tide returned:\n3 m\ntide returned:\n5 m\nIn feet?"


def test_a_call_after_text_stands_on_its_own_line() -> None:
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": "", "tool_calls": [call("1", "{}")]},
    ]
    messages = generic_tools(tokenizer_with(PLAIN), conversation, None)
    assert messages[-1] == {"role": "assistant", "content": 'I look.\n{"name": "tide", "arguments": {}}'}


def test_messages_of_one_role_without_calls_stay_apart() -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    messages = generic_tools(tokenizer_with(PLAIN), conversation, [TIDE])
    assert [message["role"] for message in messages] == ["system", "user", "user"]
    assert not has_tools(conversation, []) and has_tools(conversation, [TIDE])


@pytest.mark.parametrize("template", [NO_SYSTEM, ROLES_LEFT_OUT])
def test_the_system_text_opens_the_first_user_message_where_the_template_has_no_system(template: str) -> None:
    messages = generic_tools(tokenizer_with(template), CONVERSATION, [TIDE])
    assert messages[0]["role"] == "user"
    assert messages[0]["content"] == f"Be brief.\n\n{tools_text([TIDE])}\n\nHow high at Brest and Malo?"


def test_a_description_of_functions_is_json_of_each_on_a_line() -> None:
    bare = {"name": "now", "parameters": None}
    lines = [line for line in tools_text([TIDE, bare]).splitlines() if line.startswith('{"name": "')]
    first, second, example = map(json.loads, lines)
    assert first["parameters"] == TIDE["function"]["parameters"]
    assert second == {"name": "now", "parameters": {"type": "object", "properties": {}}}
    assert example.keys() == json.loads(call_text("f", {})).keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call("1", "{port"), r"messages\[0\].tool_calls\[0\].function.arguments is not JSON"),
        (call("1", "[1]"), "must be a JSON object"),
        ({"id": "1", "function": {"arguments": "{}"}}, "has no function.name"),
        ("tide", "has no function.name"),
    ],
)
def test_a_call_that_cannot_be_shown_is_refused_with_its_place(wrong: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generic_tools(tokenizer_with(PLAIN), [{"role": "assistant", "tool_calls": [wrong]}], None)
