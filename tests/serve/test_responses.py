"""/v1/responses through the openai client, whose own accumulator joins the streams."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tool_templates as templates
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel
from scripted_server import ScriptedServer, serve_script

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.HERMES)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ScriptedServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(model="scripted", **({"input": "Hi", "temperature": 0} | fields))


def events_of(client: openai.OpenAI, **fields: Any) -> list[Any]:
    return list(ask(client, stream=True, **fields))


# Text


def test_the_usage_counts_the_tokens_of_the_prefix_cache(
    server: ScriptedServer, client: openai.OpenAI
) -> None:
    server.says("Yes.")
    cached = [
        ask(client, input="the same long question " * 9).usage.input_tokens_details.cached_tokens
        for _ in "ab"
    ]
    assert cached[0] < cached[1]


def test_a_text_is_answered_with_a_message(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says("Hello, wörld.")
    response = ask(client, metadata={"a": "b"}, max_output_tokens=50)
    assert response.output_text == "Hello, wörld."
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.metadata == {"a": "b"} and response.max_output_tokens == 50
    assert response.temperature == 0 and response.store is False
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage) and message.status == "completed"
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens == len("Hello, wörld.".encode()) + 1


def test_input_items_and_instructions_are_the_conversation(
    server: ScriptedServer, client: openai.OpenAI
) -> None:
    server.says("ok")
    items: list[Any] = [
        {"role": "user", "content": "one"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two", "annotations": []}],
        },
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "thr"}, {"type": "input_text", "text": "ee"}],
        },
    ]
    ask(client, input=items, instructions="Be brief.")
    assert server.prompt() == (
        "<|system|>Be brief.<|end|><|user|>one<|end|><|assistant|>two<|end|><|user|>thr\nee<|end|><|assistant|>"
    )


def test_an_answer_that_is_cut_off_is_incomplete(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says("a long answer")
    response = ask(client, max_output_tokens=6)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "a long" and response.output[0].status == "incomplete"
    last = events_of(client, max_output_tokens=6)[-1]
    assert last.type == "response.incomplete" and last.response.output_text == "a long"


def test_a_stream_has_the_events_of_openai_in_their_order(
    server: ScriptedServer, client: openai.OpenAI
) -> None:
    server.says("abc")
    events = events_of(client)
    # A busy server joins pieces.
    assert [kind for kind, _ in itertools.groupby(event.type for event in events)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len({event.item_id for event in events[3:-2]}) == 1
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    whole = events[-1].response
    assert whole.id == events[0].response.id and whole.output_text == "abc"
    server.says("abc")
    plain = ask(client)
    same = {"id", "created_at", "completed_at", "output"}
    assert whole.model_dump(exclude=same) == plain.model_dump(exclude=same)


def test_an_empty_answer_is_an_empty_message(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says("")
    assert ask(client).output_text == ""
    assert [item.type for item in ask(client).output] == ["message"]


def test_the_clients_accumulator_replays_a_stream(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says("Let me look.\n" + CALL + "\n" + CALL.replace("Köln", "Bonn"))
    with client.responses.stream(model="scripted", input="Hi", tools=[TOOL], temperature=0) as stream:  # type: ignore[list-item]
        snapshots = [
            event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"
        ]
        final = stream.get_final_response()
    assert snapshots[-1] == '{"city": "Bonn"}'
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final.output_text == "Let me look."


# Tools


def test_a_call_is_an_item_of_its_own(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says(CALL)
    response = ask(client, tools=[TOOL])
    (item,) = response.output
    assert isinstance(item, ResponseFunctionToolCall)
    assert (item.name, item.arguments, item.status) == ("weather", '{"city": "Köln"}', "completed")
    assert response.status == "completed" and response.tools[0].name == "weather"
    events = [event.type for event in events_of(client, tools=[TOOL])]
    assert events[2] == "response.output_item.added"
    assert events[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert set(events[3:-3]) == {"response.function_call_arguments.delta"}


def test_calls_and_their_outputs_come_back_as_the_model_wrote_them(
    server: ScriptedServer, client: openai.OpenAI
) -> None:
    server.says(CALL)
    first = ask(client, tools=[TOOL])
    server.says("Rain.")
    call = first.output[0]
    items = [
        {"role": "user", "content": "Hi"},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    assert ask(client, input=items, tools=[TOOL]).output_text == "Rain."
    assert CALL in server.prompt() and "<|tool|>rain<|end|><|assistant|>" in server.prompt()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_model_that_would_not_call_is_made_to(
    server: ScriptedServer, client: openai.OpenAI, choice: Any
) -> None:
    server.says("I would rather talk about something else, for a while at least.")
    response = ask(client, tools=[TOOL], tool_choice=choice, max_output_tokens=400)
    call = response.output[0]
    assert call.type == "function_call"
    assert response.status == "incomplete" or set(json.loads(call.arguments)) == {"city"}


def test_one_call_at_most_where_they_may_not_be_parallel(
    server: ScriptedServer, client: openai.OpenAI
) -> None:
    server.says(CALL + "\n" + CALL)
    assert len(ask(client, tools=[TOOL], parallel_tool_calls=False).output) == 1
    assert len(ask(client, tools=[TOOL]).output) == 2


# Forms and log-probabilities


def test_a_schema_is_kept_and_parsed(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says('{"name": "Köln", "people": 1}')
    response = client.responses.parse(model="scripted", input="Hi", text_format=City, temperature=0)
    assert response.output_parsed == City(name="Köln", people=1)
    assert response.text is not None and response.text.format is not None
    assert response.text.format.type == "json_schema"
    server.says("Kö")
    cut = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=30)
    assert cut.output_text.startswith("{")


def test_logprobs_are_those_of_the_text(server: ScriptedServer, client: openai.OpenAI) -> None:
    server.says("héy")
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(client, **options)
    logprobs = response.output[0].content[0].logprobs
    assert bytes(byte for entry in logprobs for byte in entry.bytes).decode() == "héy"
    assert all(
        math.isclose(entry.logprob, 0, abs_tol=1e-3) and len(entry.top_logprobs) == 2 for entry in logprobs
    )
    events = events_of(client, **options)
    streamed = [
        entry.token
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert streamed == [entry.token for entry in logprobs]
    assert not ask(client).output[0].content[0].logprobs


# What is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"extra_body": {"seed": 1}}, "seed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_unsupported_fields_are_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, stream=stream, **fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_the_error_for_a_prompt_that_is_too_long_contains_the_counts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"4096 tokens.* 50[0-9]{2} tokens") as caught:
        ask(client, input="x" * 5000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_stored_responses_do_not_exist(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not store responses"):
        client.responses.retrieve("resp_123")
    with pytest.raises(openai.NotFoundError, match="does not store responses"):
        client.responses.delete("resp_123")


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="scripted"):
        client.responses.create(model="scriptd", input="Hi")
