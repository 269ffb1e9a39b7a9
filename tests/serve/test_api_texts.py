"""/v1/completions, /v1/embeddings, /tokenize and /v1/models, through OpenAI's client."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from running_server import client_of

from tercet.prompt.llm import LLM

PROMPTS = ["the cat sat", "héllo wörld", "a"]


@pytest.fixture
def client(tiny_url: str) -> openai.OpenAI:
    return client_of(tiny_url)


@pytest.fixture(scope="module")
def theirs(tiny_directory: Path) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_directory)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(tiny_directory)


def complete(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", **body}, timeout=20)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    return response


# Completions


def test_the_four_forms_of_prompts_say_the_same(tiny_url: str, theirs: tuple[Any, Any]) -> None:
    tokenizer, _ = theirs
    ids = [tokenizer(text).input_ids for text in PROMPTS]
    texts = [complete(tiny_url, prompt=text, temperature=0)["choices"][0]["text"] for text in PROMPTS]
    for prompts in (PROMPTS, ids):
        response = complete(tiny_url, prompt=prompts, temperature=0)
        assert [choice["text"] for choice in response["choices"]] == texts
        assert [choice["index"] for choice in response["choices"]] == [0, 1, 2]
        assert response["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert complete(tiny_url, prompt=ids[1], temperature=0)["choices"][0]["text"] == texts[1]


def test_the_default_is_16_tokens(tiny_url: str) -> None:
    response = complete(tiny_url, prompt="a", ignore_eos=True)
    assert response["usage"]["completion_tokens"] == 16 and response["object"] == "text_completion"


def test_an_echo_has_the_log_probabilities_of_transformers(tiny_url: str, theirs: tuple[Any, Any]) -> None:
    tokenizer, model = theirs
    response = complete(tiny_url, prompt=PROMPTS, echo=True, logprobs=2, max_tokens=1, temperature=0)
    for prompt, choice in zip(PROMPTS, response["choices"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            right = model(ids).logits[0].log_softmax(-1)
        logprobs = choice["logprobs"]
        lengths = {
            len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert lengths == {ids.shape[1] + 1}  # every token of the prompt and the generated one
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for place in range(1, ids.shape[1]):
            expected = float(right[place - 1, ids[0, place]])
            assert logprobs["token_logprobs"][place] == pytest.approx(expected, abs=1e-4)
            best = right[place - 1].topk(2).values.tolist()
            top = sorted(logprobs["top_logprobs"][place].values(), reverse=True)
            assert top[:2] == pytest.approx(best, abs=1e-4) and 2 <= len(top) <= 3
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(right[-1].max()), abs=1e-4)
        assert choice["text"].startswith(prompt)


@pytest.mark.parametrize("prompt", ["the cat", "Grüße 日本 🦊"])
def test_offsets_are_where_tokens_begin_in_the_text(tiny_url: str, prompt: str) -> None:
    for form in (prompt, [ord("a") % 250, 100, 101, 102]):
        choice = complete(tiny_url, prompt=form, echo=True, logprobs=0, max_tokens=9, seed=1)["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets) and offsets[-1] <= len(text)
        ends = [*offsets[1:], len(text)]
        for token, start, end in zip(logprobs["tokens"], offsets, ends, strict=True):
            if not token.startswith(("bytes:", "<")) and "\ufffd" not in text[start:end]:
                assert text[start:end] == token


def test_no_tokens_at_all_only_score_the_prompt(tiny_url: str) -> None:
    generated = complete(tiny_url, prompt=PROMPTS, echo=True, logprobs=1, max_tokens=1, temperature=0)
    scored = complete(tiny_url, prompt=PROMPTS, echo=True, logprobs=1, max_tokens=0)
    assert scored["usage"]["completion_tokens"] == 0
    for mine, other, prompt in zip(scored["choices"], generated["choices"], PROMPTS, strict=True):
        assert mine["text"] == prompt and mine["finish_reason"] == "length"
        assert mine["logprobs"]["token_logprobs"] == other["logprobs"]["token_logprobs"][:-1]


def test_our_own_client_scores_through_the_server_as_in_process(tiny_url: str, tiny_directory: Path) -> None:
    here, there = LLM(str(tiny_directory), quantize="none", threads=1), LLM(f"{tiny_url}/v1#tiny")
    for prompt, continuation in (("the cat", " sat"), ("", "alone"), ("é", "ü!")):
        mine, other = here.score(prompt, continuation), there.score(prompt, continuation)
        assert other.token_logprobs == pytest.approx(mine.token_logprobs, abs=1e-4)
        assert other.is_greedy == mine.is_greedy


def test_the_best_of_several_is_the_likeliest(tiny_url: str) -> None:
    body: dict[str, Any] = {"prompt": "a", "seed": 4, "max_tokens": 6, "ignore_eos": True}
    every = complete(tiny_url, **body, n=5, logprobs=0)
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every["choices"]]
    response = complete(tiny_url, **body, best_of=5, n=2)
    order = np.argsort(means)[::-1]
    assert [choice["text"] for choice in response["choices"]] == [
        every["choices"][place]["text"] for place in order[:2]
    ]
    assert response["usage"]["completion_tokens"] == 30 and response["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"echo": True, "logprobs": 2}, {"logprobs": 0}])
def test_a_stream_joins_to_the_whole(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    request: Any = {"model": "tiny", "prompt": PROMPTS[:2], "n": 2, "seed": 2, "max_tokens": 12, **extra}
    whole = client.completions.create(**request)
    joined: dict[int, dict[str, Any]] = {
        index: {"text": "", "reason": None, "logprobs": []} for index in range(4)
    }
    usage = None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts = joined[choice.index]
            assert parts["reason"] is None
            parts["text"] += choice.text
            parts["reason"] = choice.finish_reason
            if choice.logprobs is not None:
                parts["logprobs"] += columns(choice.logprobs)
    assert usage and whole.usage and usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        assert joined[choice.index]["text"] == choice.text
        assert joined[choice.index]["reason"] == choice.finish_reason
        if choice.logprobs is not None:
            assert joined[choice.index]["logprobs"] == columns(choice.logprobs)


def columns(logprobs: Any) -> list[tuple[Any, ...]]:
    """Return the parallel arrays as one tuple per token."""
    every = logprobs.model_dump()
    every["top_logprobs"] = every["top_logprobs"] or [None] * len(every["tokens"])
    return [*zip(*every.values(), strict=True)]


def test_a_request_without_a_prompt_begins_a_new_document(tiny_url: str) -> None:
    response = complete(tiny_url, max_tokens=3, temperature=0)
    assert response == complete(tiny_url, prompt="", max_tokens=3, temperature=0) | {
        "id": response["id"], "created": response["created"]
    }  # fmt: skip
    assert response["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [4000]}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_unsupported_completions_are_400(tiny_url: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{tiny_url}/v1/completions", json={"model": "tiny", **body}, timeout=20)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


# Embeddings


def test_embeddings_are_the_mean_of_the_last_hidden_states(
    client: openai.OpenAI, theirs: tuple[Any, Any]
) -> None:
    tokenizer, model = theirs
    response = client.embeddings.create(model="tiny", input=PROMPTS)  # the client requests base64
    for prompt, embedding in zip(PROMPTS, response.data, strict=True):
        with torch.no_grad():
            states = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        np.testing.assert_allclose(embedding.embedding, (mean / mean.norm()).numpy(), atol=1e-4)
    assert (
        response.usage.prompt_tokens
        == response.usage.total_tokens
        == sum(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    )


def test_lists_and_base64_hold_the_same_numbers_and_lists_are_the_default(tiny_url: str) -> None:
    def ask(**body: Any) -> Any:
        answer = httpx.post(f"{tiny_url}/v1/embeddings", json={"model": "tiny", "input": "a b", **body})
        return answer.json()["data"][0]["embedding"]

    raw = base64.b64decode(ask(encoding_format="base64"))
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), np.array(ask(), np.float32))
    assert ask(encoding_format="float") == ask() == ask(encoding_format=None)


def test_embeddings_take_all_four_forms(client: openai.OpenAI, theirs: tuple[Any, Any]) -> None:
    tokenizer, _ = theirs
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    texts = [embedding.embedding for embedding in client.embeddings.create(model="tiny", input=PROMPTS).data]
    assert [
        embedding.embedding for embedding in client.embeddings.create(model="tiny", input=ids).data
    ] == texts
    assert client.embeddings.create(model="tiny", input=PROMPTS[1]).data[0].embedding == texts[1]
    assert client.embeddings.create(model="tiny", input=ids[1]).data[0].embedding == texts[1]


def test_fewer_dimensions_are_the_first_of_length_1_again(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="tiny", input="a b").data[0].embedding)
    few = np.array(client.embeddings.create(model="tiny", input="a b", dimensions=5).data[0].embedding)
    np.testing.assert_allclose(few, whole[:5] / np.linalg.norm(whole[:5]), rtol=1e-5)
    with pytest.raises(openai.BadRequestError, match="vectors have 32"):
        client.embeddings.create(model="tiny", input="a b", dimensions=33)


@pytest.mark.parametrize("wrong", ["", [], [""], [[]], ["a"] * 2049, [1, "a"], {"a": 1}])
def test_texts_that_have_no_embedding_are_400(tiny_url: str, wrong: Any) -> None:
    answer = httpx.post(f"{tiny_url}/v1/embeddings", json={"model": "tiny", "input": wrong})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"


# Tokens and models


def test_tokens_are_those_of_transformers_and_come_back_as_text(
    tiny_url: str, theirs: tuple[Any, Any]
) -> None:
    tokenizer, _ = theirs
    with httpx.Client(base_url=tiny_url) as http:
        for special in (True, False):
            body = {"prompt": "Grüße!", "add_special_tokens": special, "return_token_strs": True}
            tokenized = http.post("/tokenize", json=body).json()
            assert tokenized["tokens"] == tokenizer("Grüße!", add_special_tokens=special).input_ids
            assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
            assert tokenized["max_model_len"] == 96
        back = http.post("/detokenize", json={"tokens": tokenized["tokens"]}).json()
        assert back == {"prompt": "Grüße!"}
        talk = [{"role": "user", "content": "hi"}]
        rendered = http.post("/tokenize", json={"messages": talk, "model": "tiny"}).json()["tokens"]
        expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True)
        assert rendered == (expected if isinstance(expected, list) else expected["input_ids"])
        info = http.get("/tokenizer_info").json()
        assert info["eos_token"] == tokenizer.eos_token and info["chat_template"] == tokenizer.chat_template
        for wrong in ({}, {"prompt": "a", "messages": talk}, {"prompt": 3}):
            assert http.post("/tokenize", json=wrong).status_code == 400
        assert http.post("/detokenize", json={"tokens": [9999]}).status_code == 400


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tercet")
    assert client.models.retrieve("tiny") == model


def test_the_metrics_count_requests_and_tokens(tiny_url: str) -> None:
    def values() -> dict[str, float]:
        lines = httpx.get(f"{tiny_url}/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    before = values()
    complete(tiny_url, prompt="abc", max_tokens=5, ignore_eos=True)
    httpx.get(f"{tiny_url}/v1/nothing")
    after = values()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more('tercet_requests_total{route="/v1/completions",status="200"}') == 1
    assert more('tercet_requests_total{route="other",status="404"}') == 1
    assert more('tercet_prompt_tokens_total{model="tiny"}') == 4
    assert more('tercet_completion_tokens_total{model="tiny"}') == 5
    assert more('tercet_first_token_seconds_count{model="tiny"}') == 1
    assert after['tercet_requests_running{model="tiny"}'] == 0
    assert not any(math.isnan(value) for value in after.values())
    json.dumps(after)


def test_answers_pass_the_strict_validation_of_openais_client(tiny_url: str) -> None:
    """Streams of completions are left out: OpenAI's chunks have a null finish_reason, the client's type has not."""
    client = client_of(tiny_url, _strict_response_validation=True)
    talk: Any = [{"role": "user", "content": "hi"}]
    client.models.list()
    client.models.retrieve("tiny")
    client.embeddings.create(model="tiny", input="a", encoding_format="float")
    client.completions.create(model="tiny", prompt="a", logprobs=2, n=2)
    client.chat.completions.create(
        model="tiny", messages=talk, logprobs=True, top_logprobs=2, n=2, max_tokens=5
    )
    for chat in client.chat.completions.create(
        model="tiny",
        messages=talk,
        logprobs=True,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    ):
        assert chat.object == "chat.completion.chunk"
