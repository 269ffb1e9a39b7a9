"""Fields without an effect: taken and named in ``x-ignored``, refused by a strict server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import tool_templates as templates
from scripted_server import ScriptedServer, serve_script

from tercet.serve.api.field_table import Ignored
from tercet.serve.settings import Settings

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": WEATHER}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 9},
    "/v1/completions": {"prompt": "<|assistant|>", "max_tokens": 9},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 9},
    "/v1/messages": {"messages": HI, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/responses/input_tokens": {"input": "Hi"},
}
CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT, _ = BODIES


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.HERMES)) as server:
        server.says("Yes.")
        yield server


@pytest.fixture(scope="module")
def strict_server() -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.HERMES), Settings(strict=True)) as server:
        server.says("Yes.")
        yield server


def send(server: ScriptedServer, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "scripted", **BODIES[path], **fields}, timeout=20)


def ignored(answer: httpx.Response) -> list[str]:
    header = answer.headers.get("x-ignored", "")
    return header.split(", ") if header else []


def block(**fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": "Hi", **fields}


MARK = {"cache_control": {"type": "ephemeral"}}
IGNORED: list[tuple[str, dict[str, Any], list[str]]] = [
    (CHAT, {"metadata": {"a": "b"}}, ["metadata"]),
    (CHAT, {"user": "u", "store": True}, ["user", "store"]),
    (CHAT, {"reasoning_effort": "high"}, ["reasoning_effort"]),
    (CHAT, {"verbosity": "low"}, ["verbosity"]),
    (CHAT, {"service_tier": "flex", "prediction": {"type": "content", "content": "x"}}, ["service_tier", "prediction"]),
    (CHAT, {"stream_options": {"include_usage": True}}, ["stream_options"]),
    (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, ["stream_options.include_obfuscation"]),
    (CHAT, {"web_search_options": {}}, ["web_search_options"]),
    (CHAT, {"messages": [{"role": "user", "content": "Hi", "mood": "good"}]}, ["messages[0].mood"]),
    (CHAT, {"messages": [{"role": "user", "content": [block(**MARK)]}]}, ["messages[0].content[0].cache_control"]),
    (CHAT, {"messages": [HI[0] | {"id": "1"}, {"role": "assistant", "content": "", "id": "2"}, HI[0]]}, ["messages[].id"]),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}, CHAT_TOOL | {"x": 1}]}, ["tools[0]", "tools[1].x"]),
    (CHAT, {"keep_alive": "5m", "cache_prompt": True, "id_slot": 3}, ["id_slot", "keep_alive"]),
    (CHAT, {"provider": {"order": ["x"]}, "usage": {"include": True}}, ["provider", "usage"]),
    (COMPLETIONS, {"user": "u", "cache_salt": "x", "return_progress": True}, ["user", "cache_salt", "return_progress"]),
    (RESPONSES, {"reasoning": {"effort": "high", "summary": "auto"}}, ["reasoning.summary", "reasoning.effort"]),
    (RESPONSES, {"client_metadata": {}, "prompt_cache_options": {}}, ["client_metadata", "prompt_cache_options"]),
    (RESPONSES, {"include": ["reasoning.encrypted_content"]}, ["include[0]"]),
    (RESPONSES, {"store": True, "truncation": "auto"}, ["truncation", "store"]),
    (RESPONSES, {"text": {"verbosity": "low"}}, ["text.verbosity"]),
    (RESPONSES, {"tools": [{"type": "namespace", "name": "n", "tools": [FLAT_TOOL]}, {"type": "web_search"}]}, ["tools[]"]),
    (RESPONSES, {"tools": [FLAT_TOOL, {"type": "local_shell"}]}, ["tools[1]"]),
    (RESPONSES, {"input": [*HI, {"type": "reasoning", "id": "rs_1", "encrypted_content": "x"}, *HI]}, ["input[1]"]),
    (MESSAGES, {"thinking": {"type": "adaptive", "display": "omitted"}}, ["thinking.display", "thinking"]),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, ["thinking.budget_tokens", "thinking"]),
    (MESSAGES, {"output_config": {"effort": "high"}}, ["output_config.effort"]),
    (MESSAGES, {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, ["context_management"]),
    (MESSAGES, {"metadata": {"user_id": "u"}, "thread": {"type": "create"}}, ["metadata", "thread"]),
    (MESSAGES, {"system": [block(**MARK), block(**MARK)]}, ["system[].cache_control"]),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, ["tools[0]"]),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": WEATHER, **MARK}]}, ["tools[0].cache_control"]),
    (COUNT, {"thinking": {"type": "adaptive"}, "speed": "fast"}, ["speed", "thinking"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "paths"), IGNORED)
def test_a_field_without_effect_is_taken_and_named(
    server: ScriptedServer, path: str, fields: dict[str, Any], paths: list[str]
) -> None:
    answer = send(server, path, **fields)
    assert answer.status_code == 200, answer.text
    assert ignored(answer) == paths


@pytest.mark.parametrize(("path", "fields", "paths"), IGNORED)
def test_a_strict_server_refuses_it(
    strict_server: ScriptedServer, path: str, fields: dict[str, Any], paths: list[str]
) -> None:
    answer = send(strict_server, path, **fields)
    assert answer.status_code == 400
    assert "strict" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *((path, {}) for path in BODIES),
        (CHAT, {"tools": None, "metadata": None, "user": None}),
        (CHAT, {"service_tier": "auto", "store": False, "verbosity": "medium", "modalities": ["text"]}),
        (CHAT, {"reasoning_effort": "none", "cache_prompt": True, "parallel_tool_calls": True}),
        (CHAT, {"max_tokens": -1, "stop": "."}),
        (CHAT, {"skip_special_tokens": True, "min_tokens": 0, "return_progress": False}),
        (COMPLETIONS, {"max_tokens": -1, "stop": "."}),
        (RESPONSES, {"truncation": "disabled", "store": False, "background": False, "reasoning": {"effort": "none"}}),
        (RESPONSES, {"max_output_tokens": -1, "metadata": {"a": "b"}}),
        (MESSAGES, {"thinking": {"type": "disabled"}, "service_tier": "auto"}),
    ],
)  # fmt: skip
def test_what_the_server_follows_is_not_named(
    server: ScriptedServer, strict_server: ScriptedServer, path: str, fields: dict[str, Any]
) -> None:
    for either in (server, strict_server):
        answer = send(either, path, **fields)
        assert answer.status_code == 200 and "x-ignored" not in answer.headers, answer.text


def test_a_tool_that_is_not_offered_is_not_shown_to_the_model(server: ScriptedServer) -> None:
    for path, tools in (
        (CHAT, [{"type": "custom", "custom": {"name": "shell"}}, CHAT_TOOL]),
        (RESPONSES, [{"type": "namespace", "name": "n", "tools": [FLAT_TOOL | {"name": "shell"}]}, FLAT_TOOL]),
        (MESSAGES, [{"type": "bash_20250124", "name": "shell"}, {"name": "weather", "input_schema": WEATHER}]),
    ):  # fmt: skip
        assert send(server, path, tools=tools).status_code == 200
        assert '"weather"' in server.prompt() and "shell" not in server.prompt()
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}, FLAT_TOOL]}
    answer = send(server, RESPONSES, tools=[{"type": "web_search"}, FLAT_TOOL], tool_choice=allowed)
    assert ignored(answer) == ["tools[0]", "tool_choice.tools[0]"]


def test_errors_name_the_places_of_the_request_itself(server: ScriptedServer) -> None:
    answer = send(server, RESPONSES, tools=[{"type": "web_search"}, {"type": "function"}])
    assert answer.json()["error"]["param"] == "tools[1].name"


def test_the_only_model_answers_a_request_that_names_none(server: ScriptedServer) -> None:
    for path, body in BODIES.items():
        assert httpx.post(server.url + path, json=body, timeout=20).status_code == 200, path


def test_a_template_with_a_switch_gets_the_settings_of_reasoning() -> None:
    template = templates.PLAIN + "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    template = template.replace("{% for m", "<|system|>{{ reasoning_effort }}{% for m", 1)
    with serve_script(templates.tokenizer_with(template)) as server:
        server.says("Yes.")
        effort = {"effort": "low"}
        for path, fields, part in (
            (CHAT, {"reasoning_effort": "low"}, "<|system|>low"),
            (CHAT, {"reasoning_effort": "none"}, "[False]"),
            (RESPONSES, {"reasoning": effort}, "<|system|>low"),
            (RESPONSES, {"reasoning": {"effort": "none"}}, "[False]"),
            (MESSAGES, {"output_config": effort, "thinking": {"type": "adaptive"}}, "<|system|>low"),
            (MESSAGES, {"thinking": {"type": "disabled"}}, "[False]"),
            (MESSAGES, {"thinking": {"type": "enabled"}}, "[True]"),
        ):
            answer = send(server, path, **fields)
            assert answer.status_code == 200 and ignored(answer) == []
            text = server._tokenizer.decode(server._backend.last, skip_special=False)
            assert part in text, (path, fields, text)


# The header


def test_the_header_joins_places_and_stays_short() -> None:
    noted = Ignored()
    for number in range(500):
        noted.add(f"messages[{number}].x", "")
    assert noted.header == "messages[].x"
    for number in range(500):
        noted.add(f"messages[0].{'y' * 100}{number}", "")
    assert len(noted.header) < 2100 and noted.header.endswith(", ...")


def test_names_of_the_client_cannot_break_the_header(server: ScriptedServer) -> None:
    names = ["a,b", "c\r\nx-evil: 1", "ü"]
    message = HI[0] | dict.fromkeys(names, "1")
    answer = send(server, CHAT, messages=[message])
    assert answer.status_code == 200 and "x-evil" not in answer.headers
    assert ignored(answer) == ["messages[0].a%2Cb", "messages[0].c%0D%0Ax-evil:%201", "messages[0].%C3%BC"]
