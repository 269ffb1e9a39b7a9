"""The store of conversations: lists, search, the tree of messages, and the file."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_tokens import token

from tercet.errors import UserError
from tercet.serve.web.conversations import NotThere
from tercet.serve.web.records import Details, address
from tercet.serve.web.store import Store


def count_messages(store_path: Path) -> int:
    with sqlite3.connect(store_path) as database:
        return int(database.execute("SELECT count(*) FROM messages").fetchone()[0])


# Conversations


def test_a_conversation_is_kept_when_the_store_is_opened_again(store_path: Path) -> None:
    first = Store(store_path)
    conversation = first.create(settings={"model": "m"})
    question = first.add(conversation.id, None, "user", "Why is the sky blue?")
    first.add(conversation.id, question.id, "assistant", "Scattering.", model="m", finish="stop")
    first.close()
    second = Store(store_path)
    (stored,) = second.conversations()
    assert stored.title == "Why is the sky blue?" and stored.settings == {"model": "m"}
    assert [message.content for message in second.history(stored.leaf)] == [
        "Why is the sky blue?",
        "Scattering.",
    ]
    second.close()


def test_the_first_message_gives_the_title_cut_at_a_word_and_a_rename_stays(store: Store) -> None:
    conversation = store.create()
    store.add(conversation.id, None, "user", "\n  " + "word " * 40)
    title = store.conversation(conversation.id).title
    assert title.startswith("word word") and title.endswith("word…") and len(title) <= 61
    store.change(conversation.id, title="Mine")
    store.add(conversation.id, store.conversation(conversation.id).leaf, "user", "more")
    assert store.conversation(conversation.id).title == "Mine"


def test_the_last_used_conversation_comes_first(store: Store) -> None:
    first, second = store.create(title="first"), store.create(title="second")
    store.add(first.id, None, "user", "again")
    assert [conversation.id for conversation in store.conversations()] == [first.id, second.id]


@pytest.mark.parametrize("words", ["RAYLEIGH", "scatt sky", "is", "日本", "日本語テ", "100%", '"quo', "fö"])
def test_search_finds_parts_of_words_in_any_script(store: Store, words: str) -> None:
    conversation, other = store.create(), store.create()
    store.add(
        conversation.id,
        None,
        "user",
        'Is the sky blue by Rayleigh scattering? 日本語テスト 100% sure "quoted" Föhn',
    )
    store.add(other.id, None, "user", "Another thing, totally different")
    (match,) = store.search(words)
    assert match[0].id == conversation.id


@pytest.mark.parametrize("words", ["absent", "sky absent", "_", "%", "1000%", "NEAR(", "sky*"])
def test_search_takes_every_word_literally(store: Store, words: str) -> None:
    conversation = store.create(title="t")
    store.add(conversation.id, None, "user", "the sky")
    assert store.search(words) == []


def test_search_looks_in_titles_and_in_branches_that_are_not_shown(store: Store) -> None:
    conversation = store.create(title="Holiday")
    store.add(conversation.id, None, "user", "go to Lisbon")
    store.add(conversation.id, None, "user", "go to Porto")
    assert [match.id for match, _ in store.search("holi lisbon")] == [conversation.id]
    assert store.search("lisb")[0][1] == "go to Lisbon"


# The tree


def test_branches_and_conversations_share_what_they_have_in_common(store: Store, store_path: Path) -> None:
    conversation, other = store.create(), store.create()
    question = store.add(conversation.id, None, "user", "hi")
    store.add(conversation.id, question.id, "assistant", "hello", model="m", finish="stop")
    store.add(conversation.id, question.id, "assistant", "hey", model="m", finish="stop")
    assert store.add(other.id, None, "user", "hi").id == question.id
    assert count_messages(store_path) == 3
    assert [message.content for message in store.tree(other.id)] == ["hi"], (
        "but not the answers of the other conversation"
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
    conversation = store.create()
    question = store.add(conversation.id, None, "user", "hi")
    for _ in range(2):
        store.add(
            conversation.id,
            question.id,
            "assistant",
            "hello",
            model="m",
            settings={"temperature": 0},
            finish="stop",
        )
    assert len(store.tree(conversation.id)) == 2


def test_a_message_of_another_conversation_is_no_parent_and_no_leaf(store: Store) -> None:
    conversation, other = store.create(), store.create()
    question = store.add(conversation.id, None, "user", "hi")
    with pytest.raises(NotThere):
        store.add(other.id, question.id, "assistant", "hello")
    with pytest.raises(NotThere):
        store.change(other.id, leaf=question.id)


def test_the_newest_leaf_below_a_branch_is_where_it_was_left(store: Store) -> None:
    conversation = store.create()
    left = store.add(conversation.id, None, "user", "left")
    below = store.add(conversation.id, left.id, "assistant", "answer", model="m", finish="stop")
    right = store.add(conversation.id, None, "user", "right")
    assert store.newest_leaf(conversation.id, left.id) == below.id
    assert store.newest_leaf(conversation.id, right.id) == right.id


def test_a_deleted_conversation_comes_back_and_after_a_while_is_gone_with_what_only_it_had(
    store: Store, store_path: Path
) -> None:
    conversation, other = store.create(), store.create()
    shared = store.add(conversation.id, None, "user", "hi")
    store.add(other.id, None, "user", "hi")
    store.add(
        conversation.id,
        shared.id,
        "assistant",
        "secret answer",
        model="m",
        details=Details([1], [token(1, "x")]),
    )
    store.delete(conversation.id)
    assert [left.id for left in store.conversations()] == [other.id] and store.search("secret") == []
    store.restore(conversation.id)
    assert store.search("secret")
    store.delete(conversation.id)
    assert store.purge() == 0, "there is still time to undo"
    assert store.purge(older_than=0) == 1
    with pytest.raises(NotThere):
        store.restore(conversation.id)
    assert [message.content for message in store.tree(other.id)] == ["hi"] and count_messages(store_path) == 1
    store.close()
    assert b"secret" not in store_path.read_bytes()


# Random sequences of creating, branching and deleting.
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
    store_path = tmp_path_factory.mktemp("store") / "chat.db"
    store = Store(store_path)
    model: dict[
        str, dict[str, str | None]
    ] = {}  # the expected state in plain Python: conversation -> message -> parent
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
            assert [ancestor.id for ancestor in store.history(message.id)] == chain[::-1]
    reachable = {message for parents in model.values() for message in parents}
    assert count_messages(store_path) == len(reachable), "deleted messages are gone"
    store.close()


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
def test_a_file_that_is_no_database_is_told_in_a_line(store_path: Path, content: bytes) -> None:
    store_path.parent.mkdir()
    store_path.write_bytes(content)
    with pytest.raises(UserError, match=r"chat\.db is damaged or not a database"):
        Store(store_path)
    assert store_path.read_bytes() == content


def test_a_damaged_file_is_told_in_a_line(store_path: Path) -> None:
    store = Store(store_path)
    conversation = store.create()
    for number in range(200):
        store.add(conversation.id, None, "user", f"{number} " * 100)
    store.close()
    data = bytearray(store_path.read_bytes())
    data[4096:] = b"\x5a" * (len(data) - 4096)
    store_path.write_bytes(data)
    with pytest.raises(UserError, match=r"chat\.db is damaged"):
        Store(store_path).conversations()


def test_a_database_of_another_program_or_version_is_left_alone(store_path: Path) -> None:
    store_path.parent.mkdir()
    with sqlite3.connect(store_path) as database:
        database.execute("CREATE TABLE theirs (a)")
    with pytest.raises(UserError, match="another program"):
        Store(store_path)
    other = store_path.with_name("newer.db")
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


def test_a_writer_that_waits_too_long_is_told_in_a_line(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tercet.serve.web.database.PATIENCE", 0.1)
    store = Store(store_path)
    with sqlite3.connect(store_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(UserError, match="locked"):
            store.create()
        assert time.monotonic() - began < 5
        other.execute("ROLLBACK")
    store.create()
    store.close()
