"""Hosted models against a server that answers from a script."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fake_openai_server import (
    DONE,
    Answer,
    FakeServer,
    chunk,
    completion,
    error,
    event,
    models,
    spoken,
    stream,
    usage_chunk,
)

from tercet.engine.request import Sampling
from tercet.errors import ContextOverflow, UserError
from tercet.prompt.errors import BatchError
from tercet.prompt.llm import LLM

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def llm(server: FakeServer) -> LLM:
    return LLM(server.reference, retries=0)


def one_line(problem: pytest.ExceptionInfo[UserError]) -> str:
    message = str(problem.value)
    assert "\n" not in message
    return message


def test_an_answer_with_its_usage(server: FakeServer, llm: LLM) -> None:
    server.script.append(completion("hello", 11, 2))
    answer = llm.chat(HELLO)
    assert (answer.text, answer.finish_reason) == ("hello", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cost) == (11, 2, None)
    assert answer.seconds > 0
    assert server.seen[0].path == "/v1/chat/completions"
    assert (llm.is_local, llm.has_chat_template, llm.context_length) == (False, True, None)


def test_only_settings_of_the_call_are_sent(server: FakeServer, llm: LLM) -> None:
    llm.chat(HELLO)
    llm.chat(HELLO, temperature=0, max_tokens=5, stop="END", seed=0)
    assert server.bodies() == [
        {"model": "small", "messages": HELLO},
        {
            "model": "small",
            "messages": HELLO,
            "temperature": 0,
            "max_tokens": 5,
            "stop": ["END"],
            "seed": 0,
        },
    ]


def test_a_sampling_object_sends_its_temperature_and_length_and_what_differs(
    server: FakeServer, llm: LLM
) -> None:
    llm.generate("hi", sampling=Sampling(top_p=0.9), max_tokens=9)
    assert server.bodies()[0] == {
        "model": "small",
        "messages": HELLO,
        "temperature": 0.7,
        "max_tokens": 9,
        "top_p": 0.9,
    }


def test_settings_beyond_the_protocol_go_to_servers_that_may_know_them(server: FakeServer, llm: LLM) -> None:
    llm.chat(HELLO, top_k=5, min_p=0.1, repetition_penalty=1.2)
    body = server.bodies()[0]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (5, 0.1, 1.2)


def test_openai_itself_gets_its_own_name_for_the_length(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    llm = LLM("openai:small")
    llm.chat(HELLO, max_tokens=5)
    assert server.bodies()[0] == {"model": "small", "messages": HELLO, "max_completion_tokens": 5}
    assert server.seen[0].headers["authorization"] == "Bearer sk-secret"
    with pytest.raises(UserError, match="openai:small does not support top_k, min_p"):
        llm.chat(HELLO, top_k=5, min_p=0.1)


def test_anthropic_is_not_sent_what_it_would_ignore(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tercet.model.reference.ANTHROPIC_URL", server.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "ak")
    monkeypatch.setenv("OPENAI_ORG_ID", "another company's affair")
    llm = LLM("anthropic:big")
    llm.chat(HELLO, temperature=1, max_tokens=3)
    assert server.bodies()[0]["max_tokens"] == 3
    assert server.seen[0].headers["authorization"] == "Bearer ak"
    assert "openai-organization" not in server.seen[0].headers
    refused: list[dict[str, Any]] = [{"seed": 1}, {"logprobs": 2}, {"top_k": 4}, {"temperature": 1.5}]
    for setting in refused:
        with pytest.raises(UserError, match=next(iter(setting))):
            llm.chat(HELLO, **setting)


def test_keys(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="openai:small needs a key: set OPENAI_API_KEY"):
        LLM("openai:small")
    with pytest.raises(UserError, match="ANTHROPIC_API_KEY"):
        LLM("anthropic:big")
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    LLM(server.reference).chat(HELLO)
    monkeypatch.setenv("TERCET_API_KEY", "special")
    LLM(server.reference).chat(HELLO)
    # OpenAI's key is for OpenAI only; other servers never receive it.
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer none", "Bearer special"]


def test_a_server_of_one_model_needs_no_name(server: FakeServer) -> None:
    server.script.extend([models("only"), completion("x")])
    LLM(server.url).chat(HELLO)
    assert server.bodies()[1]["model"] == "only"
    server.script.append(models("a", "b"))
    with pytest.raises(UserError, match=r"serves 2 models; choose one with .*#NAME: a, b"):
        LLM(server.url)
    server.script.append(models())
    with pytest.raises(UserError, match="lists no models"):
        LLM(server.url)


# Streams


def test_a_stream_gives_pieces_and_then_the_completion(server: FakeServer, llm: LLM) -> None:
    server.script.append(spoken("Hel", "lo", finish="length"))
    with llm.stream("hi", max_tokens=2) as pieces:
        assert not pieces.finished
        assert list(pieces) == ["Hel", "lo"]
    answer = pieces.completion
    assert (answer.text, answer.finish_reason, answer.usage.prompt_tokens) == ("Hello", "length", 7)
    assert server.bodies()[0]["stream_options"] == {"include_usage": True}


def test_characters_split_between_packets_arrive_whole(server: FakeServer, llm: LLM) -> None:
    wire = b"".join([chunk("né"), chunk("€😀"), chunk(finish="stop"), DONE])
    server.script.append(stream(*[bytes([byte]) for byte in wire]))
    assert list(llm.stream("hi")) == ["né", "€😀"]


def test_events_of_several_lines_comments_and_carriage_returns(server: FakeServer, llm: LLM) -> None:
    pretty = json.dumps(json.loads(chunk("ok")[6:]), indent=1)
    lines = "".join(f"data: {line}\r\n" for line in pretty.split("\n"))
    server.script.append(stream(b": ping\n\n", lines.encode() + b"\r\n", chunk(finish="stop"), DONE))
    assert list(llm.stream("hi")) == ["ok"]


def test_a_server_that_refuses_stream_options_is_asked_without_once_and_for_all(
    server: FakeServer, llm: LLM
) -> None:
    server.script.append(error(400, "unknown field: stream_options"))
    server.script.extend([stream(chunk("a"), chunk(finish="stop"), DONE)] * 2)
    first = llm.stream("hi")
    assert list(first) == ["a"]
    assert first.completion.usage.prompt_tokens == 0  # the server did not count
    assert list(llm.stream("hi")) == ["a"]
    assert ["stream_options" in body for body in server.bodies()] == [True, False, False]


def test_a_request_refused_for_another_reason_says_the_true_one(server: FakeServer, llm: LLM) -> None:
    server.script.extend([error(400, "temperature must be below 2")] * 2 + [spoken("x")])
    with pytest.raises(UserError, match="temperature must be below 2"):
        next(llm.stream("hi", temperature=9))
    assert list(llm.stream("hi")) == ["x"]
    assert "stream_options" in server.bodies()[-1]  # it was not the cause, so later requests still contain it


def test_a_stream_that_ends_in_the_middle_is_not_an_answer(server: FakeServer, llm: LLM) -> None:
    server.script.append(stream(chunk("half an ans")))
    pieces = llm.stream("hi")
    with pytest.raises(UserError, match="ended in the middle of the answer") as caught:
        list(pieces)
    one_line(caught)
    assert pieces.text == "half an ans"
    assert not pieces.finished


def test_an_error_inside_a_stream(server: FakeServer, llm: LLM) -> None:
    server.script.append(stream(chunk("a"), event({"error": {"message": "out of\nmemory"}})))
    with pytest.raises(UserError, match="out of memory") as caught:
        list(llm.stream("hi"))
    one_line(caught)


def test_closing_a_stream_ends_it(server: FakeServer, llm: LLM) -> None:
    server.script.append(spoken("a", "b", "c"))
    pieces = llm.stream("hi")
    assert next(pieces) == "a"
    pieces.close()
    assert list(pieces) == []
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = pieces.completion


# Log-probabilities, scores


def logprob_content() -> dict[str, Any]:
    top = [
        {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
        {"token": "e", "logprob": -1.0, "bytes": None},
    ]
    return {"content": [{"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": top}]}


def test_log_probabilities(server: FakeServer, llm: LLM) -> None:
    server.script.append(completion("é", logprobs=logprob_content()))
    logprobs = llm.chat(HELLO, logprobs=2).logprobs
    assert logprobs is not None
    assert (logprobs[0].token, logprobs[0].logprob, logprobs[0].bytes) == ("é", -0.5, "é".encode())
    assert logprobs[0].top == [(-1, "é", -0.5), (-1, "e", -1.0)]
    assert server.bodies()[0] | {"logprobs": True, "top_logprobs": 2} == server.bodies()[0]
    server.script.append(stream(chunk("é", logprobs=logprob_content()), chunk(finish="stop"), DONE))
    pieces = llm.stream("hi", logprobs=2)
    assert list(pieces) == ["é"]
    assert pieces.completion.logprobs == logprobs


def test_missing_log_probabilities_are_an_error(server: FakeServer, llm: LLM) -> None:
    with pytest.raises(UserError, match="returned no log-probabilities"):
        llm.chat(HELLO, logprobs=2)


def echoed(text: str, tokens: list[str], values: list[float | None]) -> Answer:
    offsets = [sum(map(len, tokens[:number])) for number in range(len(tokens))]
    top = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    body = {"id": "c", "object": "text_completion", "created": 1, "model": "small", "choices": [choice]}
    return Answer(body=json.dumps(body).encode())


def test_scores_from_a_server_that_echoes(server: FakeServer, llm: LLM) -> None:
    # "a" "b c" " d" and one generated token; the continuation is "c d", so "b c" crosses into it.
    server.script.append(echoed("ab c d!", ["a", "b c", " d", "!"], [None, -1.0, -0.5, -9.0]))
    score = llm.score("ab ", "c d")
    assert (score.logprob, score.token_logprobs, score.is_greedy) == (-1.5, [-1.0, -0.5], True)
    body = server.bodies()[0]
    assert (body["prompt"], body["echo"], body["max_tokens"]) == ("ab c d", True, 1)
    server.script.extend(
        [echoed("ab!", ["a", "b", "!"], [None, -1.0, 0]), echoed("ac!", ["a", "c", "!"], [None, -2.0, 0])]
    )
    assert llm.choose(["a"], ["b", "c"]) == [[-1.0, -2.0]]


def test_a_server_that_does_not_echo_cannot_score(
    server: FakeServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script.append(echoed("!", ["!"], [-0.1]))  # like a server that ignores echo
    with pytest.raises(UserError, match="does not echo"):
        llm.score("a", "b")
    server.script.append(echoed("b!", ["b", "!"], [None, -0.1]))
    with pytest.raises(UserError, match="score needs a prompt"):
        llm.score("", "b")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(UserError, match="cannot score"):
        LLM("openai:small").score("a", "b")


# Failures


def test_too_many_requests_then_success(server: FakeServer) -> None:
    server.script.extend([error(429, "slow down", retry_after_ms="1"), completion("at last")])
    assert LLM(server.reference, retries=1).chat(HELLO).text == "at last"
    assert len(server.seen) == 2


def test_retry_after_is_honoured(server: FakeServer) -> None:
    server.script.extend([error(503, "busy", retry_after="0.3"), completion("at last")])
    started = time.monotonic()
    LLM(server.reference, retries=1).chat(HELLO)
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (400, ["the request was refused", "400: why"]),
        (401, ["a key is needed; set TERCET_API_KEY", "401: why"]),
        (403, ["not permitted"]),
        (404, ["no such model", "nearest: smaller (404: why"]),
        (422, ["the request was refused"]),
        (429, ["rate limit or quota"]),
        (500, ["the server failed", "500: why"]),
    ],
)
def test_every_status_is_one_line(server: FakeServer, llm: LLM, status: int, parts: list[str]) -> None:
    server.script.extend([error(status, "why\nindeed"), models("smaller", "tiny")])
    with pytest.raises(UserError) as caught:
        llm.chat(HELLO)
    message = one_line(caught)
    assert server.reference in message
    for part in parts:
        assert part in message


def test_a_refused_key_is_not_repeated(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_API_KEY", "sk-verysecret")
    server.script.append(error(401, "Incorrect API key provided: sk-verysecret"))
    with pytest.raises(UserError, match="the server rejects the key") as caught:
        LLM(server.reference).chat(HELLO)
    assert "verysecret" not in one_line(caught)


def test_a_conversation_that_is_too_long_for_the_server(server: FakeServer, llm: LLM) -> None:
    server.script.append(error(400, "8000 tokens, the limit is 4096", code="context_length_exceeded"))
    with pytest.raises(ContextOverflow, match="8000 tokens, the limit is 4096"):
        llm.chat(HELLO)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>welcome</html>", content_type="text/html"),
        Answer(body=b"{not json"),
        Answer(body=b"[]"),
        Answer(body=b"null"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b'{"choices": [{"index": 0}]}'),
        Answer(body=b'{"choices": [{"message": {"content": [1]}}]}'),
        Answer(body=b'{"choices": "none"}'),
        Answer(502, b"<html>bad gateway</html>", content_type="text/html"),
        Answer(500, b""),
        Answer(400, b'{"detail": [{"loc": 1}]}'),
        Answer(400, b'{"error": "a string"}'),
        completion("cut", finish_reason="content_filter"),
    ],
    ids=repr,
)
def test_malformed_answers_are_one_line(server: FakeServer, llm: LLM, answer: Answer) -> None:
    server.script.append(answer)
    with pytest.raises(UserError) as caught:
        llm.chat(HELLO)
    assert server.reference in one_line(caught)


@pytest.mark.parametrize(
    "wire",
    [
        b"data: {oops\n\n",
        b"data: 3\n\n",
        b'data: {"choices": 1}\n\n',
        b'data: {"choices": [{"delta": {"content": [1]}}]}\n\n',
        b"<html>",
    ],
)
def test_malformed_streams_are_one_line(server: FakeServer, llm: LLM, wire: bytes) -> None:
    server.script.append(stream(wire, DONE))
    with pytest.raises(UserError) as caught:
        list(llm.stream("hi"))
    assert server.reference in one_line(caught)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no free worker", "code": 503}},
        {"error": "no free worker"},
        {"detail": "no free worker"},
        {"choices": None, "error": {"message": "no free worker"}},
        {"object": "error", "message": "no free worker"},
    ],
)
def test_an_error_with_status_200_gives_the_servers_own_reason(
    server: FakeServer, llm: LLM, body: dict[str, Any]
) -> None:
    server.script += [Answer(body=json.dumps(body).encode())] * 2
    with pytest.raises(UserError, match="no free worker"):
        llm.generate("x")
    with pytest.raises(UserError, match="no free worker"):
        list(llm.stream("x"))


def test_a_server_that_cannot_be_reached() -> None:
    with pytest.raises(
        UserError, match=r"cannot reach http://127.0.0.1:9/v1.*is the server running"
    ) as caught:
        LLM("http://127.0.0.1:9/v1#x", retries=0).chat(HELLO)
    one_line(caught)


def test_a_server_that_does_not_answer_in_time(server: FakeServer) -> None:
    server.script.append(Answer(delay=5))
    with pytest.raises(UserError, match=r"no answer from .* within 0\.2 s"):
        LLM(server.reference, timeout=0.2, retries=0).chat(HELLO)


# Batches and prices


def test_a_batch_keeps_the_order(server: FakeServer, llm: LLM) -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    assert [answer.text for answer in llm.batch(prompts)] == prompts
    assert llm.batch([]) == []


def test_one_failure_does_not_lose_the_other_answers(
    server: FakeServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def echo_but_three(body: dict[str, Any]) -> Answer:
        text = body["messages"][-1]["content"]
        return error(400, "not this one") if text == "3" else completion(text)

    monkeypatch.setattr(server, "echo", echo_but_three)
    with pytest.raises(
        BatchError, match=r"1 of 5 requests failed; the first, number 4: .*not this one"
    ) as caught:
        llm.batch([str(number) for number in range(5)])
    answers = [answer.text if answer else None for answer in caught.value.completions]
    assert answers == ["0", "1", "2", None, "4"]
    assert list(caught.value.failures) == [3]


def test_a_refused_key_ends_a_batch_early(
    server: FakeServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "echo", lambda body: error(401, "no"))
    with pytest.raises(BatchError, match="200 of 200"):
        llm.batch(["x"] * 200)
    assert len(server.seen) < 30


def test_cost_comes_from_usage_and_price(server: FakeServer) -> None:
    server.script.extend([completion("x", 1_000_000, 500_000), spoken("x"), stream(chunk("x", "stop"), DONE)])
    llm = LLM(server.reference, price=(0.5, 2))
    assert llm.chat(HELLO).usage.cost == pytest.approx(0.5 + 1.0)
    pieces = llm.stream("hi")
    list(pieces)
    assert pieces.completion.usage.cost == pytest.approx((7 * 0.5 + 3 * 2) / 1e6)
    uncounted = llm.stream("hi")
    list(uncounted)
    assert uncounted.completion.usage.cost is None  # unknown, not nothing


# Refusals before any request is sent


def test_an_unknown_setting_names_the_nearest(server: FakeServer, llm: LLM) -> None:
    with pytest.raises(UserError, match="'temprature'; did you mean temperature"):
        llm.chat(HELLO, temprature=1)
    with pytest.raises(UserError, match="`top_p` is 3"):
        llm.chat(HELLO, top_p=3)
    assert server.seen == []


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([], "empty"),
        ("hi", "must be a list"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "usr", "content": "x"}], "'usr'"),
        ([*HELLO, {"role": "assistant", "content": None}], r"messages\[1\] has no content"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"role": "user", "content": "a\udcff"}], "not valid Unicode"),
    ],
)
def test_a_malformed_conversation_is_refused(llm: LLM, messages: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        llm.chat(messages)


def test_options_that_would_do_nothing_are_refused(server: FakeServer) -> None:
    with pytest.raises(
        UserError,
        match="`dtype`, `device`, `quantize`, `threads`, `speculation` and `control_tokens` are for local models",
    ):
        LLM(server.reference, device="cpu")
    with pytest.raises(UserError, match="are for local models"):
        LLM(server.reference, control_tokens="control")
    with pytest.raises(UserError, match="timeout"):
        LLM(server.reference, timeout=0)
    with pytest.raises(UserError, match="price"):
        LLM(server.reference, price=(1, -1))


def test_usage_chunk_after_the_finish_is_read(server: FakeServer, llm: LLM) -> None:
    server.script.append(stream(chunk("x"), chunk(finish="stop"), usage_chunk(40, 2), DONE))
    pieces = llm.stream("hi")
    assert list(pieces) == ["x"]
    assert (pieces.completion.usage.prompt_tokens, pieces.completion.usage.completion_tokens) == (40, 2)


def test_a_server_that_answers_404_to_everything_is_asked_twice(server: FakeServer, llm: LLM) -> None:
    """The second request lists the models, for the nearest name; it gets 404 too, mostly because /v1 is missing."""
    server.script.extend([error(404, "no page here")] * 50)
    with pytest.raises(UserError, match=r"no such model at .*/v1 \(404: no page here\)") as caught:
        llm.chat(HELLO)
    one_line(caught)
    assert [seen.path for seen in server.seen] == ["/v1/chat/completions", "/v1/models"]


def test_a_conversation_is_sent_in_the_protocols_form(server: FakeServer, llm: LLM) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    llm.chat([{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]},
              {"role": "tool", "tool_call_id": "1", "content": "y"}])  # fmt: skip
    user, assistant, _ = server.bodies()[0]["messages"]
    assert user["content"] == parts
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"x": "é"}'


def test_a_last_message_is_continued_by_servers_that_can(server: FakeServer, llm: LLM) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    llm.chat(begun, continue_final_message=True)
    body = server.bodies()[0]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    with pytest.raises(UserError, match="`continue_final_message`"):
        llm.chat(begun)
    llm.chat(HELLO)
    assert "continue_final_message" not in server.bodies()[1]
