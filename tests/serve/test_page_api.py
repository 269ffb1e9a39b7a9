"""The page's routes, over a real server: a small random model where its tokens matter, scripts elsewhere."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_models import CONTEXT, SKY, SLOW, ScriptedWorker, scripted_models
from running_server import Running, local_model, serve_models

from tercet.engine.request import Completion, Request, Sampling, Usage
from tercet.prompt.settings import CallSettings
from tercet.serve.models import Models, Served
from tercet.serve.settings import Settings, hash_key
from tercet.serve.web.store import Store

Json = dict[str, Any]


class Tab:
    """What a tab of the browser does, without the browser."""

    def __init__(self, running: Running) -> None:
        self.running, self.http = running, running.http()

    def ask(self, method: str, path: str, body: Json | None = None, status: int = 200) -> Any:
        answer = self.http.request(method, f"/page/api{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def begin(self, kind: str = "chat", **settings: Any) -> str:
        made = self.ask("POST", "/conversations", {"kind": kind, "settings": settings})
        return str(made["conversation"]["id"])

    def view(self, name: str) -> Json:
        found: Json = self.ask("GET", f"/conversations/{name}")
        return found

    def say(self, name: str, content: str, wait: bool = True) -> Json:
        leaf = self.view(name)["conversation"]["leaf"]
        self.ask("POST", f"/conversations/{name}/messages", {"content": content, "parent": leaf})
        return self.settled(name) if wait else self.view(name)

    def settled(self, name: str) -> Json:
        """The view when nothing is being written any more."""
        page = self.running.app.state.page
        wait_until(lambda: not page.answers.of(name))
        return self.view(name)

    def last(self, name: str) -> Json:
        found: Json = self.view(name)["turns"][-1]["message"]
        return found

    @contextlib.contextmanager
    def events(self, name: str) -> Iterator[Iterator[Json]]:
        with self.http.stream("GET", f"/page/api/conversations/{name}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            yield (json.loads(line.removeprefix("data: ")) for line in lines)


def wait_until(ready: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.005)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "chat.db")
    yield store
    store.close()


@pytest.fixture
def tab(store: Store) -> Iterator[Tab]:
    with serve_models(scripted_models(), store=store) as running:
        yield Tab(running)


@pytest.fixture
def tiny(store: Store, tiny_directory: Path) -> Iterator[Tab]:
    with serve_models(Models([local_model("tiny", tiny_directory)]), store=store) as running:
        yield Tab(running)


def worker_of(tab: Tab, name: str = "tiny-chat") -> ScriptedWorker:
    found: ScriptedWorker = tab.running.app.state.models.get(name).local
    return found


# Talking


def test_a_message_is_answered_rendered_and_stored(tab: Tab) -> None:
    name = tab.begin(system="Be brief.", temperature=0.5)
    view = tab.say(name, "Why is the sky blue?")
    question, answer = (turn["message"] for turn in view["turns"])
    assert question["role"] == "user" and "blocks" not in question
    assert answer["content"] == SKY and answer["finish"] == "stop" and answer["model"] == "tiny-chat"
    assert len(answer["blocks"]) == 4 and "<strong>short</strong>" in answer["blocks"][0]
    assert answer["settings"] == {"system": "Be brief.", "temperature": 0.5, "max_tokens": 1024}
    prompt = worker_of(tab).engine.tokenizer.decode(worker_of(tab).requests[0].tokens, skip_special=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert worker_of(tab).requests[0].sampling == Sampling(temperature=0.5, max_tokens=1024, logprobs=10)


def test_the_conversation_so_far_goes_before_each_message(tab: Tab) -> None:
    name = tab.begin()
    tab.say(name, "one")
    tab.say(name, "two")
    prompt = worker_of(tab).engine.tokenizer.decode(worker_of(tab).requests[1].tokens, skip_special=True)
    assert prompt == "user\none\nassistant\nYou said: one\nuser\ntwo\nassistant\n"


def test_an_answer_stops_with_what_came_and_can_be_continued(tab: Tab) -> None:
    worker_of(tab).delay = 0.005
    name = tab.begin()
    tab.say(name, "slow", wait=False)
    wait_until(lambda: len(tab.running.app.state.page.answers.of(name)[0].tokens) > 5)
    tab.ask("POST", f"/conversations/{name}/stop", {})
    stopped = tab.last(name)
    assert stopped["finish"] == "stopped" and SLOW.startswith(stopped["content"]) and stopped["content"]
    assert worker_of(tab).cancelled == 1
    worker_of(tab).delay = 0
    position = stopped["summary"]["tokens"]
    tab.ask("POST", f"/conversations/{name}/continuations", {"message": stopped["id"], "position": position})
    whole = tab.settled(name)["turns"][-1]["message"]
    assert whole["content"] == SLOW and whole["siblings"] == [stopped["id"], whole["id"]]


def test_who_stops_twice_breaks_nothing(tab: Tab, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = store.finish

    def slow(*given: Any, **more: Any) -> Any:
        time.sleep(0.3)
        return finish(*given, **more)

    monkeypatch.setattr(store, "finish", slow)
    worker_of(tab).delay = 0.005
    name = tab.begin()
    tab.say(name, "slow", wait=False)
    wait_until(lambda: len(tab.running.app.state.page.answers.of(name)[0].tokens) > 5)
    stops = [
        threading.Thread(target=Tab(tab.running).ask, args=("POST", f"/conversations/{name}/stop", {}))
        for _ in range(2)
    ]
    for one in stops:
        one.start()
        time.sleep(0.1)  # the first one is being stored when the second comes
    for one in stops:
        one.join()
    assert tab.settled(name)["turns"][-1]["message"]["finish"] == "stopped"


def test_an_answer_is_asked_for_no_longer_than_the_context_leaves(tab: Tab) -> None:
    name = tab.begin(max_tokens=10**6)
    message = tab.say(name, "hi")["turns"][-1]["message"]
    path = f"/conversations/{name}/continuations"
    tab.ask("POST", path, {"message": message["id"], "position": 1})
    tab.settled(name)
    for request in worker_of(tab).requests:
        assert len(request.tokens) + request.sampling.max_tokens - 1 == CONTEXT


def test_another_answer_and_an_edit_are_branches_and_each_is_found_as_it_was_left(tab: Tab) -> None:
    name = tab.begin(seed=1)
    tab.say(name, "one")
    tab.say(name, "two")
    first = tab.view(name)["turns"][0]["message"]
    tab.ask("POST", f"/conversations/{name}/edits", {"message": first["id"], "content": "other"})
    view = tab.settled(name)
    assert [turn["message"]["content"] for turn in view["turns"]] == ["other", "You said: other"]
    other = view["turns"][0]["message"]
    assert other["siblings"] == [first["id"], other["id"]]
    view = tab.ask("PATCH", f"/conversations/{name}", {"show": first["id"]})
    assert [turn["message"]["content"] for turn in view["turns"]] == [
        "one",
        "You said: one",
        "two",
        "You said: two",
    ]
    tab.ask("PATCH", f"/conversations/{name}", {"settings": {"seed": 2}})
    answer = view["turns"][1]["message"]
    tab.ask("POST", f"/conversations/{name}/answers", {"parent": first["id"]})
    again = tab.settled(name)["turns"][1]["message"]
    assert again["siblings"] == [answer["id"], again["id"]] and again["settings"]["seed"] == 2


def test_an_edited_answer_is_what_the_model_reads_next(tab: Tab) -> None:
    name = tab.begin()
    answer = tab.say(name, "one")["turns"][1]["message"]
    tab.ask("POST", f"/conversations/{name}/edits", {"message": answer["id"], "content": "I say no."})
    tab.say(name, "two")
    prompt = worker_of(tab).engine.tokenizer.decode(worker_of(tab).requests[-1].tokens)
    assert "I say no." in prompt and "You said: one" not in prompt


def test_a_base_model_continues_a_text_and_goes_on_without_more_of_it(tab: Tab) -> None:
    name = tab.begin("text", model="tiny-base")
    tab.say(name, "At night")
    leaf = tab.view(name)["conversation"]["leaf"]
    tab.ask("POST", f"/conversations/{name}/messages", {"content": "", "parent": leaf})
    view = tab.settled(name)
    contents = [turn["message"]["content"] for turn in view["turns"]]
    requests = worker_of(tab, "tiny-base").requests
    assert worker_of(tab).engine.tokenizer.decode(requests[1].tokens) == contents[0] + contents[1]
    assert requests[0].sampling.max_tokens == 200 and "blocks" not in view["turns"][1]["message"]


# Streaming


def test_a_tab_that_comes_late_sees_what_there_is_and_then_the_rest(tab: Tab) -> None:
    worker_of(tab).delay = 0.002
    name = tab.begin()
    tab.say(name, "sky", wait=False)
    wait_until(lambda: len(tab.running.app.state.page.answers.of(name)[0].tokens) > 20)
    with tab.events(name) as events:
        here = next(events)
        assert here["type"] == "here"
        (answer,) = here["answers"]
        assert answer["tokens"] and answer["blocks"]
        blocks, tokens = answer["blocks"], answer["tokens"]
        pieces = 0
        for event in events:
            if event["type"] == "piece":
                pieces += 1
                blocks = blocks[: event["keep"]] + event["blocks"]
                tokens += event["tokens"]
            if event["type"] == "ended":
                break
    message = tab.last(name)
    assert pieces > 1 and event["message"] == message["id"]
    assert blocks == message["blocks"] and len(tokens) == message["summary"]["tokens"]


def test_an_answer_goes_on_without_any_tab_and_those_who_left_are_forgotten(tab: Tab) -> None:
    worker_of(tab).delay = 0.002
    name = tab.begin()
    with tab.events(name) as events:
        next(events)
        tab.say(name, "sky", wait=False)
    assert tab.settled(name)["turns"][-1]["message"]["content"] == SKY
    wait_until(lambda: not tab.running.app.state.page.answers._watchers)


def test_two_tabs_are_told_of_each_others_changes(tab: Tab) -> None:
    name = tab.begin()
    with tab.events(name) as events:
        next(events)
        tab.ask("PATCH", f"/conversations/{name}", {"title": "  New \n name "})
        assert next(events) == {"type": "changed"}
    assert tab.view(name)["conversation"]["title"] == "New name"


def test_a_failure_in_the_middle_keeps_what_came_and_says_why(tab: Tab) -> None:
    name = tab.begin()
    worker_of(tab).problem = RuntimeError("secret path")
    with tab.events(name) as events:
        next(events)
        tab.say(name, "sky")
        ended = next(event for event in events if event["type"] == "ended")
    assert "RuntimeError" in ended["error"] and "secret" not in ended["error"] and ended["message"] is None
    assert [turn["message"]["role"] for turn in tab.view(name)["turns"]] == ["user"]


def test_the_end_of_the_server_ends_the_streams_and_keeps_the_answers(store: Store) -> None:
    with serve_models(scripted_models(0.01), store=store) as running:
        tab = Tab(running)
        name = tab.begin()
        seen: list[Json] = []

        def watch() -> None:
            with Tab(running).events(name) as events:
                seen.extend(events)

        watcher = threading.Thread(target=watch)
        watcher.start()
        wait_until(lambda: bool(seen))
        tab.say(name, "slow", wait=False)
        wait_until(lambda: any(event["type"] == "piece" for event in seen))
        began = time.monotonic()
        running.stop()
        running.thread.join(10)
        watcher.join(10)
        assert time.monotonic() - began < 3
    (one,) = store.conversations()
    answer = store.history(one.leaf)[-1]
    assert answer.finish == "interrupted" and SLOW.startswith(answer.content)


# Inspect


def test_tokens_and_prompt_are_those_of_the_engine(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=8)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    found = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")
    engine = tiny.running.app.state.models.default.local.engine
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    (completion,) = engine.generate(
        [Request(tuple(prompt), Sampling(temperature=0, max_tokens=8, logprobs=10))]
    )
    assert [token["id"] for token in found["prompt"]] == prompt
    assert [token["text"] for token in found["prompt"] if token["special"]] == [
        "<s>",
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert [token["id"] for token in found["tokens"]] == completion.tokens
    for token, expected in zip(found["tokens"], completion.logprobs or [], strict=True):
        assert token["logprob"] == pytest.approx(expected.logprob, abs=1e-6)
        assert [one[0] for one in token["top"]] == [one[0] for one in expected.top] and len(
            token["top"]
        ) == 10
    assert (
        b"".join(bytes.fromhex(token["bytes"]) for token in found["tokens"]).decode(errors="replace")
        == message["content"]
    )


def test_an_answer_continued_from_its_own_token_is_the_same_answer(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=12)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    tokens = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    body = {"message": message["id"], "position": 4, "token": tokens[4]["id"]}
    tiny.ask("POST", f"/conversations/{name}/continuations", body)
    again = tiny.settled(name)["turns"][-1]["message"]
    found = tiny.ask("GET", f"/conversations/{name}/messages/{again['id']}/tokens")["tokens"]
    assert [token["id"] for token in found[:12]] == [token["id"] for token in tokens]
    assert again["content"].startswith(message["content"].rstrip("\ufffd"))


def test_an_alternative_begins_a_branch_that_the_model_continues(tiny: Tab) -> None:
    name = tiny.begin(temperature=0, max_tokens=6)
    message = tiny.say(name, "hi")["turns"][-1]["message"]
    tokens = tiny.ask("GET", f"/conversations/{name}/messages/{message['id']}/tokens")["tokens"]
    other, _, logprob = next(one for one in tokens[2]["top"] if one[0] not in (tokens[2]["id"], 1))
    body = {"message": message["id"], "position": 2, "token": other}
    tiny.ask("POST", f"/conversations/{name}/continuations", body)
    branch = tiny.settled(name)["turns"][-1]["message"]
    found = tiny.ask("GET", f"/conversations/{name}/messages/{branch['id']}/tokens")
    ids = [token["id"] for token in found["tokens"]]
    engine = tiny.running.app.state.models.default.local.engine
    start = [token["id"] for token in found["prompt"]] + ids[:3]
    (completion,) = engine.generate([Request(tuple(start), Sampling(temperature=0, max_tokens=6))])
    assert ids == [tokens[0]["id"], tokens[1]["id"], other, *completion.tokens]
    assert found["tokens"][2]["picked"] and found["tokens"][2]["logprob"] == pytest.approx(logprob)
    assert branch["siblings"] == [message["id"], branch["id"]]


def test_picking_the_end_ends_the_answer_there(tab: Tab) -> None:
    name = tab.begin()
    message = tab.say(name, "hello there")["turns"][-1]["message"]
    details = tab.running.app.state.page.store.details(message["id"])
    end = worker_of(tab).engine.tokenizer.eos_id
    last = len(details.tokens) - 1
    assert details.tokens[last]["id"] == end
    asked = len(worker_of(tab).requests)
    tab.ask(
        "POST",
        f"/conversations/{name}/continuations",
        {"message": message["id"], "position": last, "token": end},
    )
    again = tab.settled(name)["turns"][-1]["message"]
    assert again["content"] == message["content"] and again["finish"] == "stop"
    assert len(worker_of(tab).requests) == asked, "nothing is left to be generated"


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
    told = tab.say(name, "sky")["turns"][-1]["message"]
    texts = [
        one["text"] for one in tab.ask("GET", f"/conversations/{name}/messages/{told['id']}/tokens")["tokens"]
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
        self.asked: list[tuple[Any, Json]] = []
        self.go_on = threading.Event()

    def stream(self, messages: Any, settings: CallSettings) -> Iterator[str | Completion]:
        self.asked.append((messages, settings.sent))
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
    assert hosted.asked[0][1] == {"top_p": 0.5, "max_tokens": 1024}
    assert hosted.asked[0][0][0] == {"role": "system", "content": "S"}
    if stopped:
        assert answer["content"] == "Hello " and answer["finish"] == "stopped"
    else:
        assert answer["blocks"] == ["<p>Hello <strong>you</strong></p>"]
        assert answer["summary"]["usage"]["prompt_tokens"] == 7


# What is refused


def test_a_conversation_that_is_too_long_is_refused_with_the_counts_and_nothing_is_stored(tiny: Tab) -> None:
    name = tiny.begin()
    body = {"content": "x" * 500, "parent": None}
    error = tiny.ask("POST", f"/conversations/{name}/messages", body, status=400)["error"]
    assert error["code"] == "context_length_exceeded" and "96" in error["message"]
    assert tiny.view(name)["turns"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/conversations/nothing", None, 404),
        ("DELETE", "/conversations/nothing", {}, 404),
        ("POST", "/conversations/nothing/messages", {"content": "x"}, 404),
        ("POST", "/conversations", {"settings": {"temperature": -1}}, 400),
        ("POST", "/conversations", {"settings": {"temprature": 1}}, 400),
        ("POST", "/conversations", {"settings": {"stop": "x"}}, 400),
        ("POST", "/conversations", {"settings": {"system": 5}}, 400),
        ("POST", "/conversations", {"settings": {"system": "\ud800"}}, 400),
        ("POST", "/conversations", {"settings": {"seed": 1e400}}, 400),
        ("POST", "/conversations", {"kind": "call"}, 400),
        ("POST", "/conversations", {"colour": "red"}, 400),
        ("POST", "/conversations/{}/messages", {"content": "   "}, 400),
        ("POST", "/conversations/{}/messages", {"content": "\ud800"}, 400),
        ("POST", "/conversations/{}/messages", {"content": "x", "parent": "nothing"}, 404),
        ("POST", "/conversations/{}/messages", {"content": 7}, 400),
        ("POST", "/conversations/{}/answers", {"parent": "nothing"}, 404),
        ("POST", "/conversations/{}/answers", {"parent": "\ud800"}, 400),
        ("POST", "/conversations/{}/edits", {"message": "nothing", "content": "x"}, 404),
        ("POST", "/conversations/{}/votes", {"comparison": "nothing", "vote": "left"}, 404),
        ("POST", "/conversations/{}/continuations", {"message": "nothing", "position": 0}, 404),
        ("PATCH", "/conversations/{}", {"show": "nothing"}, 404),
        ("GET", "/conversations/{}/messages/nothing/tokens", None, 404),
        ("GET", "/conversations/{}/export?form=pdf", None, 400),
    ],
)
def test_what_makes_no_sense_is_an_error_of_the_client(
    tab: Tab, method: str, path: str, body: Json | None, status: int
) -> None:
    name = tab.begin()
    answer = tab.http.request(method, f"/page/api{path.format(name)}", content=json.dumps(body) if body else None,
                              headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_that_is_not_served_any_more_is_told_and_another_can_be_chosen(tab: Tab) -> None:
    name = tab.begin(model="gone")
    error = tab.ask("POST", f"/conversations/{name}/messages", {"content": "hi"}, status=404)["error"]
    assert error["code"] == "model_not_found"
    tab.ask("PATCH", f"/conversations/{name}", {"settings": {"model": "tiny-chat"}})
    assert tab.say(name, "hi")["turns"][-1]["message"]["content"] == "You said: hi"


def test_a_base_model_does_not_chat_and_says_what_it_does(tab: Tab) -> None:
    name = tab.begin(model="tiny-base")
    error = tab.ask("POST", f"/conversations/{name}/messages", {"content": "hi"}, status=400)["error"]
    assert "continues text" in error["message"]


def test_another_site_can_change_nothing(tab: Tab) -> None:
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert tab.http.post("/page/api/conversations", json={}, headers=headers).status_code == 403
    headers = {"host": "evil.example"}
    assert tab.http.get("/page/api/conversations", headers=headers).status_code == 403
    assert tab.ask("GET", "/conversations")["conversations"] == []


def test_with_a_key_the_page_is_there_and_its_data_is_not_until_the_key_is_given(store: Store) -> None:
    settings = Settings(keys=(hash_key("correct horse"),))
    with serve_models(scripted_models(), settings, store) as running:
        http = running.http()
        assert http.get("/").status_code == 200 and http.get("/page/app.js").status_code == 200
        assert http.get("/page/api/conversations").status_code == 401
        assert http.post("/page/login", json={"key": "wrong"}).status_code == 401
        assert http.post("/page/login", json={"key": "correct horse"}).status_code == 200
        assert http.get("/page/api/conversations").status_code == 200


# Lists, export, files


def test_conversations_are_searched_deleted_and_brought_back(tab: Tab) -> None:
    name = tab.begin()
    tab.say(name, "Where is Lisbon?")
    (row,) = tab.ask("GET", "/conversations?search=lisb")["conversations"]
    assert row["id"] == name and row["passage"] == ""
    (row,) = tab.ask("GET", "/conversations?search=said")["conversations"]
    assert "You said" in row["passage"]
    tab.ask("DELETE", f"/conversations/{name}", {})
    assert tab.ask("GET", "/conversations")["conversations"] == []
    tab.ask("POST", f"/conversations/{name}/restore", {})
    assert len(tab.view(name)["turns"]) == 2


def test_a_conversation_is_exported(tab: Tab) -> None:
    name = tab.begin()
    tab.say(name, "hi")
    answer = tab.http.get(f"/page/api/conversations/{name}/export?form=markdown")
    assert answer.text.startswith("# hi\n") and answer.headers["content-type"].startswith("text/markdown")
    exported = tab.http.get(f"/page/api/conversations/{name}/export").json()
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"]


def test_the_files_come_with_headers_that_let_nothing_else_in(tab: Tab) -> None:
    for path in ("/", "/page/app.js", "/page/page.css", "/page/api/models"):
        headers = tab.http.get(path).headers
        policy = headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    index = tab.http.get("/").text
    assert "style=" not in index and "<style" not in index and " onclick" not in index and "http" not in index
    tag = tab.http.get("/page/page.css").headers["etag"]
    assert tab.http.get("/page/page.css", headers={"if-none-match": tag}).status_code == 304


@pytest.mark.parametrize(
    "name", ["app.py", "..%2fapp.py", "%2e%2e/store.py", "..\\store.py", "index.html%00", ""]
)
def test_only_the_files_of_the_page_are_served(tab: Tab, name: str) -> None:
    assert tab.http.get(f"/page/{name}").status_code in (404, 400)
