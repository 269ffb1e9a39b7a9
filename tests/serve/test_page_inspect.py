"""The page's routes for tokens, comparisons and hosted models, over a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from page_models import SKY
from page_tab import Json, Tab, wait_until, worker_of
from running_server import serve_models

from tercet.engine.request import Completion, Request, Sampling, Usage
from tercet.prompt.settings import CallSettings
from tercet.serve.models import Models, Served
from tercet.serve.web.store import Store

# Inspect


def test_tokens_and_prompt_are_those_of_the_engine(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=8)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    details = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")
    engine = tiny.running.app.state.models.default.local.engine
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    (completion,) = engine.generate(
        [Request(tuple(prompt), Sampling(temperature=0, max_tokens=8, logprobs=10))]
    )
    assert [token["id"] for token in details["prompt"]] == prompt
    assert [token["text"] for token in details["prompt"] if token["special"]] == [
        "<s>",
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert [token["id"] for token in details["tokens"]] == completion.tokens
    for token, expected in zip(details["tokens"], completion.logprobs or [], strict=True):
        assert token["logprob"] == pytest.approx(expected.logprob, abs=1e-6)
        assert [alternative[0] for alternative in token["top"]] == [
            alternative[0] for alternative in expected.top
        ] and len(token["top"]) == 10
    assert (
        b"".join(bytes.fromhex(token["bytes"]) for token in details["tokens"]).decode(errors="replace")
        == message["content"]
    )


def test_an_answer_continued_from_its_own_token_is_the_same_answer(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=12)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    tokens = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    body = {"message": message["id"], "position": 4, "token": tokens[4]["id"]}
    tiny.ask("POST", f"/conversations/{name}/continuations", body)
    again = tiny.settled(name)["turns"][-1]["message"]
    continued = tiny.ask("GET", f"/conversations/{name}/messages/{again['id']}/tokens")["tokens"]
    assert [token["id"] for token in continued[:12]] == [token["id"] for token in tokens]
    assert again["content"].startswith(message["content"].rstrip("\ufffd"))


def test_an_alternative_begins_a_branch_that_the_model_continues(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=6)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    tokens = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    other, _, logprob = next(
        alternative for alternative in tokens[2]["top"] if alternative[0] not in (tokens[2]["id"], 1)
    )
    body = {"message": message["id"], "position": 2, "token": other}
    tiny.ask("POST", f"/conversations/{name}/continuations", body)
    branch = tiny.settled(name)["turns"][-1]["message"]
    details = tiny.ask("GET", f"/conversations/{name}/messages/{branch['id']}/tokens")
    ids = [token["id"] for token in details["tokens"]]
    engine = tiny.running.app.state.models.default.local.engine
    start = [token["id"] for token in details["prompt"]] + ids[:3]
    (completion,) = engine.generate([Request(tuple(start), Sampling(temperature=0, max_tokens=6))])
    assert ids == [tokens[0]["id"], tokens[1]["id"], other, *completion.tokens]
    assert details["tokens"][2]["picked"] and details["tokens"][2]["logprob"] == pytest.approx(logprob)
    assert branch["siblings"] == [message["id"], branch["id"]]


def test_picking_the_end_ends_the_answer_there(tab: Tab) -> None:
    name = tab.begin()
    message = tab.say(name, "hello there")["turns"][-1]["message"]
    details = tab.running.app.state.page.store.details(message["id"])
    end = worker_of(tab).engine.tokenizer.eos_id
    last = len(details.tokens) - 1
    assert details.tokens[last]["id"] == end
    count = len(worker_of(tab).requests)
    tab.ask(
        "POST",
        f"/conversations/{name}/continuations",
        {"message": message["id"], "position": last, "token": end},
    )
    again = tab.settled(name)["turns"][-1]["message"]
    assert again["content"] == message["content"] and again["finish"] == "stop"
    assert len(worker_of(tab).requests) == count, "nothing is left to be generated"


def test_a_character_of_several_tokens_is_whole_in_the_text_and_in_bytes_by_token(tab: Tab) -> None:
    name = tab.begin()
    message = tab.say(name, "emoji")["turns"][-1]["message"]
    assert message["content"] == "A fish: 🐟, done."
    tokens = tab.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    inside = next(n for n, token in enumerate(tokens) if token["bytes"] == "f0")
    tab.ask(
        "POST", f"/conversations/{name}/continuations", {"message": message["id"], "position": inside + 2}
    )
    assert tab.settled(name)["turns"][-1]["message"]["content"].startswith("A fish: ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"position": 999}, "there is no token 999"),
        ({"position": -1}, "there is no token -1"),
        ({"position": 0, "token": 1_000_000}, "not among the alternatives"),
    ],
)
def test_a_place_that_is_not_there_is_told(tab: Tab, body: Json, said: str) -> None:
    name = tab.begin()
    message = tab.say(name, "hi")["turns"][-1]["message"]
    path = f"/conversations/{name}/continuations"
    answer = tab.ask("POST", path, {"message": message["id"], **body}, status=400)
    assert said in answer["error"]["message"]


def test_a_stop_string_that_begins_before_the_continuation_ends_it(tab: Tab) -> None:
    name = tab.begin(max_tokens=8)
    message = tab.say(name, "sky")["turns"][-1]["message"]
    texts = [
        token["text"]
        for token in tab.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    ]
    name = tab.begin(max_tokens=4, stop=["".join(texts[3:5])])
    cut = tab.say(name, "sky")["turns"][-1]["message"]
    assert cut["finish"] == "length" and cut["content"] == "".join(texts[:4])
    tab.ask("POST", f"/conversations/{name}/continuations", {"message": cut["id"], "position": 4})
    whole = tab.settled(name)["turns"][-1]["message"]
    assert (whole["finish"], whole["content"]) == ("stop", "".join(texts[:3]))
    assert whole["summary"]["tokens"] == 5


# Compare


def test_two_models_answer_the_same_and_a_vote_decides_how_it_goes_on(tab: Tab) -> None:
    name = tab.begin(model="tiny-chat", against="tiny-tuned")
    view = tab.say(name, "sky")
    pair = view["turns"][1]["pair"]
    assert (pair["left"]["model"], pair["right"]["model"]) == ("tiny-chat", "tiny-tuned")
    assert pair["left"]["siblings"] == [pair["left"]["id"]], "the other answer is no branch of it"
    view = tab.ask("POST", f"/conversations/{name}/votes", {"comparison": pair["id"], "vote": "right"})
    assert view["turns"][1]["pair"]["chosen"] == "right"
    tab.say(name, "more")
    prompts = [worker_of(tab, model).requests[-1].tokens for model in ("tiny-chat", "tiny-tuned")]
    assert prompts[0] == prompts[1] and "That is all." in worker_of(tab).engine.tokenizer.decode(prompts[0])
    answer = tab.http.get("/page/api/preferences")
    (row,) = map(json.loads, answer.text.splitlines())
    assert row["prompt"] == [{"role": "user", "content": "sky"}] and row["chosen_model"] == "tiny-tuned"
    assert "attachment" in answer.headers["content-disposition"]


def test_a_blind_comparison_names_nobody_until_the_vote(tab: Tab) -> None:
    name = tab.begin(model="tiny-chat", against="tiny-tuned", blind=True)
    pair = tab.say(name, "sky")["turns"][1]["pair"]
    assert pair["hidden"] and pair["left"]["model"] is None and pair["right"]["model"] is None
    view = tab.ask("POST", f"/conversations/{name}/votes", {"comparison": pair["id"], "vote": "tie"})
    pair = view["turns"][1]["pair"]
    assert {pair["left"]["model"], pair["right"]["model"]} == {"tiny-chat", "tiny-tuned"}


def test_when_one_of_two_fails_the_other_stays(tab: Tab) -> None:
    name = tab.begin(model="tiny-chat", against="tiny-tuned")
    worker_of(tab, "tiny-tuned").problem = RuntimeError("x")
    view = tab.say(name, "sky")
    assert view["turns"][1]["message"]["content"] == SKY


# Hosted models


class Hosted:
    """A model behind another server."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, Json]] = []
        self.go_on = threading.Event()

    def stream(self, messages: Any, settings: CallSettings) -> Iterator[str | Completion]:
        self.requests.append((messages, settings.sent))
        yield "Hello "
        self.go_on.wait(5)
        yield "**you**"
        yield Completion("Hello **you**", [], None, Usage(7, 3), "stop", 0.1)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_hosted_model_streams_is_sent_what_was_set_and_can_be_stopped(store: Store, stopped: bool) -> None:
    hosted: Any = Hosted()
    with serve_models(Models([Served("far", hosted=hosted)]), store=store) as running:
        tab = Tab(running)
        name = tab.begin(top_p=0.5, system="S")
        tab.say(name, "hi", wait=False)
        wait_until(lambda: tab.running.app.state.page.answers.of(name)[0].text == "Hello ")
        if stopped:
            tab.ask("POST", f"/conversations/{name}/stop", {})
        hosted.go_on.set()
        answer = tab.settled(name)["turns"][-1]["message"]
    assert hosted.requests[0][1] == {"top_p": 0.5, "max_tokens": 1024}
    assert hosted.requests[0][0][0] == {"role": "system", "content": "S"}
    if stopped:
        assert answer["content"] == "Hello " and answer["finish"] == "stopped"
    else:
        assert answer["blocks"] == ["<p>Hello <strong>you</strong></p>"]
        assert answer["summary"]["usage"]["prompt_tokens"] == 7
