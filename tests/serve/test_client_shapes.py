"""Requests in the shapes that agents send: blocks, deferred tools, references to items, reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import tool_templates as templates
from scripted_server import ScriptedServer, serve_script

from tercet.serve.api.kept_items import KeptItems
from tercet.serve.errors import APIError

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a.txt"}}\n</tool_call>'
READ = {"name": "read", "input_schema": PATH}
FIND = {"name": "find", "input_schema": PATH}
SEARCH = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.HERMES)) as server:
        yield server


@pytest.fixture(scope="module")
def thinker() -> Iterator[ScriptedServer]:
    """Serve a template that shows earlier reasoning."""
    template = templates.HERMES.replace("{{ m.content }}", "({{ m.reasoning_content }}){{ m.content }}")
    with serve_script(templates.tokenizer_with(template)) as server:
        yield server


def post(server: ScriptedServer, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "scripted", **fields}, timeout=20)


def message(server: ScriptedServer, *turns: Any, **fields: Any) -> httpx.Response:
    return post(server, "/v1/messages?beta=true", max_tokens=200, messages=list(turns), **fields)


def response(server: ScriptedServer, *items: Any, **fields: Any) -> httpx.Response:
    return post(server, "/v1/responses", input=list(items), **fields)


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def test_a_coding_agents_first_request_is_answered(server: ScriptedServer) -> None:
    """The shape of Claude Code 2.1, in our own words."""
    server.says(CALL)
    answer = message(
        server,
        user(text("<reminder>no commits</reminder>"), text("Which colour is in a.txt?", **MARK)),
        {"role": "system", "content": [text("# Machine\nLinux", **MARK)]},
        system=[text("x-billing: cli=2.1;"), text("You are an agent.", **MARK)],
        tools=[READ | {"eager_input_streaming": True}, {**FIND, "defer_loading": True}],
        metadata={"user_id": '{"device": "1"}'},
        thinking={"type": "adaptive", "display": "omitted"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        stream=True,
    )
    assert answer.status_code == 200, answer.text
    assert '"type": "tool_use"' in answer.text and '"stop_reason": "tool_use"' in answer.text
    prompt = server.prompt()
    assert "<|system|>x-billing: cli=2.1;\nYou are an agent.<|end|>" in prompt
    assert prompt.endswith("Which colour is in a.txt?<|end|><|system|># Machine\nLinux<|end|><|assistant|>")
    assert '"read"' in prompt and '"find"' not in prompt


def test_a_deferred_tool_is_shown_once_a_result_refers_to_it(server: ScriptedServer) -> None:
    server.says("ok")
    call = {
        "type": "tool_use",
        "id": "1",
        "name": "read",
        "input": {"path": "x"},
        "caller": {"type": "direct"},
    }
    found = {"type": "tool_reference", "tool_name": "find"}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [found]}
    tools = [READ, FIND | {"defer_loading": True}]
    turns = [user(text("Hi")), {"role": "assistant", "content": [call]}, user(result)]
    answer = message(server, *turns, tools=tools)
    assert answer.headers["x-ignored"] == "messages[1].content[0].caller"
    assert '"find"' in server.prompt() and "The tool find is available now." in server.prompt()
    message(server, *turns[:1], tools=[*tools, SEARCH])  # there is no search, so nothing stays hidden
    assert '"find"' in server.prompt()


def test_system_messages_add_and_remove_tools(server: ScriptedServer) -> None:
    server.says("ok")

    def change(kind: str, **tool: Any) -> dict[str, Any]:
        return {"role": "system", "content": [{"type": f"tool_{kind}", "tool": tool}]}

    tools = [READ, FIND | {"defer_loading": True}]
    removed, added = change("removal", name="read"), change("addition", name="find")
    assert message(server, user(text("Hi")), removed, added, tools=tools).status_code == 200
    assert '"find"' in server.prompt() and '"read"' not in server.prompt()
    message(server, user(text("Hi")), removed, change("addition", name="read"), tools=tools)
    assert '"read"' in server.prompt() and '"find"' not in server.prompt()
    inline = change("addition", type="tool_definition", definition=READ | {"name": "write"})
    message(server, user(text("Hi")), inline, tools=tools)
    assert '"write"' in server.prompt()


def test_a_system_message_for_one_turn_ends_with_it(server: ScriptedServer) -> None:
    server.says("ok")
    once = {"role": "system", "content": "Only once.", "clear_at": "next_user_message"}
    message(server, user(text("a")), once)
    assert "Only once." in server.prompt()
    message(server, user(text("a")), once, {"role": "assistant", "content": "b"}, user(text("c")))
    assert "Only once." not in server.prompt()


def test_documents_and_search_results_are_read_as_text(server: ScriptedServer) -> None:
    server.says("ok")
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }
    found = {"type": "search_result", "title": "S", "source": "http://x", "content": [text("R")]}
    assert message(server, user(document, found, text("Hi"))).status_code == 200
    assert "<|user|>T\nD\nS\nhttp://x\nR\nHi<|end|>" in server.prompt()
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
    answer = message(server, user(pdf))
    assert answer.status_code == 400 and "content[0].source.type" in answer.json()["error"]["message"]


def test_earlier_thinking_is_shown_where_the_template_shows_it(
    server: ScriptedServer, thinker: ScriptedServer
) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    turns = [user(text("a")), {"role": "assistant", "content": [thought, hidden, text("b")]}, user(text("c"))]
    for either, ignored in ((thinker, "messages[1].content[1]"), (server, "messages[].content[]")):
        either.says("ok")
        answer = message(either, *turns)
        assert answer.status_code == 200 and ignored in answer.headers["x-ignored"]
    assert "<|assistant|>(hm)b<|end|>" in thinker.prompt()


# Responses


def test_reasoning_items_belong_to_the_next_answer(thinker: ScriptedServer) -> None:
    thinker.says("ok")
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
    call = {"type": "function_call", "call_id": "1", "name": "read", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "x"}
    answer = response(
        thinker, {"role": "user", "content": "a"}, reasoning, {"role": "assistant", "content": "b"}, reasoning, call, result
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert "(hm)b" in thinker.prompt()


def test_a_reference_stands_for_an_item_of_an_earlier_answer(server: ScriptedServer) -> None:
    server.says(CALL)
    tools = [{"type": "function", "name": "read", "parameters": PATH}]
    first = response(server, {"role": "user", "content": "a"}, tools=tools, stream=False).json()
    (item,) = first["output"]
    server.says("ok")
    for reference in ({"type": "item_reference", "id": item["id"]}, {"id": item["id"]}):
        result = {"type": "function_call_output", "call_id": item["call_id"], "output": "teal"}
        answer = response(server, {"role": "user", "content": "a"}, reference, result, tools=tools)
        assert answer.status_code == 200, answer.text
        assert CALL in server.prompt() and "<|tool|>teal" in server.prompt()


def test_the_count_of_an_input_is_that_of_its_answer(server: ScriptedServer) -> None:
    server.says("ok")
    fields: dict[str, Any] = {"input": "Hi", "instructions": "Be brief.", "tools": [{"type": "web_search"}]}
    count = post(server, "/v1/responses/input_tokens", **fields).json()
    assert count["object"] == "response.input_tokens"
    assert count["input_tokens"] == post(server, "/v1/responses", **fields).json()["usage"]["input_tokens"]


def test_items_are_kept_for_their_time_and_within_their_space() -> None:
    now = [0.0]
    kept = KeptItems(lifetime=10, capacity=100, clock=lambda: now[0])
    kept.keep([{"id": "a"}])
    now[0] = 9
    kept.keep([{"id": "b"}])
    assert kept.get("a", "input[0]") == {"id": "a"}
    now[0] = 11
    assert kept.get("b", "input[0]") == {"id": "b"}
    with pytest.raises(APIError, match=r"input\[0\].id is 'a'"):
        kept.get("a", "input[0]")
    kept.keep([{"id": "c", "text": "x" * 70}, {"id": "d", "text": "x" * 200}])
    assert kept.get("c", "")["id"] == "c"
    for lost in "bd":
        with pytest.raises(APIError):
            kept.get(lost, "input[0]")
