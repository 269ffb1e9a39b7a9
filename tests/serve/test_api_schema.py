"""schemathesis over the OpenAPI document: no generated request gets a 5xx or an undocumented status."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


OPERATIONS = [
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/embeddings"),
    ("post", "/v1/responses"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/tokenizer_info"),
    ("get", "/health"),
    ("get", "/metrics"),
]


# Refused whenever they are set; with them hardly any request would reach the model.
REFUSED = (
    "audio", "chat_template_kwargs", "function_call", "functions", "logit_bias", "modalities", "moderation",
    "reasoning_effort", "stream_options", "suffix", "tools", "tool_choice", "top_logprobs", "verbosity",
    "web_search_options",
)  # fmt: skip


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_sent_is_answered_as_documented(tiny_url: str, method: str, path: str) -> None:
    """Each body is sent twice: the second names an existing model and sets no field that is always refused."""
    operation = schemathesis.openapi.from_url(f"{tiny_url}/openapi.json")[path][method]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=30)
        if method == "post" and isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name not in REFUSED}
            case.body["model"] = "tiny"
            case.call_and_validate(checks=CHECKS, timeout=30)

    send()


def test_every_route_and_its_errors_are_documented(tiny_url: str) -> None:
    document = httpx.get(f"{tiny_url}/openapi.json").json()
    expected = {
        "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
        "/v1/responses", "/v1/messages", "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/metrics",
    }  # fmt: skip
    assert expected <= set(document["paths"]) and not any(
        path.startswith("/page") for path in document["paths"]
    )
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "4XX"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"], path
