from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.errors import UserError
from tercet.serve.web.chat_export import as_json, as_markdown, preference_pairs
from tercet.serve.web.conversations import NotThere
from tercet.serve.web.records import Details, address
from tercet.serve.web.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chat.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def token(number: int, text: str) -> dict[str, object]:
    return {
        "id": number, "text": text, "bytes": text.encode().hex(), "logprob": -0.5, "top": [[number, text, -0.5]],
        "entropy": 0.7,
    }  # fmt: skip


def messages_in(path: Path) -> int:
    with sqlite3.connect(path) as database:
        return int(database.execute("SELECT count(*) FROM messages").fetchone()[0])


# Conversations


def test_a_conversation_is_kept_when_the_store_is_opened_again(path: Path) -> None:
    first = Store(path)
    one = first.create(settings={"model": "m"})
    question = first.add(one.id, None, "user", "Why is the sky blue?")
    first.add(one.id, question.id, "assistant", "Scattering.", model="m", finish="stop")
    first.close()
    second = Store(path)
    (kept,) = second.conversations()
    assert kept.title == "Why is the sky blue?" and kept.settings == {"model": "m"}
    assert [message.content for message in second.history(kept.leaf)] == [
        "Why is the sky blue?",
        "Scattering.",
    ]
    second.close()


def test_the_first_message_gives_the_title_cut_at_a_word_and_a_rename_stays(store: Store) -> None:
    one = store.create()
    store.add(one.id, None, "user", "\n  " + "word " * 40)
    title = store.conversation(one.id).title
    assert title.startswith("word word") and title.endswith("word…") and len(title) <= 61
    store.change(one.id, title="Mine")
    store.add(one.id, store.conversation(one.id).leaf, "user", "more")
    assert store.conversation(one.id).title == "Mine"


def test_the_last_used_conversation_comes_first(store: Store) -> None:
    first, second = store.create(title="first"), store.create(title="second")
    store.add(first.id, None, "user", "again")
    assert [one.id for one in store.conversations()] == [first.id, second.id]


@pytest.mark.parametrize("words", ["RAYLEIGH", "scatt sky", "is", "日本", "日本語テ", "100%", '"quo', "fö"])
def test_search_finds_parts_of_words_in_any_script(store: Store, words: str) -> None:
    one, other = store.create(), store.create()
    store.add(
        one.id, None, "user", 'Is the sky blue by Rayleigh scattering? 日本語テスト 100% sure "quoted" Föhn'
    )
    store.add(other.id, None, "user", "Another thing, totally different")
    (found,) = store.search(words)
    assert found[0].id == one.id


@pytest.mark.parametrize("words", ["absent", "sky absent", "_", "%", "1000%", "NEAR(", "sky*"])
def test_search_takes_every_word_literally(store: Store, words: str) -> None:
    one = store.create(title="t")
    store.add(one.id, None, "user", "the sky")
    assert store.search(words) == []


def test_search_looks_in_titles_and_in_branches_that_are_not_shown(store: Store) -> None:
    one = store.create(title="Holiday")
    store.add(one.id, None, "user", "go to Lisbon")
    store.add(one.id, None, "user", "go to Porto")
    assert [found.id for found, _ in store.search("holi lisbon")] == [one.id]
    assert store.search("lisb")[0][1] == "go to Lisbon"


# The tree


def test_branches_and_conversations_share_what_they_have_in_common(store: Store, path: Path) -> None:
    one, other = store.create(), store.create()
    question = store.add(one.id, None, "user", "hi")
    store.add(one.id, question.id, "assistant", "hello", model="m", finish="stop")
    store.add(one.id, question.id, "assistant", "hey", model="m", finish="stop")
    assert store.add(other.id, None, "user", "hi").id == question.id
    assert messages_in(path) == 3
    assert [message.content for message in store.tree(other.id)] == ["hi"], (
        "but not what the other one said next"
    )


def test_an_address_tells_apart_all_that_is_part_of_a_message() -> None:
    base = {
        "parent": "p",
        "role": "user",
        "content": "c",
        "model": "m",
        "settings": {"t": 1},
        "finish": "stop",
    }
    changed = [
        {}, {"parent": None}, {"role": "assistant"}, {"content": "d"}, {"model": None}, {"settings": {}},
        {"finish": "length"}, {"tokens": [1]},
    ]  # fmt: skip
    assert len({address(**{**base, **change}) for change in changed}) == len(changed)


def test_the_same_answer_drawn_twice_is_one_message(store: Store) -> None:
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    for _ in range(2):
        store.add(
            one.id, question.id, "assistant", "hello", model="m", settings={"temperature": 0}, finish="stop"
        )
    assert len(store.tree(one.id)) == 2


def test_a_message_of_another_conversation_is_no_parent_and_no_leaf(store: Store) -> None:
    one, other = store.create(), store.create()
    question = store.add(one.id, None, "user", "hi")
    with pytest.raises(NotThere):
        store.add(other.id, question.id, "assistant", "hello")
    with pytest.raises(NotThere):
        store.change(other.id, leaf=question.id)


def test_the_newest_leaf_below_a_branch_is_where_it_was_left(store: Store) -> None:
    one = store.create()
    left = store.add(one.id, None, "user", "left")
    below = store.add(one.id, left.id, "assistant", "answer", model="m", finish="stop")
    right = store.add(one.id, None, "user", "right")
    assert store.newest_leaf(one.id, left.id) == below.id
    assert store.newest_leaf(one.id, right.id) == right.id


def test_a_deleted_conversation_comes_back_and_after_a_while_is_gone_with_what_only_it_had(
    store: Store, path: Path
) -> None:
    one, other = store.create(), store.create()
    shared = store.add(one.id, None, "user", "hi")
    store.add(other.id, None, "user", "hi")
    store.add(
        one.id, shared.id, "assistant", "secret answer", model="m", details=Details([1], [token(1, "x")])
    )
    store.delete(one.id)
    assert [left.id for left in store.conversations()] == [other.id] and store.search("secret") == []
    store.restore(one.id)
    assert store.search("secret")
    store.delete(one.id)
    assert store.purge() == 0, "there is still time to undo"
    assert store.purge(older_than=0) == 1
    with pytest.raises(NotThere):
        store.restore(one.id)
    assert [message.content for message in store.tree(other.id)] == ["hi"] and messages_in(path) == 1
    store.close()
    assert b"secret" not in path.read_bytes()


# What happens to any tree of conversations, branches and deletions.
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["create", "add", "delete", "leaf"]),
        st.integers(0, 5),
        st.integers(0, 8),
        st.sampled_from(["a", "b", "c"]),
    ),
    max_size=40,
)


@given(ACTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_done_each_conversation_keeps_exactly_its_own_tree(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, int, str]]
) -> None:
    path = tmp_path_factory.mktemp("store") / "chat.db"
    store = Store(path)
    model: dict[
        str, dict[str, str | None]
    ] = {}  # conversation -> message -> parent, kept beside it in plain Python
    for action, which, where, content in actions:
        names = sorted(model)
        if action == "create" or not names:
            model[store.create().id] = {}
            continue
        name = names[which % len(names)]
        places = [None, *model[name]]
        if action == "delete":
            store.delete(name)
            del model[name]
            store.purge(older_than=0)
        elif action == "add":
            parent = places[where % len(places)]
            message = store.add(name, parent, "user", content)
            model[name].setdefault(message.id, parent)
            assert message.id == address(parent, "user", content)
        elif len(places) > 1:
            leaf = places[1 + where % (len(places) - 1)]
            assert store.change(name, leaf=leaf).leaf == leaf
    for name, parents in model.items():
        tree = store.tree(name)
        assert {message.id: message.parent for message in tree} == parents
        for number, message in enumerate(tree):
            assert message.parent is None or message.parent in {before.id for before in tree[:number]}
            up, chain = message.id, []
            while up is not None:
                chain.append(up)
                up = parents[up]
            assert [one.id for one in store.history(message.id)] == chain[::-1]
    reachable = {message for parents in model.values() for message in parents}
    assert messages_in(path) == len(reachable), "nothing is left of what was deleted"
    store.close()


# Answers being written


def test_a_draft_becomes_a_message_with_all_that_is_known_of_it(store: Store) -> None:
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    draft = store.begin(one.id, question.id, "m", {"temperature": 0.5}, prompt=[7, 8])
    store.write(draft, "hel", [token(1, "hel")])
    store.write(draft, "lo", [token(2, "lo")])
    answer = store.finish(draft, "stop", usage={"completion_tokens": 2}, seconds=1.5, first_seconds=0.5)
    assert answer is not None and answer.content == "hello" and answer.finish == "stop"
    assert store.conversation(one.id).leaf == answer.id
    details = store.details(answer.id)
    assert details is not None and details.prompt == [7, 8] and details.seconds == 1.5
    assert [one["text"] for one in details.tokens] == ["hel", "lo"]
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
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    assert store.finish(store.begin(one.id, question.id, "m", {}), "stopped") is None
    assert store.conversation(one.id).leaf == question.id


def test_an_answer_that_ends_does_not_take_the_user_off_another_branch(store: Store) -> None:
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    draft = store.begin(one.id, question.id, "m", {})
    store.write(draft, "hello", [])
    other = store.add(one.id, None, "user", "something else")
    store.finish(draft, "stop")
    assert store.conversation(one.id).leaf == other.id and len(store.tree(one.id)) == 3


def test_an_answer_to_a_deleted_conversation_is_dropped(store: Store) -> None:
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    draft = store.begin(one.id, question.id, "m", {})
    store.delete(one.id)
    store.purge(older_than=0)
    store.write(draft, "hello", [])
    assert store.finish(draft, "stop") is None


def test_a_comparison_in_a_deleted_conversation_does_not_keep_the_store_from_opening(path: Path) -> None:
    store = Store(path)
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    name = store.compare(one.id, question.id)
    left, _ = [
        store.begin(one.id, question.id, "m", {}, comparison=(name, side)) for side in ("left", "right")
    ]
    store.write(left, "hello", [])
    store.finish(left, "stop")
    store.delete(one.id)
    store.close()
    after = Store(path)
    assert after.conversations() == []
    after.close()


WRITER = """
import sys, time
from tercet.serve.web.store import Store
store = Store(sys.argv[1])
one = store.create()
question = store.add(one.id, None, "user", "count")
draft = store.begin(one.id, question.id, "m", {"temperature": 1}, prompt=[3])
for number in range(1000):
    token = {"id": number, "text": f"{number} ", "bytes": "", "logprob": -1.0, "top": [], "entropy": 1.0}
    store.write(draft, f"{number} ", [token])
    print(number, flush=True)
    time.sleep(0.01)
"""


def test_what_came_of_an_answer_survives_a_kill_and_is_marked(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    seen = [writer.stdout.readline().strip() for _ in range(5)]
    beside = Store(path)
    (one,) = beside.conversations()
    assert beside.recover() == [] and len(beside.tree(one.id)) == 1, "its process still lives: it goes on"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    beside.close()
    after = Store(path)
    answer = after.history(after.conversation(one.id).leaf)[-1]
    assert answer.finish == "interrupted" and answer.content.startswith(" ".join(seen))
    details = after.details(answer.id)
    assert details is not None and details.prompt == [3]
    assert "".join(one["text"] for one in details.tokens) == answer.content
    assert list(path.with_name("chat.db.owners").iterdir()) != [], "the living one's mark"
    after.close()
    assert list(path.with_name("chat.db.owners").iterdir()) == []


def test_two_processes_write_at_the_same_time(path: Path) -> None:
    program = (
        "import sys\nfrom tercet.serve.web.store import Store\nstore = Store(sys.argv[1])\n"
        "one = store.create()\n"
        "for n in range(60): store.add(one.id, store.conversation(one.id).leaf, 'user', sys.argv[2] + str(n))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = Store(path)
    for one in store.conversations():
        history = [message.content for message in store.history(one.leaf)]
        assert history == [f"{history[0][0]}{number}" for number in range(60)]
    assert len(store.conversations()) == 2
    store.close()


def test_threads_take_turns(store: Store) -> None:
    one = store.create()

    def write(name: str) -> None:
        for number in range(30):
            store.add(one.id, None, "user", f"{name}{number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.tree(one.id)) == 90


# Comparisons


def compared(store: Store, vote: str | None, kind: str = "chat", right: str = "worse") -> str:
    one = store.create(kind)
    question = store.add(one.id, None, "user", "hi")
    name = store.compare(one.id, question.id)
    drafts = [
        store.begin(one.id, question.id, model, {"system": "Be kind."}, comparison=(name, side))
        for model, side in (("base", "left"), ("tuned", "right"))
    ]
    for draft, text in zip(drafts, ("better", right), strict=True):
        store.write(draft, text, [])
        store.finish(draft, "stop")
    store.settle(name)
    if vote:
        store.vote(one.id, name, vote)
    return one.id


@pytest.mark.parametrize(
    ("vote", "leaf"), [(None, "better"), ("left", "better"), ("right", "worse"), ("tie", "better")]
)
def test_the_conversation_goes_on_from_the_better_answer(store: Store, vote: str | None, leaf: str) -> None:
    one = compared(store, vote)
    assert store.history(store.conversation(one).leaf)[-1].content == leaf
    assert store.comparisons(one)[0].vote == vote


def test_a_vote_must_be_one_of_four_and_needs_both_answers(store: Store) -> None:
    one = store.create()
    question = store.add(one.id, None, "user", "hi")
    name = store.compare(one.id, question.id)
    with pytest.raises(UserError, match="both answers"):
        store.vote(one.id, name, "left")
    with pytest.raises(UserError, match="left, right, tie, both_bad"):
        store.vote(one.id, name, "up")
    with pytest.raises(NotThere):
        store.vote(one.id, "no such", "left")


def test_votes_are_exported_as_preference_pairs(store: Store) -> None:
    for vote in ("right", "left", "tie", "both_bad", None):
        compared(store, vote)
    compared(store, "left", right="better")  # the same words twice: nothing to prefer
    compared(store, "right", kind="text")
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
    one = store.create()
    question = store.add(one.id, None, "user", "Say *hi*")
    for text, finish in (("hello", "stop"), ("hey", "length")):
        store.add(one.id, question.id, "assistant", text, model="m", settings={"system": "S"}, finish=finish)
    exported = json.loads(json.dumps(as_json(store, one.id)))
    assert [message["content"] for message in exported["messages"]] == ["Say *hi*", "hello", "hey"]
    assert {message.get("parent") for message in exported["messages"]} == {None, question.id}
    assert exported["leaf"] == exported["messages"][2]["id"]
    assert as_markdown(store, one.id) == (
        "# Say *hi*\n\n## System\n\nS\n\n## You\n\nSay *hi*\n\n## m\n\nhey\n\n*(length)*\n"
    )


# The file


def test_the_file_is_for_its_owner_only_and_lies_in_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = Store()
    assert store.path == tmp_path / "tercet" / "chat.db"
    assert store.path.stat().st_mode & 0o077 == 0
    store.close()


@pytest.mark.parametrize("content", [b"this is a letter, not a database" * 200, b"\0" * 5000])
def test_a_file_that_is_no_database_is_told_in_a_line(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"chat\.db is damaged or not a database"):
        Store(path)
    assert path.read_bytes() == content


def test_a_damaged_file_is_told_in_a_line(path: Path) -> None:
    store = Store(path)
    one = store.create()
    for number in range(200):
        store.add(one.id, None, "user", f"{number} " * 100)
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x5a" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"chat\.db is damaged"):
        Store(path).conversations()


def test_a_database_of_another_program_or_version_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (a)")
    with pytest.raises(UserError, match="another program"):
        Store(path)
    other = path.with_name("newer.db")
    Store(other).close()
    with sqlite3.connect(other) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99"):
        Store(other)


def test_a_place_that_can_not_be_written_to_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        Store(tmp_path / "file" / "chat.db")
    with pytest.raises(UserError, match="cannot use"):
        Store(tmp_path)


def test_a_writer_that_waits_too_long_is_told_in_a_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tercet.serve.web.database.PATIENCE", 0.1)
    store = Store(path)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(UserError, match="locked"):
            store.create()
        assert time.monotonic() - began < 5
        other.execute("ROLLBACK")
    store.create()
    store.close()
