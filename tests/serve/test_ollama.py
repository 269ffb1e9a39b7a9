"""Ollama's API over HTTP: shapes, streams, options, formats, tools, reasoning and errors."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tool_templates as templates
from running_server import Running, local_model, serve_models, slow_model
from scripted_server import ScriptedServer, serve_script

from tercet.serve import streaming
from tercet.serve.models import Models
from tercet.serve.settings import Settings, hash_key

HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": None, "parameters": CITY}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.HERMES)) as server:
        yield server


@pytest.fixture(scope="module")
def thinker() -> Iterator[ScriptedServer]:
    """Serve a model that can be told to think; its markers are special tokens."""
    template = templates.HERMES + "{% if enable_thinking %}<think>{% endif %}"
    with serve_script(templates.tokenizer_with(template, ("<think>", "</think>"))) as server:
        yield server


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/api/{path}", json=body, timeout=20)


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson" and answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.removesuffix("\n").split("\n")]


# Answers


def test_a_chat_is_a_stream_of_lines_by_default(server: ScriptedServer) -> None:
    server.says("Hello there.")
    parts = lines(post(server.url, "chat", model="scripted", messages=HI, tools=[], options={}))
    assert "".join(part["message"]["content"] for part in parts) == "Hello there."
    assert all(part["message"]["role"] == "assistant" and part["model"] == "scripted" for part in parts)
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", part["created_at"]) for part in parts)
    last = parts[-1]
    assert last["done_reason"] == "stop" and last["eval_count"] == len("Hello there.") + 1
    assert all(isinstance(last[name], int) for name in DURATIONS)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"] > 0
    assert last["prompt_eval_count"] > 3 and not any("done_reason" in part for part in parts[:-1])


def test_without_a_stream_the_reply_is_one_object(server: ScriptedServer) -> None:
    server.says("Hello there.")
    answer = post(server.url, "chat", messages=HI, stream=False, options={"num_predict": 5})
    reply = answer.json()
    assert answer.headers["content-type"] == "application/json" and reply["model"] == "scripted"
    assert reply["message"] == {"role": "assistant", "content": "Hello"}
    assert reply["done"] is True and reply["done_reason"] == "length" and reply["eval_count"] == 5


def test_generate_follows_the_template_and_its_context_continues(server: ScriptedServer) -> None:
    server.says("One.")
    first = post(server.url, "generate", prompt="Count", system="Be brief", stream=False).json()
    assert first["response"] == "One." and first["done_reason"] == "stop"
    assert server.prompt() == "<|system|>Be brief<|end|><|user|>Count<|end|><|assistant|>"
    before = server.read()
    assert first["context"][: len(before)] and len(first["context"]) == (
        first["prompt_eval_count"] + first["eval_count"]
    )
    server.says("Two.")
    post(server.url, "generate", prompt="More", context=first["context"], stream=False)
    assert server.prompt() == before + "</s><|user|>More<|end|><|assistant|>"


def test_a_raw_prompt_is_continued_as_it_is(server: ScriptedServer) -> None:
    server.says("yes")
    reply = post(server.url, "generate", prompt="<|user|>raw<|assistant|>", raw=True, stream=False).json()
    assert reply["response"] == "yes" and "context" not in reply
    assert server.prompt() == "<|user|>raw<|assistant|>"
    refused = post(server.url, "generate", prompt="x", raw=True, system="y")
    assert refused.status_code == 400 and "raw" in refused.json()["error"]


def test_a_last_message_of_the_assistant_is_continued(server: ScriptedServer) -> None:
    server.says("blue")
    messages = [*HI, {"role": "assistant", "content": "The sky is "}]
    post(server.url, "chat", messages=messages, stream=False, options={"num_predict": 2})
    assert "<|assistant|>The sky is" in server.read()
    assert not server.read().endswith("<|assistant|>")


@pytest.mark.parametrize(("path", "empty"), [("chat", {"messages": []}), ("generate", {})])
def test_an_empty_request_loads_or_unloads(server: ScriptedServer, path: str, empty: Any) -> None:
    loaded = post(server.url, path, model="scripted", **empty)
    assert loaded.json()["done"] is True and loaded.json()["done_reason"] == "load"
    for zero in (0, "0s"):
        unloaded = post(server.url, path, model="scripted", keep_alive=zero, **empty).json()
        assert unloaded["done_reason"] == "unload"
    assert post(server.url, path, model="scripted", keep_alive="10m", **empty).json()["done_reason"] == "load"


def test_a_body_without_a_content_type_is_json(server: ScriptedServer) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    body = json.dumps({"model": "scripted", "prompt": "hi", "stream": False})
    answer = httpx.post(f"{server.url}/api/generate", content=body, headers=headers)
    assert answer.status_code == 200 and answer.json()["done"]


@pytest.mark.parametrize("name", ["scripted", "scripted:latest", "Scripted", "", None])
def test_names_with_and_without_a_tag(server: ScriptedServer, name: str | None) -> None:
    reply = post(server.url, "chat", model=name, messages=HI, stream=False)
    assert reply.status_code == 200 and reply.json()["model"] == (name or "scripted")


# Options


def test_options_are_those_of_the_engine(tiny_url: str) -> None:
    def answer(**options: Any) -> str:
        reply = post(
            tiny_url,
            "chat",
            messages=HI,
            stream=False,
            options={"num_predict": 12, "temperature": 2.0, **options},
        )
        assert reply.status_code == 200, reply.text
        text: str = reply.json()["message"]["content"]
        return text

    assert answer(seed=7) == answer(seed=7) != answer(seed=8)
    assert answer(top_k=1) == answer(temperature=0) == answer(min_p=1.0) == answer(top_p=0)
    assert answer(temperature=0, repeat_penalty=5.0) != answer(temperature=0)
    assert answer(temperature=0, repeat_penalty=5.0, repeat_last_n=0) == answer(temperature=0)
    assert answer(seed=7, num_predict=12.0) == answer(seed=7)


def test_stop_strings_end_an_answer(server: ScriptedServer) -> None:
    server.says("one, two, three")
    for stop in ("two", ["nine", "two"]):
        reply = post(server.url, "generate", prompt="x", stream=False, options={"stop": stop}).json()
        assert reply["response"] == "one, " and reply["done_reason"] == "stop"


@pytest.mark.parametrize("count", [-1, -2, 0])
def test_an_answer_without_a_limit_may_fill_the_context(server: ScriptedServer, count: int) -> None:
    server.says("x" * 300)
    reply = post(server.url, "generate", prompt="x", stream=False, options={"num_predict": count}).json()
    assert reply["response"] == "x" * 300


def test_hints_are_named_and_strict_servers_refuse_them(server: ScriptedServer) -> None:
    options = {
        "num_ctx": 2048,
        "num_gpu": 1,
        "mirostat": 1,
        "repeat_last_n": 64,
        "made_up": 1,
        "typical_p": 1.0,
    }
    answer = post(server.url, "chat", messages=HI, stream=False, options=options, keep_alive="5m", extra=True)
    assert answer.status_code == 200
    assert set(answer.headers["x-ignored"].split(", ")) == {
        "keep_alive", "extra", "options.num_ctx", "options.num_gpu", "options.mirostat", "options.made_up",
        "options.repeat_last_n",
    }  # fmt: skip
    tokenizer = templates.tokenizer_with(templates.HERMES)
    with serve_script(tokenizer, Settings(strict=True)) as strict:
        refused = post(strict.url, "chat", messages=HI, options={"num_ctx": 2048})
        assert refused.status_code == 400 and "options.num_ctx" in refused.json()["error"]


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("chat", {"messages": HI, "options": {"typical_p": 0.5}}, "options.typical_p"),
        ("chat", {"messages": HI, "options": {"temperature": -1}}, "options.temperature"),
        ("chat", {"messages": HI, "options": {"top_k": 1.5}}, "options.top_k"),
        ("chat", {"messages": HI, "options": {"num_predict": -3}}, "options.num_predict"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}, "messages[0].images"),
        ("chat", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": HI, "format": "xml"}, "format"),
        ("chat", {"messages": HI, "think": "deeply"}, "think"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "x", "images": ["aaaa"]}, "images"),
        ("generate", {"prompt": "x", "context": [10**6]}, "context"),
        ("embed", {"input": [1, 2]}, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(
    server: ScriptedServer, path: str, fields: dict[str, Any], name: str
) -> None:
    answer = post(server.url, path, model="scripted", **fields)
    assert answer.status_code == 400 and answer.json()["error"].startswith(name), answer.text


# Formats, tools, reasoning, log-probabilities


def test_a_format_is_enforced(tiny_url: str) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    reply = post(tiny_url, "chat", messages=HI, stream=False, format=schema, options={"num_predict": 40})
    assert json.loads(reply.json()["message"]["content"])["n"] in (1, 2)
    reply = post(tiny_url, "generate", prompt="x", stream=False, format="json", options={"num_predict": 20})
    assert reply.json()["response"].startswith("{")
    assert post(tiny_url, "chat", messages=HI, format={"type": "nothing"}).status_code == 400
    assert post(tiny_url, "chat", messages=HI, format="", options={"num_predict": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_comes_whole_with_an_object(server: ScriptedServer, stream: bool) -> None:
    server.says(f"I look. {CALL}\n{CALL}")
    answer = post(server.url, "chat", messages=HI, tools=[WEATHER], stream=stream)
    messages = [part["message"] for part in lines(answer)] if stream else [answer.json()["message"]]
    assert "".join(message["content"] for message in messages).strip() == "I look."
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        {"index": number, "name": "weather", "arguments": {"city": "Bonn"}} for number in (0, 1)
    ]
    assert calls[0]["id"] != calls[1]["id"] and '"name": "weather"' in server.prompt()
    assert "null" not in server.prompt()


def test_a_call_that_is_cut_off_is_no_call(server: ScriptedServer) -> None:
    server.says(CALL)
    options = {"num_predict": len(CALL) - 40}
    reply = post(server.url, "chat", messages=HI, tools=[WEATHER], stream=False, options=options).json()
    assert reply["done_reason"] == "length" and "tool_calls" not in reply["message"]


def test_results_find_their_calls_without_identifiers() -> None:
    def call(city: str) -> dict[str, Any]:
        return {"function": {"name": "weather", "arguments": {"city": city}}}

    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [call("Bonn"), call("Rome")]},
        {"role": "tool", "tool_name": "weather", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    with serve_script(templates.tokenizer_with(templates.MISTRAL)) as mistral:
        mistral.says("Wet.")
        answer = post(mistral.url, "chat", messages=messages, tools=[WEATHER], stream=False)
        assert answer.status_code == 200, answer.text
        prompt = mistral.prompt()
    identifiers = re.findall(r'"id": "(\w{9})"', prompt)
    assert len(set(identifiers)) == 2
    assert re.findall(r"<\|tool\|>(rain|sun)(\w{9})", prompt) == [
        *zip(("rain", "sun"), identifiers, strict=True)
    ]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("think", [None, True, False, "high"])
def test_reasoning_stands_apart_from_the_answer(thinker: ScriptedServer, think: Any, stream: bool) -> None:
    opened = think in (True, "high")
    thinker.says(("" if opened else "<think>") + "\nSo be it. \n</think>\n\nYes, <think> so.")
    answer = post(thinker.url, "chat", messages=HI, think=think, stream=stream)
    messages = [part["message"] for part in lines(answer)] if stream else [answer.json()["message"]]
    assert "".join(message.get("thinking", "") for message in messages) == "So be it."
    text = "".join(message["content"] for message in messages)
    assert text.startswith("Yes,") and text.endswith(" so.") and "be it" not in text


def test_reasoning_that_is_cut_off_is_no_answer(thinker: ScriptedServer) -> None:
    thinker.says("<think>I wonder about this")
    reply = post(thinker.url, "generate", prompt="x", stream=False, options={"num_predict": 8}).json()
    assert reply["response"] == "" and reply["thinking"] == "I wonde" and reply["done_reason"] == "length"


def test_a_call_in_reasoning_is_no_call(thinker: ScriptedServer) -> None:
    thinker.says(f"<think>Perhaps {CALL}</think>{CALL.replace('Bonn', 'Rome')}")
    reply = post(thinker.url, "chat", messages=HI, tools=[WEATHER], stream=False).json()["message"]
    assert reply["thinking"].startswith("Perhaps <tool_call>") and reply["content"] == ""
    assert [call["function"]["arguments"] for call in reply["tool_calls"]] == [{"city": "Rome"}]


def test_a_form_is_held_although_the_prompt_opens_reasoning(thinker: ScriptedServer) -> None:
    thinker.says(' {"city": "Bonn"}')  # the prompt has a token of it already
    reply = post(thinker.url, "chat", messages=HI, think=True, format=CITY, stream=False).json()["message"]
    assert json.loads(reply["content"]) == {"city": "Bonn"} and "thinking" not in reply


def test_a_model_that_does_not_reason_ignores_think(server: ScriptedServer) -> None:
    server.says("No.")
    answer = post(server.url, "chat", messages=HI, think=True, stream=False)
    assert answer.json()["message"] == {"role": "assistant", "content": "No."}
    assert answer.headers["x-ignored"] == "think"
    assert "x-ignored" not in post(server.url, "chat", messages=HI, think=False, stream=False).headers


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_join_to_the_answer(server: ScriptedServer, stream: bool) -> None:
    server.says("ab END")
    fields = {"logprobs": True, "top_logprobs": 2, "options": {"stop": [" END"]}}
    answer = post(server.url, "chat", messages=HI, stream=stream, **fields)
    parts = lines(answer) if stream else [answer.json()]
    entries = [entry for part in parts for entry in part.get("logprobs", [])]
    assert "".join(entry["token"] for entry in entries) == "ab"
    assert bytes(entries[0]["bytes"]) == b"a" and entries[0]["logprob"] <= 0
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2]
    assert set(entries[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}
    assert "logprobs" not in post(server.url, "chat", messages=HI, stream=False).json()


# Vectors


def test_vectors_are_those_of_the_other_protocol(tiny_url: str) -> None:
    texts = ["one", "another"]
    reply = post(tiny_url, "embed", model="tiny", input=texts).json()
    other = httpx.post(f"{tiny_url}/v1/embeddings", json={"input": texts}).json()
    np.testing.assert_allclose(
        reply["embeddings"], [entry["embedding"] for entry in other["data"]], atol=1e-6
    )
    assert reply["prompt_eval_count"] == other["usage"]["prompt_tokens"] and reply["model"] == "tiny"
    single = post(tiny_url, "embed", input="one").json()["embeddings"]
    np.testing.assert_allclose(single, reply["embeddings"][:1], atol=1e-5)
    old = post(tiny_url, "embeddings", prompt="one").json()
    np.testing.assert_allclose([old["embedding"]], single, atol=1e-5)
    short = post(tiny_url, "embed", input="one", dimensions=3).json()["embeddings"][0]
    assert len(short) == 3 and abs(sum(value * value for value in short) - 1) < 1e-5
    whole = post(tiny_url, "embed", input="one", dimensions=10**6).json()["embeddings"]
    np.testing.assert_allclose(whole, single, atol=1e-5)
    assert post(tiny_url, "embed", input=[]).json()["embeddings"] == []
    assert post(tiny_url, "embed").json()["embeddings"] == []
    assert post(tiny_url, "embeddings", prompt="").json() == {"embedding": []}


def test_long_texts_are_cut_unless_forbidden(tiny_url: str) -> None:
    long = post(tiny_url, "embed", input="y" * 500)
    assert long.status_code == 200 and long.json()["prompt_eval_count"] == 96
    refused = post(tiny_url, "embed", input="y" * 500, truncate=False)
    assert refused.status_code == 400
    assert refused.json() == {"error": "the input length exceeds the context length"}


# Models


def test_the_catalog_describes_the_models(tiny_directory: Path) -> None:
    from tercet.model.reference import parse_reference

    model = local_model("tiny", tiny_directory)
    model.reference = parse_reference(str(tiny_directory))
    with serve_models(Models([model])) as running, running.http() as http:
        (entry,) = http.get("/api/tags").json()["models"]
        assert entry["name"] == entry["model"] == "tiny:latest" and re.fullmatch(
            r"[0-9a-f]{64}", entry["digest"]
        )
        assert entry["size"] > 1000 and entry["modified_at"].endswith("Z")
        details = entry["details"]
        assert details["format"] == "safetensors" and details["family"] == details["families"][0]
        assert re.fullmatch(r"[\d.]+[KM]", details["parameter_size"]) and details["context_length"] == 96
        (loaded,) = http.get("/api/ps").json()["models"]
        assert loaded["name"] == "tiny:latest" and loaded["size"] > 0 and loaded["size_vram"] == 0
        assert loaded["context_length"] == 96 and loaded["expires_at"] > entry["modified_at"]
        shown = http.post("/api/show", json={"name": "tiny"}).json()
        family = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{family}.context_length"] == 96
        assert shown["capabilities"] == ["completion", "tools", "embedding"]
        assert shown["template"] and shown["details"] == details
        assert http.head("/api/tags").status_code == 200


def test_thinking_is_a_capability(thinker: ScriptedServer) -> None:
    assert "thinking" in post(thinker.url, "show", model="scripted").json()["capabilities"]


def test_the_version_is_a_version_of_ollama(tiny_url: str) -> None:
    assert re.fullmatch(r"0\.\d+\.\d+", httpx.get(f"{tiny_url}/api/version").json()["version"])


def test_the_root_answers_where_there_is_no_page(tiny_url: str) -> None:
    assert httpx.head(f"{tiny_url}/").status_code == 200
    assert httpx.get(f"{tiny_url}/").text == "Ollama is running"


# Errors, limits, the network


@pytest.mark.parametrize("path", ["chat", "generate", "embed", "embeddings", "show"])
def test_an_unknown_model_is_404_in_words_that_clients_know(server: ScriptedServer, path: str) -> None:
    answer = post(server.url, path, model="nope:1b", messages=HI, prompt="x", input="x")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model 'nope:1b' not found")


def test_every_error_is_a_text(server: ScriptedServer) -> None:
    for method, path, content, status in (
        ("POST", "/api/chat", "{", 400),
        ("POST", "/api/chat", "", 400),
        ("POST", "/api/chat", "[1]", 400),
        ("GET", "/api/chat", "", 405),
        ("GET", "/api/nothing", "", 404),
    ):
        answer = httpx.request(method, server.url + path, content=content)
        assert answer.status_code == status and list(answer.json()) == ["error"], answer.text
        assert isinstance(answer.json()["error"], str)


def test_a_prompt_that_is_too_long_is_refused(server: ScriptedServer) -> None:
    answer = post(server.url, "chat", messages=[{"role": "user", "content": "y" * 5000}])
    assert answer.status_code == 400 and "4096 tokens" in answer.json()["error"]


def test_keys_hosts_and_origins_hold_here_too(tiny_directory: Path) -> None:
    settings = Settings(keys=(hash_key("sesame-open-1234"),), max_body=500)
    with serve_models(Models([local_model("tiny", tiny_directory)]), settings) as running:
        http = running.http()
        for method, path in (("GET", "/api/tags"), ("POST", "/api/chat"), ("GET", "/api/version")):
            answer = http.request(method, path)
            assert answer.status_code == 401 and "API key" in answer.json()["error"]
        headers = {"authorization": "Bearer sesame-open-1234"}
        assert http.get("/api/tags", headers=headers).status_code == 200
        evil = http.post("/api/chat", headers=headers | {"origin": "https://evil.example"}, content=b"{}")
        assert evil.status_code == 403 and "origin" in evil.json()["error"]
        host = http.get("/api/tags", headers=headers | {"host": "evil.example"})
        assert host.status_code == 403 and isinstance(host.json()["error"], str)
        large = http.post("/api/chat", headers=headers, content=b"x" * 600)
        assert large.status_code == 413 and "500 bytes" in large.json()["error"]


def test_models_are_not_changed(tiny_url: str) -> None:
    for method, path in (
        ("POST", "create"), ("POST", "copy"), ("DELETE", "delete"), ("POST", "push"), ("POST", "blobs/sha256:00"),
    ):  # fmt: skip
        answer = httpx.request(method, f"{tiny_url}/api/{path}", json={"model": "x"})
        assert answer.status_code == 501 and "does not" in answer.json()["error"]


def test_pulling_is_off(tiny_url: str) -> None:
    answer = post(tiny_url, "pull", model="org/name")
    assert answer.status_code == 403 and "`allow_pull`" in answer.json()["error"]
    assert lines(post(tiny_url, "pull", model="tiny"))[-1] == {"status": "success"}


def test_pulling_fetches_as_the_command_does(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tercet.errors import UserError
    from tercet.model.store import StoredModel
    from tercet.serve.ollama import changes

    fetched = []

    def fetch(reference: Any) -> StoredModel:
        fetched.append(reference.text)
        if "missing" in reference.text:
            raise UserError("the Hub has no org/missing")
        return StoredModel(reference.text, 98, "llama", "Q4_1", "Hub cache", "/x", 0.0)

    monkeypatch.setattr(changes, "fetch_model", fetch)
    models = Models([local_model("tiny", tiny_directory)])
    with serve_models(models, Settings(allow_pull=True)) as running:
        parts = lines(post(running.url, "pull", model="hf.co/org/name-GGUF:Q4_1"))
        assert parts[0]["status"] == "pulling manifest" and parts[-1] == {"status": "success"}
        assert post(running.url, "pull", name="builtin:smollm2", stream=False).json() == {"status": "success"}
        assert fetched == ["org/name-GGUF:Q4_1", "builtin:smollm2"]
        assert lines(post(running.url, "pull", model="org/missing"))[-1] == {
            "error": "the Hub has no org/missing"
        }
        for name in ("/etc/passwd", "../x", "http://host/v1#m", "openai:gpt", str(tiny_directory), "llama3"):
            answer = post(running.url, "pull", model=name)
            assert answer.status_code == 400 and "pulls builtin:NAME" in answer.json()["error"]


@pytest.fixture
def slow() -> Iterator[tuple[Running, Any]]:
    model, backend = slow_model("slow", templates.tokenizer_with(templates.PLAIN), 0.02)
    with serve_models(Models([model])) as running:
        yield running, backend


def test_a_client_that_leaves_ends_its_answer(slow: tuple[Running, Any]) -> None:
    running, backend = slow
    with running.http() as http, http.stream("POST", "/api/chat", json={"messages": HI}) as answer:
        assert json.loads(next(answer.iter_lines()))["message"]["content"].startswith("x")
    end = time.monotonic() + 5
    (worker,) = running.app.state.models.workers
    while worker.load.running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert backend.feeds < 100


def test_silence_is_filled_with_empty_parts(
    slow: tuple[Running, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SILENCE", 0.01)
    running, _ = slow
    parts = lines(post(running.url, "generate", prompt="hi", options={"num_predict": 3}))
    assert any(not part["response"] and not part["done"] for part in parts)
    assert "".join(part["response"] for part in parts) == "xxx"


def test_metrics_count_the_new_routes(tiny_url: str) -> None:
    post(tiny_url, "chat", messages=HI, options={"num_predict": 1})
    text = httpx.get(f"{tiny_url}/metrics").text
    assert 'tercet_requests_total{route="/api/chat",status="200"}' in text
