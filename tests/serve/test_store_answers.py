"""Answers in the store: drafts while they are written, comparisons, votes and exports."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stored_tokens import token

from tercet.errors import UserError
from tercet.serve.web.chat_export import as_json, as_markdown, preference_pairs
from tercet.serve.web.conversations import NotThere
from tercet.serve.web.records import Details
from tercet.serve.web.store import Store

# Answers being written


def test_a_draft_becomes_a_message_with_all_that_is_known_of_it(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    draft = store.begin(conversation.id, question.id, "m", {"temperature": 0.5}, prompt=[7, 8])
    store.write(draft, "hel", [token(1, "hel")])
    store.write(draft, "lo", [token(2, "lo")])
    answer = store.finish(draft, "stop", usage={"completion_tokens": 2}, seconds=1.5, first_seconds=0.5)
    assert answer is not None and answer.content == "hello" and answer.finish == "stop"
    assert store.conversation(conversation.id).leaf == answer.id
    details = store.details(answer.id)
    assert details is not None and details.prompt == [7, 8] and details.seconds == 1.5
    assert [entry["text"] for entry in details.tokens] == ["hel", "lo"]
    assert store.details(question.id) is None


def test_surprise_and_entropy_of_an_answer_are_in_bits() -> None:
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    tokens = [
        {"id": 1, "logprob": half, "top": [[1, "a", half], [2, "b", half]], "entropy": math.log(2)},
        {
            "id": 2,
            "logprob": quarter,
            "top": [[1, "a", half], [2, "b", quarter]],
            "entropy": 1.5 * math.log(2),
        },
    ]
    summary = Details(tokens=tokens).summary()
    assert summary["surprise"] == pytest.approx((1 + 2) / 2)
    assert summary["entropy"] == pytest.approx((1 + 1.5) / 2)


def test_a_draft_of_which_nothing_came_leaves_no_message(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    assert store.finish(store.begin(conversation.id, question.id, "m", {}), "stopped") is None
    assert store.conversation(conversation.id).leaf == question.id


def test_an_answer_that_ends_does_not_take_the_user_off_another_branch(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    draft = store.begin(conversation.id, question.id, "m", {})
    store.write(draft, "hello", [])
    other = store.add(conversation.id, None, "user", "something else")
    store.finish(draft, "stop")
    assert store.conversation(conversation.id).leaf == other.id and len(store.tree(conversation.id)) == 3


def test_an_answer_to_a_deleted_conversation_is_dropped(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    draft = store.begin(conversation.id, question.id, "m", {})
    store.delete(conversation.id)
    store.purge(older_than=0)
    store.write(draft, "hello", [])
    assert store.finish(draft, "stop") is None


def test_a_comparison_in_a_deleted_conversation_does_not_keep_the_store_from_opening(
    store_path: Path,
) -> None:
    store = Store(store_path)
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    name = store.compare(conversation.id, question.id)
    left, _ = [
        store.begin(conversation.id, question.id, "m", {}, comparison=(name, side))
        for side in ("left", "right")
    ]
    store.write(left, "hello", [])
    store.finish(left, "stop")
    store.delete(conversation.id)
    store.close()
    after = Store(store_path)
    assert after.conversations() == []
    after.close()


WRITER = """
import sys, time
from tercet.serve.web.store import Store
store = Store(sys.argv[1])
conversation = store.create()
question = store.add(conversation.id, None, "user", "count")
draft = store.begin(conversation.id, question.id, "m", {"temperature": 1}, prompt=[3])
for number in range(1000):
    token = {"id": number, "text": f"{number} ", "bytes": "", "logprob": -1.0, "top": [], "entropy": 1.0}
    store.write(draft, f"{number} ", [token])
    print(number, flush=True)
    time.sleep(0.01)
"""


def test_what_came_of_an_answer_survives_a_kill_and_is_marked(store_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    seen = [writer.stdout.readline().strip() for _ in range(5)]
    beside = Store(store_path)
    (conversation,) = beside.conversations()
    assert beside.recover() == [] and len(beside.tree(conversation.id)) == 1, (
        "its process still runs and goes on writing"
    )
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    beside.close()
    after = Store(store_path)
    answer = after.history(after.conversation(conversation.id).leaf)[-1]
    assert answer.finish == "interrupted" and answer.content.startswith(" ".join(seen))
    details = after.details(answer.id)
    assert details is not None and details.prompt == [3]
    assert "".join(entry["text"] for entry in details.tokens) == answer.content
    assert list(store_path.with_name("chat.db.owners").iterdir()) != [], "the mark of the running process"
    after.close()
    assert list(store_path.with_name("chat.db.owners").iterdir()) == []


def test_two_processes_write_at_the_same_time(store_path: Path) -> None:
    program = (
        "import sys\nfrom tercet.serve.web.store import Store\nstore = Store(sys.argv[1])\n"
        "name = store.create().id\n"
        "for n in range(60): store.add(name, store.conversation(name).leaf, 'user', sys.argv[2] + str(n))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(store_path), name]) for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = Store(store_path)
    for conversation in store.conversations():
        history = [message.content for message in store.history(conversation.leaf)]
        assert history == [f"{history[0][0]}{number}" for number in range(60)]
    assert len(store.conversations()) == 2
    store.close()


def test_threads_take_turns(store: Store) -> None:
    conversation = store.create()

    def write(name: str) -> None:
        for number in range(30):
            store.add(conversation.id, None, "user", f"{name}{number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.tree(conversation.id)) == 90


# Comparisons


def add_comparison(store: Store, vote: str | None, kind: str = "chat", right: str = "worse") -> str:
    conversation = store.create(kind)
    question = store.add(conversation.id, None, "user", "hi")
    name = store.compare(conversation.id, question.id)
    drafts = [
        store.begin(conversation.id, question.id, model, {"system": "Be kind."}, comparison=(name, side))
        for model, side in (("base", "left"), ("tuned", "right"))
    ]
    for draft, text in zip(drafts, ("better", right), strict=True):
        store.write(draft, text, [])
        store.finish(draft, "stop")
    store.settle(name)
    if vote:
        store.vote(conversation.id, name, vote)
    return conversation.id


@pytest.mark.parametrize(
    ("vote", "leaf"), [(None, "better"), ("left", "better"), ("right", "worse"), ("tie", "better")]
)
def test_the_conversation_goes_on_from_the_better_answer(store: Store, vote: str | None, leaf: str) -> None:
    conversation = add_comparison(store, vote)
    assert store.history(store.conversation(conversation).leaf)[-1].content == leaf
    assert store.comparisons(conversation)[0].vote == vote


def test_a_vote_must_be_one_of_four_and_needs_both_answers(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    name = store.compare(conversation.id, question.id)
    with pytest.raises(UserError, match="both answers"):
        store.vote(conversation.id, name, "left")
    with pytest.raises(UserError, match="left, right, tie, both_bad"):
        store.vote(conversation.id, name, "up")
    with pytest.raises(NotThere):
        store.vote(conversation.id, "no such", "left")


def test_votes_are_exported_as_preference_pairs(store: Store) -> None:
    for vote in ("right", "left", "tie", "both_bad", None):
        add_comparison(store, vote)
    add_comparison(store, "left", right="better")  # equal answers: no preference
    add_comparison(store, "right", kind="text")
    first, second, third = preference_pairs(store)
    assert first == {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "worse"}],
        "rejected": [{"role": "assistant", "content": "better"}],
        "chosen_model": "tuned",
        "rejected_model": "base",
    }
    assert second["chosen"][0]["content"] == "better"
    assert third["prompt"] == "hi" and third["chosen"] == "worse"


# Export


def test_an_export_has_all_branches_as_json_and_the_shown_one_as_markdown(store: Store) -> None:
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "Say *hi*")
    for text, finish in (("hello", "stop"), ("hey", "length")):
        store.add(
            conversation.id,
            question.id,
            "assistant",
            text,
            model="m",
            settings={"system": "S"},
            finish=finish,
        )
    exported = json.loads(json.dumps(as_json(store, conversation.id)))
    assert [message["content"] for message in exported["messages"]] == ["Say *hi*", "hello", "hey"]
    assert {message.get("parent") for message in exported["messages"]} == {None, question.id}
    assert exported["leaf"] == exported["messages"][2]["id"]
    assert as_markdown(store, conversation.id) == (
        "# Say *hi*\n\n## System\n\nS\n\n## You\n\nSay *hi*\n\n## m\n\nhey\n\n*(length)*\n"
    )
