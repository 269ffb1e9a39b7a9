"""The page's routes, over a real server: a small random model where tokens are compared, scripted models elsewhere."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from page_models import CONTEXT, SKY, SLOW, scripted_models
from page_tab import Json, Tab, wait_until, worker_of
from running_server import serve_models

from tercet.engine.request import Sampling
from tercet.serve.settings import Settings, hash_key
from tercet.serve.web.store import Store

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

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return finish(*arguments, **options)

    monkeypatch.setattr(store, "finish", slow)
    worker_of(tab).delay = 0.005
    name = tab.begin()
    tab.say(name, "slow", wait=False)
    wait_until(lambda: len(tab.running.app.state.page.answers.of(name)[0].tokens) > 5)
    stops = [
        threading.Thread(target=Tab(tab.running).ask, args=("POST", f"/conversations/{name}/stop", {}))
        for _ in range(2)
    ]
    for thread in stops:
        thread.start()
        time.sleep(0.1)  # the second request arrives while the first is stored
    for thread in stops:
        thread.join()
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
    (conversation,) = store.conversations()
    answer = store.history(conversation.leaf)[-1]
    assert answer.finish == "interrupted" and SLOW.startswith(answer.content)


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
