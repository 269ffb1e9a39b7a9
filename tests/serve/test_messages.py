"""/v1/messages through the anthropic client, whose own accumulator joins the streams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
import tool_templates as templates
from anthropic.types import TextBlock, ToolUseBlock
from scripted_server import ScriptedServer, serve_script

from tercet.serve.settings import Settings, hash_key

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SEARCH = {"type": "web_search_20250305", "name": "search"}
KEY = "secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    settings = Settings(keys=(hash_key(KEY),))
    with serve_script(templates.tokenizer_with(templates.HERMES), settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ScriptedServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def fields_with(fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hi"}]
    request = {"model": "scripted", "max_tokens": 500, "messages": messages} | fields
    # This client has no `temperature` any more; older versions and other languages' clients have.
    request["extra_body"] = {"temperature": 0} | fields.get("extra_body", {})
    return request


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**fields_with(fields))


# Text


def test_a_message_is_answered_with_text(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("Hello, wörld.")
    message = ask(client)
    (block,) = message.content
    assert isinstance(block, TextBlock) and block.text == "Hello, wörld."
    assert (message.role, message.type, message.model) == ("assistant", "message", "scripted")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len("Hello, wörld.".encode()) + 1


def test_a_last_message_of_the_assistant_is_continued(
    server: ScriptedServer, client: anthropic.Anthropic
) -> None:
    server.says("The colour is red.")
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The colour is"}]
    message = ask(client, messages=talk)
    assert message.content[0].text == " red."
    assert server.read() == "<|user|>Which?<|end|><|assistant|>The colour is red."
    counted = client.messages.count_tokens(model="scripted", messages=talk)
    assert counted.input_tokens == message.usage.input_tokens


def test_system_and_blocks_are_the_conversation(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("ok")
    text = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
    ask(
        client,
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        messages=[
            {"role": "user", "content": [text, {"type": "text", "text": "more"}]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
            {"role": "user", "content": "four"},  # consecutive turns are joined
        ],
    )
    assert server.prompt() == (
        "<|system|>Be\nbrief.<|end|><|user|>one\nmore<|end|><|assistant|>two<|end|>"
        "<|user|>three\nfour<|end|><|assistant|>"
    )


def test_an_answer_that_is_cut_off_says_so(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("a long answer")
    message = ask(client, max_tokens=6)
    assert (message.content[0].text, message.stop_reason) == ("a long", "max_tokens")


@pytest.mark.parametrize(
    ("stops", "text", "sequence"),
    [
        (["END", "XY"], "one XY two END", "XY"),
        (["two ", "two E"], "one XY two END", "two "),
        (["nothing"], "one", None),
        (["é"], "caféteria", "é"),
    ],
)
def test_a_stop_sequence_ends_an_answer_and_is_named(
    server: ScriptedServer, client: anthropic.Anthropic, stops: list[str], text: str, sequence: str | None
) -> None:
    server.says(text)
    message = ask(client, stop_sequences=stops)
    assert message.stop_sequence == sequence
    assert message.stop_reason == ("end_turn" if sequence is None else "stop_sequence")
    assert message.content[0].text == (text if sequence is None else text.partition(sequence)[0])


def test_a_stream_has_the_events_of_anthropic_in_their_order(
    server: ScriptedServer, client: anthropic.Anthropic
) -> None:
    server.says("abc")
    events = list(ask(client, stream=True))
    # A busy server joins pieces.
    assert [kind for kind, _ in itertools.groupby(event.type for event in events)] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.content == [] and events[0].message.stop_reason is None
    assert "".join(event.delta.text for event in events[2:-3]) == "abc"
    assert events[-2].delta.stop_reason == "end_turn" and events[-2].usage.output_tokens == 4


def test_the_clients_accumulator_builds_what_a_request_without_a_stream_gets(
    server: ScriptedServer, client: anthropic.Anthropic
) -> None:
    server.says("Let me look.\n" + CALL + "\n" + CALL.replace("Köln", "Bonn"))
    with client.messages.stream(**fields_with({"tools": [TOOL]})) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    plain = ask(client, tools=[TOOL])
    assert "".join(parts) == '{"city": "Köln"}{"city": "Bonn"}'
    assert [block.type for block in streamed.content] == ["text", "tool_use", "tool_use"]
    for block, expected in zip(streamed.content, plain.content, strict=True):
        assert block.model_dump(include={"text", "input", "name"}) == expected.model_dump(
            include={"text", "input", "name"}
        )
    assert streamed.stop_reason == plain.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == plain.usage.output_tokens


def test_an_empty_answer_has_no_blocks(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("")
    assert ask(client).content == []


# Tools


def test_calls_and_results_come_back_as_the_model_wrote_them(
    server: ScriptedServer, client: anthropic.Anthropic
) -> None:
    server.says(CALL)
    first = ask(client, tools=[TOOL])
    (call,) = first.content
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input, first.stop_reason) == ("weather", {"city": "Köln"}, "tool_use")
    server.says("Rain.")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    assert ask(client, messages=messages, tools=[TOOL]).content[0].text == "Rain."
    assert CALL in server.prompt()
    assert server.prompt().endswith("<|tool|>rain<|end|><|user|>Well?<|end|><|assistant|>")
    failed = result | {"content": "no network", "is_error": True}
    ask(client, messages=[*messages[:2], {"role": "user", "content": [failed]}], tools=[TOOL])
    assert server.prompt().endswith("<|tool|>Error: no network<|end|><|assistant|>")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_model_that_would_not_call_is_made_to(
    server: ScriptedServer, client: anthropic.Anthropic, choice: Any
) -> None:
    server.says("I would rather talk about something else, for a while at least.")
    message = ask(client, tools=[TOOL], tool_choice=choice)
    (call,) = message.content
    assert call.type == "tool_use" and call.name == "weather"


def test_no_tools_where_none_may_be_used(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says(CALL)
    message = ask(client, tools=[TOOL], tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]
    assert "<|tools|>" not in server.prompt()


def test_one_call_at_most_where_they_may_not_be_parallel(
    server: ScriptedServer, client: anthropic.Anthropic
) -> None:
    server.says(CALL + "\n" + CALL)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(client, tools=[TOOL], tool_choice=choice).content) == 1


def test_a_schema_is_kept(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("no JSON at all")
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    message = ask(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(message.content[0].text) == {"n": 7}


# Counting


def test_tokens_are_counted_as_they_are_read(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    server.says("ok")
    messages: Any = [{"role": "user", "content": "Hi there"}]
    tools: Any = [TOOL]
    count = client.messages.count_tokens(model="scripted", messages=messages, tools=tools, system="Be brief.")
    message = ask(client, messages=messages, tools=tools, system="Be brief.")
    assert count.input_tokens == message.usage.input_tokens


# What is refused


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"thread": {"type": "continue", "previous_message_id": "msg_1"}}}, "thread.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [
                {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "messages[1]",
        ),
        ({"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "search"}}, "tool_choice.name"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tools": [TOOL | {"input_schema": {"not": {}}}], "tool_choice": {"type": "any"}}, "input_schema"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"extra_body": {"seed": 1}}, "seed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_unsupported_fields_are_refused(
    client: anthropic.Anthropic, fields: dict[str, Any], place: str, stream: bool
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, stream=stream, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert place in body["error"]["message"]


def test_the_error_for_a_prompt_that_is_too_long_contains_the_counts(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"4096 tokens.* 50[0-9]{2} tokens"):
        ask(client, messages=[{"role": "user", "content": "x" * 5000}])


def test_errors_have_their_exceptions(server: ScriptedServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, model="scriptd")
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    other = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        ask(other)
