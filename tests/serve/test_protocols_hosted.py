"""Anthropic's and OpenAI's newer protocol in front of a server that speaks only chat completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fake_openai_server import DONE, FakeServer, chunk, error, event, spoken, stream, usage_chunk
from running_server import serve_models

from tercet.model.reference import parse_reference
from tercet.prompt.hosted import HostedModel
from tercet.serve.models import Models, Served

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def far() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def url(far: FakeServer) -> Iterator[str]:
    hosted = HostedModel(parse_reference(far.reference), retries=0)
    with serve_models(Models([Served("far", hosted=hosted)])) as running:
        yield running.url


@pytest.fixture
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@pytest.fixture
def gpt(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def call_stream() -> Any:
    def piece(**call: Any) -> bytes:
        choice = {"index": 0, "delta": {"tool_calls": [{"index": 0, **call}]}, "finish_reason": None}
        return event(
            {
                "id": "c1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "small",
                "choices": [choice],
            }
        )

    return stream(
        chunk("Let me look."),
        piece(id="call_7", type="function", function={"name": "weather", "arguments": ""}),
        piece(function={"arguments": '{"city": '}),
        piece(function={"arguments": '"Bonn"}'}),
        chunk(finish="tool_calls"),
        usage_chunk(),
        DONE,
    )  # fmt: skip


def test_a_message_goes_there_as_a_chat_completion_and_comes_back_as_a_message(
    far: FakeServer, claude: anthropic.Anthropic
) -> None:
    far.script += [call_stream(), spoken("Rain", ".")]
    request: Any = {
        "model": "far",
        "max_tokens": 50,
        "system": "Be brief.",
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"],
        "extra_body": {"top_k": 5},
    }
    first = claude.messages.create(**request, messages=[{"role": "user", "content": "Hi"}])
    text, call = first.content
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.id, call.input) == ("call_7", {"city": "Bonn"})
    assert (first.stop_reason, first.usage.input_tokens, first.usage.output_tokens) == ("tool_use", 7, 3)
    body = far.bodies()[0]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert body["tools"][0]["function"] == {"name": "weather", "parameters": SCHEMA}
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (body["max_tokens"], body["stop"], body["top_k"]) == (50, ["END"], 5)
    assert body["parallel_tool_calls"] is False and body["model"] == "small"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    messages: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    with claude.messages.stream(model="far", max_tokens=50, messages=messages) as streamed:
        assert "".join(streamed.text_stream) == "Rain."
    sent = far.bodies()[1]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert sent[2] == {"role": "tool", "tool_call_id": "call_7", "content": "rain"}


def test_a_response_is_passed_on_as_a_chat_completion_too(far: FakeServer, gpt: openai.OpenAI) -> None:
    far.script += [call_stream(), spoken('{"city": "Bonn"}', finish="length")]
    tool: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    with gpt.responses.stream(model="far", input="Hi", tools=[tool], instructions="Be brief.") as streamed:
        final = streamed.until_done().get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.usage is not None and final.usage.total_tokens == 10
    assert far.bodies()[0]["tools"][0]["function"]["strict"] is True
    form: Any = {"type": "json_schema", "name": "where", "schema": SCHEMA, "strict": True}
    response = gpt.responses.create(model="far", input="Hi", text={"format": form}, max_output_tokens=9)
    assert response.status == "incomplete" and json.loads(response.output_text) == {"city": "Bonn"}
    body = far.bodies()[1]
    assert body["response_format"]["json_schema"] == {"name": "where", "schema": SCHEMA, "strict": True}
    assert body["max_tokens"] == 9


def test_errors_of_the_other_server_have_each_protocols_shape(
    far: FakeServer, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    far.script += [error(429, "slow down", retry_after="7"), error(400, "no such thing"), error(500, "oh")]
    with pytest.raises(anthropic.RateLimitError) as limited:
        claude.messages.create(model="far", max_tokens=5, messages=messages)
    assert limited.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.BadRequestError, match="no such thing"):
        gpt.responses.create(model="far", input="Hi")
    with pytest.raises(anthropic.InternalServerError):
        claude.messages.create(model="far", max_tokens=5, messages=messages)


def test_an_answer_that_breaks_off_is_an_error_in_the_stream(
    far: FakeServer, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    far.script += [stream(chunk("Hel"))] * 2
    with pytest.raises(anthropic.APIError, match="middle of the answer"):
        list(claude.messages.create(model="far", max_tokens=5, messages=messages, stream=True))
    last = list(gpt.responses.create(model="far", input="Hi", stream=True))[-1]
    assert last.type == "response.failed" and last.response.error is not None
    assert "middle of the answer" in last.response.error.message


def test_features_that_need_a_local_model_are_refused(
    claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(anthropic.BadRequestError, match="another server"):
        claude.messages.count_tokens(model="far", messages=messages)
    with pytest.raises(openai.BadRequestError, match="not passed on"):
        gpt.responses.create(model="far", input="Hi", include=["message.output_text.logprobs"])
