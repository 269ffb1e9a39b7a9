"""Errors of requests: OpenAI's shape, the field's path, and no field is silently ignored."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
from running_server import client_of

HI = [{"role": "user", "content": "hi"}]
MISSING, UNSUPPORTED = "missing_required_parameter", "unsupported_parameter"


def form(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


@pytest.fixture
def client(tiny_url: str) -> openai.OpenAI:
    return client_of(tiny_url)


def request_error(
    url: str, path: str = "/v1/chat/completions", status: int = 400, **body: Any
) -> dict[str, Any]:
    """Return the error that a body gets."""
    request = {"model": "tiny"} | ({"messages": HI} if path.endswith("chat/completions") else {}) | body
    answer = httpx.post(url + path, json=request, timeout=20)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", MISSING),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", MISSING),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", MISSING),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", MISSING),
        ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", MISSING),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": []}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format.json_schema", "invalid_value",
        ),
        (form(name="a b", schema={}), "response_format.json_schema.name", "invalid_value"),
        (form(name="a"), "response_format.json_schema.schema", MISSING),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"no_such_field": 1}, "no_such_field", "unknown_parameter"),
        ({"model": 3}, "model", "invalid_type"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_400_with_its_place(
    tiny_url: str, body: dict[str, Any], param: str, code: str
) -> None:
    error = request_error(tiny_url, **body)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x", "format": "mp3"}),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("moderation", {"model": "m"}),
        ("skip_special_tokens", False),
        ("min_tokens", 5),
    ],
)
def test_an_unsupported_field_that_would_change_the_answer_is_400(
    tiny_url: str, field: str, value: Any
) -> None:
    error = request_error(tiny_url, **{field: value})
    assert (error["param"], error["code"]) == (field, UNSUPPORTED)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_part_that_is_not_text_is_400(tiny_url: str, kind: str) -> None:
    content = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "http://127.0.0.1:1/x.png"}}]
    error = request_error(tiny_url, messages=[{"role": "user", "content": content}])
    assert error["param"] == "messages[0].content[1]" and kind in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"a": "b"}), ("store", True), ("service_tier", "flex"), ("user", "u"),
        ("safety_identifier", "s"), ("prompt_cache_key", "k"), ("prompt_cache_retention", "24h"),
        ("prediction", {"type": "content", "content": "x"}), ("verbosity", "medium"), ("modalities", ["text"]),
        ("parallel_tool_calls", True), ("tool_choice", "auto"),
    ],
)  # fmt: skip
def test_a_field_that_changes_no_answer_is_accepted(tiny_url: str, field: str, value: Any) -> None:
    body = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 4}
    plain = httpx.post(f"{tiny_url}/v1/chat/completions", json=body, timeout=20).json()
    answer = httpx.post(f"{tiny_url}/v1/chat/completions", json=body | {field: value}, timeout=20).json()
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:1/schema.json"},
    ],
)
def test_a_schema_that_can_not_be_enforced_is_400_never_an_answer(
    tiny_url: str, schema: dict[str, Any]
) -> None:
    error = request_error(tiny_url, **form(name="a", schema=schema))
    assert error["param"] == "response_format.json_schema.schema" and error["code"] == "invalid_json_schema"


def test_a_schema_nested_without_end_is_400(tiny_url: str) -> None:
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    body = {"model": "tiny", "messages": HI, **form(name="a", schema=schema), "max_tokens": 2}
    assert httpx.post(f"{tiny_url}/v1/chat/completions", json=body, timeout=60).status_code in (200, 400)
    deep = '{"model": "tiny", "messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    answer = httpx.post(
        f"{tiny_url}/v1/chat/completions", content=deep, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "\\ud800"}', b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"\\ud800": 1}}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_400_in_shape(tiny_url: str, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        answer = httpx.post(tiny_url + path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404), (path, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_its_content_type_is_400(tiny_url: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HI}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = httpx.post(f"{tiny_url}/v1/chat/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 400 and "content-type" in answer.json()["error"]["message"]


def test_too_long_a_conversation_is_400_with_the_counts(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "x" * 200}]
    with pytest.raises(openai.BadRequestError) as problem:
        client.chat.completions.create(model="tiny", messages=long)
    assert (problem.value.code, problem.value.param) == ("context_length_exceeded", "messages")
    assert "96 tokens" in str(problem.value) and "204 tokens" in str(problem.value)
    with pytest.raises(openai.BadRequestError) as problem:
        client.completions.create(model="tiny", prompt="x" * 97)
    assert (problem.value.code, problem.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 96"):
        client.embeddings.create(model="tiny", input="x" * 97)


def test_errors_become_the_exceptions_of_openais_client(client: openai.OpenAI) -> None:
    messages: Any = HI
    with pytest.raises(openai.NotFoundError, match="nearest: tiny") as missing:
        client.chat.completions.create(model="tyni", messages=messages)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such/model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=messages, temperature=3)
    assert wrong.value.param == "temperature" and wrong.value.request_id is not None
    assert wrong.value.request_id.startswith("req_")


def test_unknown_routes_and_methods_have_the_errors_shape(tiny_url: str) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("GET", "/docs", 404),
    ):
        answer = httpx.request(method, tiny_url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/api/responses", "/v1/responses"),
        ("/v1/tokenize", "/tokenize"),
        ("/models", "/v1/models"),
    ],
)
def test_a_path_that_is_nearly_right_is_answered_with_the_right_one(
    tiny_url: str, path: str, right: str
) -> None:
    answer = httpx.post(tiny_url + path, json={"model": "tiny"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
    assert answer.json()["error"]["message"].endswith(f"POST {path}; send it to {right}")
    assert "send it to" not in httpx.post(f"{tiny_url}/v1/audio/speech").text


def test_a_head_request_gets_the_headers_of_get(tiny_url: str) -> None:
    for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404)):
        head, get = httpx.head(tiny_url + path), httpx.get(tiny_url + path)
        assert (head.status_code, head.content) == (status, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers["content-length"] == get.headers["content-length"]
