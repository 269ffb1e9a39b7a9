"""Chat templates render as transformers renders them, and cannot harm the program."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_checkpoints  # noqa: F401 - keeps transformers off the network
from tercet.errors import UserError
from tercet.model.chat_template import render_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
THEIRS = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **SPECIAL)

TEMPLATES = {
    "ChatML": """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}

    {% else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "Llama 3": """\
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{#- A comment. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '\\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}{{- call.function.arguments | tojson }}{%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | string | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "Mistral": """\
{%- set state = namespace(index=0, system=none) -%}
{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{% set state.system = message.content %}{% continue %}{% endif -%}
{%- if (message.role == 'user') != (state.index % 2 == 0) and not message.tool_calls -%}
    {{ raise_exception('roles must alternate user and assistant, message ' ~ loop.index) }}
{%- endif -%}
{%- set state.index = state.index + 1 -%}
{%- if message.role == 'user' -%}
    [INST] {{ state.system + '\\n' if state.system and loop.last else '' }}{{ message.content }} [/INST]
{%- else -%}
    {{ ' ' + (message.content or '') + eos_token }}
{%- endif -%}
{%- if loop.index > 6 %}{% break %}{% endif -%}
{% endfor %}""",
    "reasoning": """\
{% for message in messages %}{{ message.role }}{{ message.reasoning_content }}|{{ message.thinking }}
{{ message.keys() | list }} {{ message.content is none }} {{ 'absent' if message.name is not defined }}
{% endfor %}{{ documents }} {{ enable_thinking | default('unset') }} {{ tools | length if tools else 'no tools' }}""",
    "scopes": """\
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
  {% set d = dict(a=1, **{'b': [1, 2.5, true, none]}) %}
  {{ d | tojson(sort_keys=true, separators=(',', ':')) }} {{ '<é&"\\'>' | tojson }} {{ '<é>' | tojson(ensure_ascii=true) }}
{%- macro turn(m) %}<{{ m.role }}>{{ caller() if caller }}{% endmacro %}
{% call turn(messages[0]) %}inside{% endcall %}
{{ strftime_now('%Y') }} {{ missing }} {{ messages | map(attribute='role') | join(',') }}
""",
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": " Be <brief> & kind.\n"}
CALL = {
    "id": "a1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "<now> & 'later'", "parameters": {}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [user("Hi <b>&'\" there 🙂")],
    "system": [SYSTEM, user("  Hello \n")],
    "many turns": [SYSTEM, user("1"), assistant(" two "), user("3"), assistant("4\n"), user("5")],
    "many turns without system": [user("1"), assistant("2"), user("3")],
    "tools": [
        user("w?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "content": "{}"},
    ],
    "reasoning": [user("q"), assistant("a", reasoning="because"), assistant("b", thinking="so", name=None)],
    "parts": [user([{"type": "text", "text": "hi"}])],
    "no content": [{"role": "user"}],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_that_of_transformers(name: str, conversation: str) -> None:
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    compared = 0
    for prompt in (False, True):
        for tools in (None, [], [TOOL]):
            for variables in (
                {},
                {"date_string": "1 Jan 2024", "enable_thinking": False, "documents": [{"text": "x"}]},
            ):
                try:
                    expected = THEIRS.apply_chat_template(
                        messages, tools=tools, chat_template=template, add_generation_prompt=prompt, tokenize=False,
                        **variables,
                    )  # fmt: skip
                except Exception:  # a template may refuse; so must ours
                    with pytest.raises(UserError):
                        render_template(template, messages, tools, prompt, SPECIAL, **variables)
                    continue
                assert render_template(template, messages, tools, prompt, SPECIAL, **variables) == expected
                compared += 1
    refused = {("ChatML", "tools"), ("ChatML", "parts"), ("ChatML", "no content"), ("Mistral", "tools"),
               ("Mistral", "reasoning"), ("Mistral", "parts"), ("Mistral", "no content")}  # fmt: skip
    assert compared == 12 or (name, conversation) in refused


def test_messages_are_not_modified() -> None:
    messages = [user("q"), assistant(None, thinking="so")]
    render_template("{{ messages }}", messages)
    assert messages == [user("q"), assistant(None, thinking="so")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must\n alternate') }}",
            "refuses this conversation: roles must alternate",
        ),
        ("{% for %}", "chat template, line 1"),
        ("\n{% nothing %}", "chat template, line 2"),
        ("{{ messages[0].content.missing.more }}", "refuses"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ raise_exception.__globals__.os }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% set n = namespace(a=1) %}{% set n._x = 2 %}", "underscore"),
        ("{{ dict.mro() }}", "refuses"),
        ("{% include 'x' %}", "fails"),
    ],
)
def test_a_template_that_fails_gets_one_clear_line(template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        render_template(template, [user("hi")])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        (["hi"], "message 1 is a str"),
        ([user("hi"), user(object())], "message 2 contains a object"),
    ],
)
def test_an_invalid_conversation_gets_one_clear_line(messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_template("x", messages)
