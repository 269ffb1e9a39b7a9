"""What was said: conversations as a tree of messages, in one SQLite file.

A message is addressed by a hash of its parent's address and of everything it says: role, content and,
for an answer, model, settings, how it ended and its tokens. Branches and conversations that begin alike
share their beginning; the same answer drawn twice is one message. A conversation is a set of such
messages (with each of them all before it) and a leaf, the message it shows last.

An answer that is being written is a draft. What has come of it is written several times a second, so
that little is lost when the process ends; whoever opens the store next makes it a message, marked as
interrupted.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tercet.errors import UserError
from tercet.serve.web.database import Owner, default_path, open_database, rolled_back_on_error, told
from tercet.serve.web.records import (
    Comparison,
    Conversation,
    Details,
    Json,
    Message,
    address,
    conversation_of,
    dump,
    message_of,
    pack,
    passage_around,
    title_of,
    unpack,
)

KINDS = ("chat", "text")  # a conversation, or one text that a base model continues
VOTES = ("left", "right", "tie", "both_bad")
UNDO_SECONDS = 60.0  # a deleted conversation can be brought back so long


class NotThere(UserError):
    """No conversation, message or comparison of that name."""


class Store:
    """The conversations of one file. Any thread may call; calls of one process take turns.

    Args:
        path: the file; None: below the user's data directory. It is made where it is not there.

    Raises:
        UserError: the file can't be read or written, is damaged, or is somebody else's. So does
            every call that finds the disk unwilling.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()
        self._lock = threading.RLock()
        self._connection = open_database(self.path)
        self._owner = Owner(self.path)
        self.recover()
        self.purge()

    def close(self) -> None:
        """Let go of the file. Drafts that are still open count as interrupted from now on."""
        with self._lock:
            self._owner.close()
            self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, told(self.path):
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All that the block writes becomes durable together, or none of it."""
        with self._lock, told(self.path):
            if self._connection.in_transaction:  # a part of a larger change
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            with rolled_back_on_error(self._connection):
                yield self._connection

    # Conversations

    def create(self, kind: str = "chat", settings: Json | None = None, title: str = "") -> Conversation:
        """A new, empty conversation."""
        if kind not in KINDS:
            raise UserError(f"a conversation of kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
        new, now = secrets.token_hex(8), time.time()
        with self._writing() as database:
            database.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, NULL, ?, ?, NULL)",
                (new, title, kind, dump(settings or {}), now, now),
            )
            return self.conversation(new)

    def conversation(self, name: str) -> Conversation:
        """The conversation. Raises NotThere."""
        with self._reading() as database:
            row = database.execute(
                "SELECT * FROM conversations WHERE id = ? AND deleted IS NULL", (name,)
            ).fetchone()
        if row is None:
            raise NotThere(f"there is no conversation {name!r}; it may have been deleted")
        return conversation_of(row)

    def conversations(self) -> list[Conversation]:
        """All of them, the last used first."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT * FROM conversations WHERE deleted IS NULL ORDER BY updated DESC, id"
            ).fetchall()
        return [conversation_of(row) for row in rows]

    def change(
        self,
        name: str,
        *,
        title: str | None = None,
        settings: Json | None = None,
        leaf: str | None = None,
        kind: str | None = None,
    ) -> Conversation:
        """Give a conversation another title, other settings or another leaf; its kind while it is empty."""
        with self._writing() as database:
            before = self.conversation(name)
            if leaf is not None:
                self._check_member(name, leaf)
            if kind is not None and kind != before.kind and (kind not in KINDS or before.leaf is not None):
                raise UserError("only an empty conversation can change its kind, to chat or text")
            database.execute(
                "UPDATE conversations SET title = ?, settings = ?, leaf = ?, kind = ? WHERE id = ?",
                (
                    before.title if title is None else title,
                    dump(before.settings if settings is None else settings),
                    before.leaf if leaf is None else leaf,
                    kind or before.kind,
                    name,
                ),
            )
            return self.conversation(name)

    def delete(self, name: str) -> None:
        """Take a conversation away; for UNDO_SECONDS `restore` brings it back."""
        with self._writing() as database:
            self.conversation(name)
            database.execute("UPDATE conversations SET deleted = ? WHERE id = ?", (time.time(), name))

    def restore(self, name: str) -> Conversation:
        """Bring a conversation back. Raises NotThere when it is too late."""
        with self._writing() as database:
            database.execute("UPDATE conversations SET deleted = NULL WHERE id = ?", (name,))
            return self.conversation(name)

    def purge(self, older_than: float = UNDO_SECONDS) -> int:
        """Forget what was deleted at least so many seconds ago, with all that only it had; how many messages."""
        with self._writing() as database:
            gone = database.execute(
                "DELETE FROM conversations WHERE deleted <= ?", (time.time() - older_than,)
            ).rowcount
            if not gone:
                return 0
            # Members come with all their ancestors: a message that is nobody's has no child that is.
            unreachable = "SELECT hash FROM messages EXCEPT SELECT hash FROM members"
            return database.execute(f"DELETE FROM messages WHERE hash IN ({unreachable})").rowcount

    def search(self, words: str) -> list[tuple[Conversation, str]]:
        """Conversations in whose title or messages every word is, and a passage around the first word.

        A word may be a part of one; case does not matter.
        """
        results = [(one, "") for one in self.conversations()]
        for word in words.split():
            passages = self._passages(word)
            named = {one.id for one, _ in results if word.casefold() in one.title.casefold()}
            results = [
                (one, passage or ("" if one.id in named else passages[one.id]))
                for one, passage in results
                if one.id in named or one.id in passages
            ]
        return results

    def _passages(self, word: str) -> dict[str, str]:
        """Where a word is, in the last message of each conversation that has it."""
        # The index knows parts of three characters; LIKE does the shorter ones.
        if len(word) >= 3:
            condition, value = "found MATCH ?", '"' + word.replace('"', '""') + '"'
        else:
            condition, value = "found.content LIKE ? ESCAPE '\\'", f"%{_escaped(word)}%"
        with self._reading() as database:
            rows = database.execute(
                "SELECT conversation, messages.content, max(number) FROM found "
                "JOIN messages ON messages.id = found.rowid JOIN members USING (hash) "
                f"WHERE {condition} GROUP BY conversation",
                (value,),
            ).fetchall()
        return {row["conversation"]: passage_around(row["content"], word) for row in rows}

    # Messages

    def add(
        self,
        conversation: str,
        parent: str | None,
        role: str,
        content: str,
        *,
        model: str | None = None,
        settings: Json | None = None,
        finish: str | None = None,
        details: Details | None = None,
        select: bool = True,
    ) -> Message:
        """A message after ``parent`` (None: the first); ``select``: the conversation shows it from now on.

        Raises:
            NotThere: no such conversation, or ``parent`` is not in it.
        """
        tokens = [token["id"] for token in details.tokens] if details else []
        name = address(parent, role, content, model, settings, finish, tokens)
        with self._writing() as database:
            before = self.conversation(conversation)
            if parent is not None:
                self._check_member(conversation, parent)
            database.execute(
                "INSERT INTO messages (hash, parent, role, content, model, settings, finish, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (hash) DO NOTHING",
                (name, parent, role, content, model, dump(settings or {}), finish, time.time()),
            )
            if details is not None:
                database.execute(
                    "INSERT OR REPLACE INTO details VALUES (?, ?, ?)",
                    (name, dump(details.summary()), pack(vars(details))),
                )
            database.execute(
                "INSERT INTO members SELECT ?1, ?2, 1 + coalesce(max(number), 0) FROM members "
                "WHERE conversation = ?1 ON CONFLICT DO NOTHING",
                (conversation, name),
            )
            title = before.title or (title_of(content) if role == "user" else "")
            database.execute(
                "UPDATE conversations SET updated = ?, title = ?, leaf = ? WHERE id = ?",
                (time.time(), title, name if select else before.leaf, conversation),
            )
            return self.message(name)

    def message(self, name: str) -> Message:
        """The message. Raises NotThere."""
        with self._reading() as database:
            row = database.execute("SELECT * FROM messages WHERE hash = ?", (name,)).fetchone()
        if row is None:
            raise NotThere(f"there is no message {name!r}")
        return message_of(row)

    def member(self, conversation: str, name: str) -> Message:
        """The message, if the conversation has it. Raises NotThere."""
        with self._reading():
            self._check_member(conversation, name)
            return self.message(name)

    def _check_member(self, conversation: str, name: str) -> None:
        row = self._connection.execute(
            "SELECT 1 FROM members WHERE conversation = ? AND hash = ?", (conversation, name)
        ).fetchone()
        if row is None:
            raise NotThere(f"there is no message {name!r} in conversation {conversation!r}")

    def tree(self, conversation: str) -> list[Message]:
        """All messages of a conversation in the order they came: parents before their children."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT messages.* FROM members JOIN messages USING (hash) "
                "WHERE members.conversation = ? ORDER BY members.number",
                (conversation,),
            ).fetchall()
        return [message_of(row) for row in rows]

    def history(self, name: str | None) -> list[Message]:
        """The messages from the first to ``name``."""
        with self._reading() as database:
            rows = database.execute(
                "WITH RECURSIVE up (hash, depth) AS (SELECT ?, 0 UNION ALL "
                "SELECT messages.parent, depth + 1 FROM messages JOIN up USING (hash) WHERE messages.parent IS NOT NULL) "
                "SELECT messages.* FROM up JOIN messages USING (hash) ORDER BY depth DESC",
                (name,),
            ).fetchall()
        return [message_of(row) for row in rows]

    def newest_leaf(self, conversation: str, name: str) -> str:
        """The leaf below ``name`` that came last, or ``name`` itself."""
        with self._reading():
            self._check_member(conversation, name)
            below, newest = {name}, name
            for message in self.tree(conversation):
                if message.parent in below:
                    below.add(message.id)
                    newest = message.id
            return newest

    def details(self, name: str) -> Details | None:
        """How an answer came about; None where nothing is known (a person wrote it)."""
        with self._reading() as database:
            row = database.execute("SELECT body FROM details WHERE hash = ?", (name,)).fetchone()
        return None if row is None else Details(**unpack(row["body"]))

    def summaries(self, conversation: str) -> dict[str, Json]:
        """`Details.summary` of the answers of a conversation, by message."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT hash, summary FROM details JOIN members USING (hash) WHERE conversation = ?",
                (conversation,),
            ).fetchall()
        return {row["hash"]: json.loads(row["summary"]) for row in rows}

    # Answers being written

    def begin(
        self,
        conversation: str,
        parent: str,
        model: str,
        settings: Json,
        prompt: Sequence[int] = (),
        comparison: tuple[str, str] | None = None,
    ) -> str:
        """A draft of an answer to ``parent``; ``comparison``: its name, and "left" or "right"."""
        draft = secrets.token_hex(8)
        name, side = comparison or (None, None)
        with self._writing() as database:
            self._check_member(conversation, parent)
            database.execute(
                "INSERT INTO drafts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    draft, self._owner.name, conversation, parent, model, dump(settings), pack(list(prompt)),
                    name, side, time.time(),
                ),
            )  # fmt: skip
        return draft

    def write(self, draft: str, text: str, tokens: Sequence[Json]) -> None:
        """What has come of an answer since the last call."""
        with self._writing() as database:
            if database.execute("SELECT 1 FROM drafts WHERE id = ?", (draft,)).fetchone() is None:
                return  # its conversation was deleted meanwhile
            database.execute(
                "INSERT INTO pieces SELECT ?1, 1 + coalesce(max(number), 0), ?2, ?3 FROM pieces WHERE draft = ?1",
                (draft, text, pack(list(tokens))),
            )

    def finish(
        self,
        draft: str,
        finish: str,
        *,
        text: str | None = None,
        usage: Json | None = None,
        seconds: float | None = None,
        first_seconds: float | None = None,
        error: str | None = None,
    ) -> Message | None:
        """Make a draft a message; None if nothing has come of it, or if its conversation is gone.

        text: the whole answer, where it is not what was written (a stop string may end it earlier).
        """
        with self._writing() as database:
            row = database.execute("SELECT * FROM drafts WHERE id = ?", (draft,)).fetchone()
            if row is None:
                return None
            pieces = database.execute(
                "SELECT text, tokens FROM pieces WHERE draft = ? ORDER BY number", (draft,)
            ).fetchall()
            database.execute("DELETE FROM drafts WHERE id = ?", (draft,))
            content = "".join(piece["text"] for piece in pieces) if text is None else text
            tokens = [token for piece in pieces for token in unpack(piece["tokens"])]
            deleted = database.execute(
                "SELECT deleted FROM conversations WHERE id = ?", (row["conversation"],)
            ).fetchone()["deleted"]
            if deleted is not None or (not content and not tokens):
                return None
            details = Details(unpack(row["prompt"]), tokens, usage or {}, seconds, first_seconds, error)
            before = self.conversation(row["conversation"])
            message = self.add(
                row["conversation"],
                row["parent"],
                "assistant",
                content,
                model=row["model"],
                settings=json.loads(row["settings"]),
                finish=finish,
                details=details,
                # Who has gone to another branch meanwhile stays there.
                select=before.leaf == row["parent"] and row["comparison"] is None,
            )
            if row["comparison"] is not None:
                column = {"left": "left_hash", "right": "right_hash"}[row["side"]]
                database.execute(
                    f"UPDATE comparisons SET {column} = ? WHERE id = ?", (message.id, row["comparison"])
                )
            return message

    def recover(self) -> list[Message]:
        """Make messages of the drafts of processes that have ended, marked as interrupted."""
        with self._writing() as database:
            owners = database.execute("SELECT DISTINCT owner FROM drafts").fetchall()
            dead = [one["owner"] for one in owners if not self._owner.lives(one["owner"])]
            found = []
            for owner in dead:
                drafts = database.execute("SELECT * FROM drafts WHERE owner = ?", (owner,)).fetchall()
                found += [self.finish(draft["id"], "interrupted") for draft in drafts]
                for draft in drafts:
                    if draft["comparison"] is not None:
                        self.settle(draft["comparison"])
            self._owner.forget_the_dead()
        return [message for message in found if message is not None]

    # Comparisons

    def compare(self, conversation: str, parent: str, blind: bool = False) -> str:
        """A comparison of two answers to ``parent``, which `begin` is told of; its name."""
        name = secrets.token_hex(8)
        with self._writing() as database:
            self._check_member(conversation, parent)
            database.execute(
                "INSERT INTO comparisons VALUES (?, ?, ?, NULL, NULL, ?, NULL, NULL, ?)",
                (name, conversation, parent, int(blind), time.time()),
            )
        return name

    def settle(self, name: str) -> None:
        """No more answer comes to a comparison: its conversation shows what there is, the left one first."""
        with self._writing() as database:
            row = database.execute(
                "SELECT comparisons.* FROM comparisons JOIN conversations ON conversations.id = conversation "
                "WHERE comparisons.id = ? AND deleted IS NULL",
                (name,),
            ).fetchone()
            answer = row and (row["left_hash"] or row["right_hash"])
            if answer and self.conversation(row["conversation"]).leaf == row["parent"]:
                self.change(row["conversation"], leaf=answer)

    def vote(self, conversation: str, name: str, vote: str) -> Comparison:
        """Store which answer is better; the conversation goes on from it.

        Raises:
            UserError: not one of VOTES, or one of the answers is not there (yet).
        """
        if vote not in VOTES:
            raise UserError(f"vote is {vote!r}; it must be one of {', '.join(VOTES)}")
        with self._writing() as database:
            found = next((one for one in self.comparisons(conversation) if one.id == name), None)
            if found is None:
                raise NotThere(f"there is no comparison {name!r} in conversation {conversation!r}")
            if found.left is None or found.right is None:
                raise UserError("vote when both answers are there")
            database.execute(
                "UPDATE comparisons SET vote = ?, voted = ? WHERE id = ?", (vote, time.time(), name)
            )
            chosen = found.right if vote == "right" else found.left
            leaf = self.conversation(conversation).leaf
            if leaf in (found.parent, found.left, found.right):
                self.change(conversation, leaf=chosen)
            return next(one for one in self.comparisons(conversation) if one.id == name)

    def comparisons(self, conversation: str) -> list[Comparison]:
        """The comparisons of a conversation in the order they were made."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT * FROM comparisons WHERE conversation = ? ORDER BY created, id", (conversation,)
            ).fetchall()
        return [
            Comparison(
                row["id"], row["conversation"], row["parent"], row["left_hash"], row["right_hash"],
                bool(row["blind"]), row["vote"],
            )
            for row in rows
        ]  # fmt: skip


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
