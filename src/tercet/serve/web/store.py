"""The store of the page: conversations as trees of messages, in one SQLite file.

The address of a message is a hash of its parent's address and of its content: role, text and, for an answer,
model, settings, how it ended and its tokens. So branches and conversations that begin alike share their
beginning, and the same answer sampled twice is one message. A conversation is a set of such messages, with all
their ancestors, and a leaf: the last message that it shows.

An answer in progress is a draft. Its text is written several times a second, so that little is lost when the
process ends; the next process that opens the store turns it into a message, marked as interrupted.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tercet.errors import UserError
from tercet.serve.web.conversations import UNDO_SECONDS, Conversations, NotThere
from tercet.serve.web.database import Owner, default_path
from tercet.serve.web.records import (
    Comparison,
    Details,
    Json,
    Message,
    address,
    dump,
    message_of,
    pack,
    title_of,
    unpack,
)

VOTES = ("left", "right", "tie", "both_bad")


class Store(Conversations):
    """The conversations of a file, with their messages, drafts and comparisons.

    Any thread may call; calls of one process take turns.

    Args:
        path: the file; None: below the user's data directory. It is created where it does not exist.

    Raises:
        UserError: the file cannot be read or written, is damaged, or belongs to another program. So does
            every call that the disk refuses.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__(Path(path) if path is not None else default_path())
        self._owner = Owner(self.path)
        self.recover()
        self.purge(UNDO_SECONDS)

    def close(self) -> None:
        """Close the file. Drafts that are still open count as interrupted from now on."""
        with self._lock:
            self._owner.close()
            self._connection.close()

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
        """Add a message after ``parent`` (None: as the first one).

        With ``select`` the conversation shows it from now on.

        Raises:
            NotThere: there is no such conversation, or ``parent`` is not in it.
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
        """Return a message; raise NotThere if there is none of this name."""
        with self._reading() as database:
            row = database.execute("SELECT * FROM messages WHERE hash = ?", (name,)).fetchone()
        if row is None:
            raise NotThere(f"there is no message {name!r}")
        return message_of(row)

    def member(self, conversation: str, name: str) -> Message:
        """Return a message of a conversation; raise NotThere if it is not in it."""
        with self._reading():
            self._check_member(conversation, name)
            return self.message(name)

    def tree(self, conversation: str) -> list[Message]:
        """Return all messages of a conversation in order of arrival: parents before their children."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT messages.* FROM members JOIN messages USING (hash) "
                "WHERE members.conversation = ? ORDER BY members.number",
                (conversation,),
            ).fetchall()
        return [message_of(row) for row in rows]

    def history(self, name: str | None) -> list[Message]:
        """Return the messages from the first one to ``name``."""
        with self._reading() as database:
            rows = database.execute(
                "WITH RECURSIVE up (hash, depth) AS (SELECT ?, 0 UNION ALL "
                "SELECT messages.parent, depth + 1 FROM messages JOIN up USING (hash) WHERE messages.parent IS NOT NULL) "
                "SELECT messages.* FROM up JOIN messages USING (hash) ORDER BY depth DESC",
                (name,),
            ).fetchall()
        return [message_of(row) for row in rows]

    def newest_leaf(self, conversation: str, name: str) -> str:
        """Return the newest leaf below ``name``, or ``name`` itself."""
        with self._reading():
            self._check_member(conversation, name)
            below, newest = {name}, name
            for message in self.tree(conversation):
                if message.parent in below:
                    below.add(message.id)
                    newest = message.id
            return newest

    def details(self, name: str) -> Details | None:
        """Return the details of an answer; None for a message that the user wrote."""
        with self._reading() as database:
            row = database.execute("SELECT body FROM details WHERE hash = ?", (name,)).fetchone()
        return None if row is None else Details(**unpack(row["body"]))

    def summaries(self, conversation: str) -> dict[str, Json]:
        """Return `Details.summary` of the answers of a conversation, by message."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT hash, summary FROM details JOIN members USING (hash) WHERE conversation = ?",
                (conversation,),
            ).fetchall()
        return {row["hash"]: json.loads(row["summary"]) for row in rows}

    # Drafts: answers in progress

    def begin(
        self,
        conversation: str,
        parent: str,
        model: str,
        settings: Json,
        prompt: Sequence[int] = (),
        comparison: tuple[str, str] | None = None,
    ) -> str:
        """Begin a draft of an answer to ``parent`` and return its name.

        ``comparison`` is the name of a comparison and the side of the answer, "left" or "right".
        """
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
        """Append the text and the tokens of an answer since the last call."""
        with self._writing() as database:
            if database.execute("SELECT 1 FROM drafts WHERE id = ?", (draft,)).fetchone() is None:
                return  # the conversation was deleted in the meantime
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
        """Turn a draft into a message; return None if it is empty or its conversation was deleted.

        ``text`` is the whole answer where it differs from the written pieces: a stop string may end it earlier.
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
                # A user who has switched to another branch stays there.
                select=before.leaf == row["parent"] and row["comparison"] is None,
            )
            if row["comparison"] is not None:
                column = {"left": "left_hash", "right": "right_hash"}[row["side"]]
                database.execute(
                    f"UPDATE comparisons SET {column} = ? WHERE id = ?", (message.id, row["comparison"])
                )
            return message

    def recover(self) -> list[Message]:
        """Turn the drafts of ended processes into messages, marked as interrupted."""
        with self._writing() as database:
            owners = database.execute("SELECT DISTINCT owner FROM drafts").fetchall()
            ended = [row["owner"] for row in owners if not self._owner.lives(row["owner"])]
            messages = []
            for owner in ended:
                drafts = database.execute("SELECT * FROM drafts WHERE owner = ?", (owner,)).fetchall()
                messages += [self.finish(draft["id"], "interrupted") for draft in drafts]
                for draft in drafts:
                    if draft["comparison"] is not None:
                        self.settle(draft["comparison"])
            self._owner.forget_the_dead()
        return [message for message in messages if message is not None]

    # Comparisons

    def compare(self, conversation: str, parent: str, blind: bool = False) -> str:
        """Begin a comparison of two answers to ``parent`` and return its name, which `begin` takes."""
        name = secrets.token_hex(8)
        with self._writing() as database:
            self._check_member(conversation, parent)
            database.execute(
                "INSERT INTO comparisons VALUES (?, ?, ?, NULL, NULL, ?, NULL, NULL, ?)",
                (name, conversation, parent, int(blind), time.time()),
            )
        return name

    def settle(self, name: str) -> None:
        """End a comparison: its conversation shows the left answer, or the right one if there is no left one."""
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
        """Store which answer is better; the conversation continues from it.

        Raises:
            UserError: the vote is not one of VOTES, or one of the answers is missing.
        """
        if vote not in VOTES:
            raise UserError(f"vote is {vote!r}; it must be one of {', '.join(VOTES)}")
        with self._writing() as database:
            comparison = self._comparison(conversation, name)
            if comparison is None:
                raise NotThere(f"there is no comparison {name!r} in conversation {conversation!r}")
            if comparison.left is None or comparison.right is None:
                raise UserError("vote when both answers are complete")
            database.execute(
                "UPDATE comparisons SET vote = ?, voted = ? WHERE id = ?", (vote, time.time(), name)
            )
            chosen = comparison.right if vote == "right" else comparison.left
            leaf = self.conversation(conversation).leaf
            if leaf in (comparison.parent, comparison.left, comparison.right):
                self.change(conversation, leaf=chosen)
            return replace(comparison, vote=vote)

    def comparisons(self, conversation: str) -> list[Comparison]:
        """Return the comparisons of a conversation in the order they were made."""
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

    def _comparison(self, conversation: str, name: str) -> Comparison | None:
        return next((item for item in self.comparisons(conversation) if item.id == name), None)
