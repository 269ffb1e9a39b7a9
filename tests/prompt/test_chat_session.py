from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_openai_server import FakeServer, chunk, error, spoken, stream

from tercet.errors import ContextOverflow, UserError
from tercet.prompt.chat import HELP, ChatSession
from tercet.prompt.llm import LLM


@pytest.fixture
def session(server: FakeServer) -> ChatSession:
    return ChatSession(LLM(server.reference, retries=0))


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def joined(answer: Iterator[str]) -> str:
    return "".join(answer)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_message_is_sent_with_all_that_came_before(server: FakeServer, session: ChatSession) -> None:
    server.script.extend([spoken("He", "y"), spoken("Fine")])
    assert joined(session.say("hi")) == "Hey"
    assert joined(session.say("how are you?")) == "Fine"
    assert server.bodies()[1]["messages"] == [user("hi"), assistant("Hey"), user("how are you?")]
    assert session.messages[-1] == assistant("Fine")
    assert session.last is not None
    assert session.last.usage.prompt_tokens == 7


def test_settings_go_with_every_answer(server: FakeServer) -> None:
    session = ChatSession(LLM(server.reference), "Be brief.", temperature=0)
    joined(session.say("hi"))
    assert server.bodies()[0]["temperature"] == 0
    assert server.bodies()[0]["messages"] == [{"role": "system", "content": "Be brief."}, user("hi")]


def test_system_is_shown_set_and_replaced(session: ChatSession) -> None:
    assert "no system message" in session.run("/system").note
    joined(session.say("hi"))
    session.run("/system Be brief.")
    session.run("/system Be  long.")
    assert session.run("/system").note == "Be  long."
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]


def test_undo_takes_back_the_last_exchange(session: ChatSession) -> None:
    joined(session.say("one"))
    joined(session.say("two"))
    assert session.run("/undo").note == "removed: two"
    assert session.messages == [user("one"), assistant("one")]
    session.run("/undo")
    with pytest.raises(UserError, match="nothing to undo"):
        session.run("/undo")


def test_retry_asks_again_without_the_old_answer(server: FakeServer, session: ChatSession) -> None:
    server.script.extend([spoken("first"), spoken("second")])
    joined(session.say("hi"))
    answer = session.run("/retry").answer
    assert answer is not None
    assert joined(answer) == "second"
    assert server.bodies()[1]["messages"] == [user("hi")]
    assert session.messages == [user("hi"), assistant("second")]


def test_a_retry_that_fails_keeps_the_old_answer(server: FakeServer, session: ChatSession) -> None:
    server.script.extend([spoken("first"), error(500, "no"), spoken("third")])
    joined(session.say("hi"))
    with pytest.raises(UserError):
        joined(session.run("/retry").answer or iter(()))
    assert session.messages == [user("hi"), assistant("first")]
    joined(session.run("/retry").answer or iter(()))
    assert session.messages == [user("hi"), assistant("third")]


def test_an_answer_that_fails_loses_nothing_and_can_be_retried(
    server: FakeServer, session: ChatSession
) -> None:
    server.script.extend([spoken("Hey"), stream(chunk("half"))])
    joined(session.say("hi"))
    before = list(session.messages)
    with pytest.raises(UserError, match="in the middle"):
        joined(session.say("more"))
    assert session.messages == before
    answer = session.run("/retry").answer
    assert answer is not None
    assert joined(answer) == "more"  # the server repeats the last message
    assert session.messages == [*before, user("more"), assistant("more")]


def test_an_answer_that_is_stopped_keeps_what_came(server: FakeServer, session: ChatSession) -> None:
    server.script.append(spoken("one ", "two ", "three"))
    answer = session.say("count")
    assert next(answer) == "one "
    answer.close()  # type: ignore[attr-defined]  # a generator
    assert session.messages == [user("count"), assistant("one ")]
    assert session.last is None


def test_a_conversation_that_no_longer_fits_says_what_to_do(server: FakeServer, session: ChatSession) -> None:
    joined(session.say("hi"))
    server.script.append(error(400, "5000 tokens, at most 4096", code="context_length_exceeded"))
    with pytest.raises(ContextOverflow, match=r"5000 tokens, at most 4096; /undo .*, /clear"):
        joined(session.say("and?"))
    assert session.messages == [user("hi"), assistant("hi")]


def test_save_and_load_give_the_same_conversation(session: ChatSession, tmp_path: Path) -> None:
    session.run("/system S")
    joined(session.say("hällo"))
    assert session.run("/save deep/talk.json").note == "saved 3 messages to deep/talk.json"
    assert json.loads(Path("deep/talk.json").read_text(encoding="utf-8")) == {"messages": session.messages}
    other = ChatSession(session.llm)
    other.run("/load deep/talk.json")
    assert other.messages == session.messages
    other.run("/undo")
    other.run(f"/save {tmp_path}/deep/talk.json")  # it came from there
    assert len(json.loads(Path("deep/talk.json").read_text())["messages"]) == 1


def test_save_as_markdown(session: ChatSession) -> None:
    joined(session.say("hi"))
    session.run("/save talk.md")
    assert Path("talk.md").read_text() == (
        f"# Chat with {session.llm.name}\n\n## user\n\nhi\n\n## assistant\n\nhi\n"
    )


def test_another_file_is_never_overwritten(session: ChatSession) -> None:
    Path("thesis.md").write_text("years of work")
    joined(session.say("hi"))
    with pytest.raises(UserError, match="exists and was not written by this chat"):
        session.run("/save thesis.md")
    assert Path("thesis.md").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a saved chat"),
        ('{"messages": []}', "is empty"),
        ('{"messages": [{"role": "robot", "content": ""}]}', r"messages\[0\] has the role 'robot'"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    session: ChatSession, content: str, part: str
) -> None:
    joined(session.say("hi"))
    Path("x.json").write_text(content)
    with pytest.raises(UserError, match=part):
        session.run("/load x.json")
    assert session.messages == [user("hi"), assistant("hi")]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/udno", "there is no /udno; did you mean /undo?"),
        ("/zzz", "/help lists the commands"),
        ("/save", "needs a path"),
        ("/save talk.txt", "must end in .json or .md"),
        ("/save talk.json", "nothing to save"),
        ("/load gone.json", "cannot read"),
        ("/retry", "nothing to retry"),
        ("/undo now", "takes no argument"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(session: ChatSession, line: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        session.run(line)
    assert part in str(caught.value)


def test_clear_forgets_all_but_the_system_message(session: ChatSession) -> None:
    session.run("/system S")
    joined(session.say("hi"))
    session.run("/clear")
    assert session.messages == [{"role": "system", "content": "S"}]


def test_history_and_help_and_exit(session: ChatSession) -> None:
    assert session.run("/history").note == "the conversation is empty"
    joined(session.say("hi"))
    assert session.run("/history").note == "user: hi\n\nassistant: hi"
    assert all(usage in session.run("/help").note for usage in HELP)
    assert session.run("/exit").leave


def test_every_command_in_the_help_exists(session: ChatSession) -> None:
    for usage in HELP:
        try:
            session.run(usage.split()[0])
        except UserError as problem:  # no messages and no path, but the command is known
            assert "there is no /" not in str(problem)
