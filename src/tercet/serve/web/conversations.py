"""Conversations in the database: created, changed, deleted, restored, searched."""

from __future__ import annotations

import secrets
import time

from tercet.errors import UserError
from tercet.serve.web.database import Connection
from tercet.serve.web.records import Conversation, Json, conversation_of, dump, passage_around

KINDS = ("chat", "text")  # a conversation, or one text that a base model continues
UNDO_SECONDS = 60.0  # for so long a deleted conversation can be restored


class NotThere(UserError):
    """There is no conversation, message or comparison of the name."""


class Conversations(Connection):
    """The conversations of a database, without their messages."""

    def create(self, kind: str = "chat", settings: Json | None = None, title: str = "") -> Conversation:
        """Create an empty conversation."""
        if kind not in KINDS:
            raise UserError(f"a conversation of kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
        name, now = secrets.token_hex(8), time.time()
        with self._writing() as database:
            database.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, NULL, ?, ?, NULL)",
                (name, title, kind, dump(settings or {}), now, now),
            )
            return self.conversation(name)

    def conversation(self, name: str) -> Conversation:
        """Return a conversation; raise NotThere if there is none of this name."""
        with self._reading() as database:
            row = database.execute(
                "SELECT * FROM conversations WHERE id = ? AND deleted IS NULL", (name,)
            ).fetchone()
        if row is None:
            raise NotThere(f"there is no conversation {name!r}; it may have been deleted")
        return conversation_of(row)

    def conversations(self) -> list[Conversation]:
        """Return all conversations, the last used first."""
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
        """Change the title, the settings or the leaf of a conversation; its kind only while it is empty."""
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
        """Delete a conversation; `restore` undoes it within UNDO_SECONDS."""
        with self._writing() as database:
            self.conversation(name)
            database.execute("UPDATE conversations SET deleted = ? WHERE id = ?", (time.time(), name))

    def restore(self, name: str) -> Conversation:
        """Restore a deleted conversation; raise NotThere when it has been purged."""
        with self._writing() as database:
            database.execute("UPDATE conversations SET deleted = NULL WHERE id = ?", (name,))
            return self.conversation(name)

    def purge(self, older_than: float = UNDO_SECONDS) -> int:
        """Remove conversations deleted at least so many seconds ago, and return how many messages went with them."""
        with self._writing() as database:
            purged = database.execute(
                "DELETE FROM conversations WHERE deleted <= ?", (time.time() - older_than,)
            ).rowcount
            if not purged:
                return 0
            # The ancestors of a member are members: a message without a conversation has no child with one.
            unreachable = "SELECT hash FROM messages EXCEPT SELECT hash FROM members"
            return database.execute(f"DELETE FROM messages WHERE hash IN ({unreachable})").rowcount

    def search(self, words: str) -> list[tuple[Conversation, str]]:
        """Return the conversations whose title or messages contain every word, with a passage around the first.

        A word matches parts of words; case does not matter.
        """
        results = [(conversation, "") for conversation in self.conversations()]
        for word in words.split():
            passages = self._passages(word)
            titled = {match.id for match, _ in results if word.casefold() in match.title.casefold()}
            results = [
                (match, passage or ("" if match.id in titled else passages[match.id]))
                for match, passage in results
                if match.id in titled or match.id in passages
            ]
        return results

    def _passages(self, word: str) -> dict[str, str]:
        """Return a passage around a word from the last matching message of each conversation."""
        # The index holds parts of three characters; LIKE finds shorter words.
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

    def _check_member(self, conversation: str, name: str) -> None:
        row = self._connection.execute(
            "SELECT 1 FROM members WHERE conversation = ? AND hash = ?", (conversation, name)
        ).fetchone()
        if row is None:
            raise NotThere(f"there is no message {name!r} in conversation {conversation!r}")


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
