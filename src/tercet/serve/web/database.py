"""The file that conversations are kept in: where it is, how it is opened, what is in it.

SQLite in WAL mode: any number of processes read and write it, one at a time writes. A message is
addressed by a hash of what it says and of the message before it (see `tercet.serve.web.store`), so a
message is there once, however many conversations and branches go through it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tercet.errors import UserError

VERSION = 1  # of the tables; a program never writes to tables of another version
APPLICATION = 0x74726374  # "trct" in SQLite's header: this file is ours
PATIENCE = 10.0  # seconds to wait while another process writes

TABLES = """
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    parent TEXT REFERENCES messages (hash),
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    model TEXT,
    settings TEXT NOT NULL,
    finish TEXT,
    created REAL NOT NULL
) STRICT;
CREATE INDEX messages_by_parent ON messages (parent);
-- Tokens and probabilities of an answer, the ids of its prompt: zlib of JSON, read only when looked at.
CREATE TABLE details (
    hash TEXT PRIMARY KEY REFERENCES messages (hash) ON DELETE CASCADE,
    summary TEXT NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE TABLE conversations (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    kind TEXT NOT NULL,
    settings TEXT NOT NULL,
    leaf TEXT REFERENCES messages (hash),
    created REAL NOT NULL,
    updated REAL NOT NULL,
    deleted REAL
) STRICT;
-- Which messages a conversation has shown, in the order they came: with each one all before it.
CREATE TABLE members (
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    hash TEXT NOT NULL REFERENCES messages (hash),
    number INTEGER NOT NULL,
    PRIMARY KEY (conversation, hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_hash ON members (hash);
-- Answers being written, and what has come of them. They become messages when they end.
CREATE TABLE drafts (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent TEXT NOT NULL REFERENCES messages (hash),
    model TEXT NOT NULL,
    settings TEXT NOT NULL,
    prompt BLOB NOT NULL,
    comparison TEXT,
    side TEXT,
    started REAL NOT NULL
) STRICT;
CREATE TABLE pieces (
    draft TEXT NOT NULL REFERENCES drafts (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    text TEXT NOT NULL,
    tokens BLOB NOT NULL,
    PRIMARY KEY (draft, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE comparisons (
    id TEXT PRIMARY KEY,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent TEXT NOT NULL REFERENCES messages (hash),
    left_hash TEXT REFERENCES messages (hash) ON DELETE SET NULL,
    right_hash TEXT REFERENCES messages (hash) ON DELETE SET NULL,
    blind INTEGER NOT NULL,
    vote TEXT,
    voted REAL,
    created REAL NOT NULL
) STRICT;
CREATE INDEX comparisons_by_conversation ON comparisons (conversation);
CREATE VIRTUAL TABLE found USING fts5 (content, content = 'messages', content_rowid = 'id', tokenize = 'trigram');
CREATE TRIGGER found_insert AFTER INSERT ON messages BEGIN
    INSERT INTO found (rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER found_delete AFTER DELETE ON messages BEGIN
    INSERT INTO found (found, rowid, content) VALUES ('delete', old.id, old.content);
END;
"""


def default_path() -> Path:
    """Where conversations are kept: below ``$XDG_DATA_HOME``, or ``~/.local/share``."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "tercet" / "chat.db"


def open_database(path: Path) -> sqlite3.Connection:
    """A connection, for any thread that holds a lock of the caller's; the tables are there.

    Raises:
        UserError: the file can't be read or written, is damaged, or is somebody else's.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switching to a write-ahead log needs the file for oneself, and SQLite does not wait for that by itself."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.row_factory = sqlite3.Row
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what was deleted is not left in free pages
    connection.execute("BEGIN IMMEDIATE")  # of two processes that come first, one makes the tables
    with rolled_back_on_error(connection):
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION:
            raise UserError(f"{path} is a database of another program; choose another file")
        if tables and version != VERSION:
            raise UserError(
                f"{path} has tables of version {version}, and this tercet knows version {VERSION}; "
                "use the tercet that wrote it, or choose another file"
            )
        if not tables:
            for statement in _statements(TABLES):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            with contextlib.suppress(OSError):
                path.chmod(0o600)  # it holds what was said


def _statements(script: str) -> Iterator[str]:
    """One statement after the other, as ``executescript`` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def rolled_back_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block wrote, or nothing of it."""
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the disk or SQLite refuses into a UserError that names the file."""
    try:
        yield
    except sqlite3.OperationalError as problem:
        raise UserError(
            f"cannot use {path}: {problem}; check that it can be written to and that the disk has room"
        ) from problem
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a mistake of the program's, such as a connection that is closed
    except sqlite3.DatabaseError as problem:
        raise UserError(
            f"{path} is damaged or no database ({problem}); move it away to begin anew"
        ) from problem
    except OSError as problem:
        raise UserError(f"cannot use {path}: {problem.strerror or problem}") from problem
    except UnicodeEncodeError as problem:  # half of a surrogate pair, which JSON can express
        raise UserError("a text is not valid Unicode text; send it as UTF-8") from problem


class Owner:
    """This process's mark on the drafts it writes, by which others see whether it still lives.

    A file next to the database, locked as long as the process lives: the lock goes with it, however
    it ends.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self._directory = path.with_name(path.name + ".owners")
        with told(path):
            self._directory.mkdir(exist_ok=True, mode=0o700)
            while True:
                self.name = secrets.token_hex(8)
                self._file: IO[str] = (self._directory / self.name).open("w")
                fcntl.flock(self._file, fcntl.LOCK_EX)
                if (self._directory / self.name).exists():
                    break
                self._file.close()  # between two lines another process took it for a dead one's

    def lives(self, name: str) -> bool:
        """Whether the process that bears the name still runs. Takes away the file of one that doesn't."""
        import fcntl

        path = self._directory / name
        try:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def forget_the_dead(self) -> None:
        """Take away the files of processes that have ended."""
        for file in self._directory.iterdir():
            self.lives(file.name)

    def close(self) -> None:
        """This process writes no drafts any more."""
        with contextlib.suppress(OSError):
            (self._directory / self.name).unlink(missing_ok=True)
        self._file.close()
