"""Conversations in an order that a chat template refuses, or of which it leaves a part out."""

from __future__ import annotations

from typing import Any

import pytest
import tool_templates as templates

from tercet.data.chat_mask import mask_conversation
from tercet.data.prompt_tokens import conversation_text, conversation_tokens
from tercet.data.turns import arrange
from tercet.errors import UserError

# As Mistral's and Gemma's: the roles must alternate, and only the first message may be of the system.
ALTERNATING = (
    "{% if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)
# Leaves every system message out but the first.
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>"
)
AGENT = [("system", "Be brief."), ("user", "a"), ("system", "The day is Monday."), ("user", "b")]


def conversation(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def rendered(template: str, *turns: tuple[str, str]) -> str:
    tokenizer = templates.tokenizer_with(template)
    return tokenizer.decode(conversation_tokens(tokenizer, conversation(*turns)), skip_special=False)


def test_a_template_that_shows_every_turn_gets_the_conversation_as_it_is() -> None:
    assert rendered(templates.PLAIN, *AGENT) == (
        "<|system|>Be brief.<|end|><|user|>a<|end|><|system|>The day is Monday.<|end|><|user|>b<|end|><|assistant|>"
    )


@pytest.mark.parametrize("template", [ALTERNATING, FIRST_SYSTEM])
def test_the_other_templates_get_one_system_message_and_joined_turns(template: str) -> None:
    assert rendered(template, *AGENT) == (
        "<|system|>Be brief.\n\nThe day is Monday.<|user|>a\n\nb<|assistant|>"
    )


def test_a_developer_message_in_the_middle_is_a_system_message_too() -> None:
    assert rendered(ALTERNATING, ("user", "a"), ("developer", "x")) == "<|system|>x<|user|>a<|assistant|>"


def test_calls_results_and_named_turns_are_never_joined() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
    ]
    assert arrange(messages) == messages


def test_what_a_template_refuses_in_either_order_is_refused_for_its_own_order() -> None:
    template = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}"
    tokenizer = templates.tokenizer_with(template)
    with pytest.raises(UserError, match="no assistant"):
        conversation_tokens(tokenizer, conversation(("user", "a"), ("assistant", "b"), ("system", "c")))


@pytest.mark.parametrize("template", [ALTERNATING, FIRST_SYSTEM])
def test_a_training_row_is_arranged_as_a_prompt_is(template: str) -> None:
    asked = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    template = template.replace("{{ m.content }}{%", "{{ m.content }}<|end|>{%").replace(
        "<|assistant|>", asked
    )
    tokenizer = templates.tokenizer_with(template)
    messages = conversation(*AGENT, ("assistant", "c"), ("system", "Now."), ("user", "d"), ("assistant", "e"))
    texts = mask_conversation(tokenizer, messages)
    pairs = [
        (text.text[: span.start], text.text[span.start : span.end]) for text in texts for span in text.spans
    ]
    assert pairs == [
        (conversation_text(tokenizer, messages[:4]), "c<|end|>"),
        (conversation_text(tokenizer, messages[:7]), "e<|end|>"),
    ]
    assert "Monday." in pairs[0][0] and "Now." in pairs[1][0] and "Now." not in pairs[0][0]
