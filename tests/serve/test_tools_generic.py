"""Tools on a template without a format for them, in all three protocols, whole and streamed; and reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import tool_templates as templates
from scripted_server import ScriptedServer, serve_script

SCHEMA = {
    "type": "object",
    "properties": {"item": {"enum": ["Brot", "Milch"]}, "count": {"enum": [1, 2]}},
    "required": ["item", "count"],
}
SAYS = '{"name": "order", "arguments": {"item": "Brot", "count": 2}}'
ARGUMENTS = {"item": "Brot", "count": 2}
PROTOCOLS = ("chat", "responses", "messages")
# Roles of this template must alternate, and it refuses others.
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The script begins behind "<|assistant|>", so it repeats the rest of the prompt.
THOUGHT = "<think>\n"
THINKS = templates.PLAIN.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")


class Asker:
    """Asks one server in any protocol, and returns text and calls in one form."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)

    def __call__(
        self, protocol: str, stream: bool, choice: str = "auto"
    ) -> tuple[str, list[tuple[str, Any]]]:
        return getattr(self, protocol)(stream, choice)

    def chat(self, stream: bool, choice: str) -> tuple[str, list[tuple[str, Any]]]:
        function = {"name": "order", "parameters": SCHEMA}
        fields: Any = {
            "model": "scripted",
            "messages": [{"role": "user", "content": "Bread?"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": choice,
            "max_tokens": 300,
            "extra_body": {"temperature": 0},
        }
        if stream:
            with self.openai.chat.completions.stream(**fields) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = self.openai.chat.completions.create(**fields).choices[0].message
        calls = [
            (call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []
        ]
        return message.content or "", calls

    def responses(self, stream: bool, choice: str) -> tuple[str, list[tuple[str, Any]]]:
        fields: Any = {
            "model": "scripted",
            "input": "Bread?",
            "tools": [{"type": "function", "name": "order", "parameters": SCHEMA, "strict": False}],
            "tool_choice": choice,
            "max_output_tokens": 300,
            "extra_body": {"temperature": 0},
        }
        if stream:
            with self.openai.responses.stream(**fields) as events:
                response: Any = events.get_final_response()
        else:
            response = self.openai.responses.create(**fields)
        calls = [
            (item.name, json.loads(item.arguments))
            for item in response.output
            if item.type == "function_call"
        ]
        return response.output_text, calls

    def messages(self, stream: bool, choice: str) -> tuple[str, list[tuple[str, Any]]]:
        fields: Any = {
            "model": "scripted",
            "messages": [{"role": "user", "content": "Bread?"}],
            "tools": [{"name": "order", "input_schema": SCHEMA}],
            "tool_choice": {"type": {"required": "any"}.get(choice, choice)},
            "max_tokens": 300,
            "extra_body": {"temperature": 0},
        }
        if stream:
            with self.anthropic.messages.stream(**fields) as events:
                message = events.get_final_message()
        else:
            message = self.anthropic.messages.create(**fields)
        text = "".join(block.text for block in message.content if block.type == "text")
        return text, [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def asker_of(template: str) -> Iterator[Asker]:
    with serve_script(templates.tokenizer_with(template)) as server:
        yield Asker(server)


@pytest.fixture(scope="module", params=["plain", "alternate"])
def ask(request: pytest.FixtureRequest) -> Iterator[Asker]:
    yield from asker_of({"plain": templates.PLAIN, "alternate": ALTERNATE}[request.param])


@pytest.fixture(scope="module")
def thinker() -> Iterator[Asker]:
    yield from asker_of(THINKS)


EVERY_WAY = pytest.mark.parametrize(
    ("protocol", "stream"), [(protocol, stream) for protocol in PROTOCOLS for stream in (False, True)]
)


@EVERY_WAY
def test_an_answer_that_begins_as_a_call_is_one(ask: Asker, protocol: str, stream: bool) -> None:
    ask.server.says(SAYS)
    assert ask(protocol, stream) == ("", [("order", ARGUMENTS)])
    assert f'{{"name": "order", "parameters": {json.dumps(SCHEMA)}}}' in ask.server.prompt()


@EVERY_WAY
def test_an_answer_in_words_is_text(ask: Asker, protocol: str, stream: bool) -> None:
    for text in ("Fresh bread.", '{"bread": "fresh"}', f"I write {SAYS}"):
        ask.server.says(text)
        assert ask(protocol, stream) == (text, [])


@EVERY_WAY
def test_a_model_that_talks_must_call(ask: Asker, protocol: str, stream: bool) -> None:
    ask.server.says("Fresh bread." + "x" * 200)
    text, calls = ask(protocol, stream, "required")
    assert text == "" and [name for name, _ in calls] == ["order"]
    assert set(calls[0][1]) == {"item", "count"}


@EVERY_WAY
def test_a_call_that_begins_is_held_to_its_schema(ask: Asker, protocol: str, stream: bool) -> None:
    ask.server.says(SAYS.replace("2", '"two"'))
    _, [(name, arguments)] = ask(protocol, stream)
    assert name == "order" and arguments["count"] in (1, 2)


def test_calls_and_results_go_back_in_a_valid_order_of_roles(ask: Asker) -> None:
    ask.server.says("Done.")
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "order", "arguments": json.dumps(ARGUMENTS)}}
        for call_id in ("a", "b")
    ]
    messages: Any = [
        {"role": "user", "content": "Bread?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "ordered"},
        {"role": "tool", "tool_call_id": "b", "content": "sold out"},
    ]
    function = {"name": "order", "parameters": SCHEMA}
    for tools in ([{"type": "function", "function": function}], openai.NOT_GIVEN):
        answer = ask.openai.chat.completions.create(
            model="scripted", messages=messages, tools=tools, temperature=0
        )
        assert answer.choices[0].message.content == "Done."
        prompt = ask.server.prompt()
        assert f"<|assistant|>{SAYS}\n{SAYS}<|end|>" in prompt
        assert "<|user|>order returned:\nordered\norder returned:\nsold out" in prompt


@EVERY_WAY
def test_a_call_in_reasoning_that_the_prompt_opened_is_none(
    thinker: Asker, protocol: str, stream: bool
) -> None:
    thinker.server.says(f"{THOUGHT}{SAYS} is one way.\n</think>\n\nNo bread.")
    assert thinker(protocol, stream) == (f"{SAYS} is one way.\n</think>\n\nNo bread.", [])
    thinker.server.says(f"{THOUGHT}{SAYS} is one way.\n</think>\n\n{SAYS}")
    text, calls = thinker(protocol, stream)
    assert calls == [("order", ARGUMENTS)] and text.rstrip().endswith("</think>")
    thinker.server.says(f"{THOUGHT}{SAYS} is one way.")
    assert thinker(protocol, stream) == (f"{SAYS} is one way.", [])


@EVERY_WAY
def test_a_model_that_must_call_does_so_without_reasoning(
    thinker: Asker, protocol: str, stream: bool
) -> None:
    thinker.server.says(THOUGHT + "Let me think. " * 10)
    text, calls = thinker(protocol, stream, "required")
    assert text == "" and [name for name, _ in calls] == ["order"]
