"""The database file of the conversations: its path, its tables and its connection.

SQLite in WAL mode: any number of processes read and write the file, and one writes at a time. The address of
a message is a hash of its content and of the message before it (see `tercet.serve.web.store`), so a message is
stored once, however many conversations and branches share it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tercet.errors import UserError

VERSION = 1  # of the tables; a program never writes to tables of another version
APPLICATION = 0x74726374  # "trct" in SQLite's header marks a file of Tercet
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
-- Tokens and probabilities of an answer, and the ids of its prompt: zlib of JSON, read only for Inspect.
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
-- The messages of a conversation, in order of arrival; the ancestors of a member are members too.
CREATE TABLE members (
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    hash TEXT NOT NULL REFERENCES messages (hash),
    number INTEGER NOT NULL,
    PRIMARY KEY (conversation, hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_hash ON members (hash);
-- Answers in progress, and their text so far. They become messages when they end.
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
    """Return the default file, below ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "tercet" / "chat.db"


def open_database(path: Path) -> sqlite3.Connection:
    """Open ``path`` and create its tables where they are missing.

    Any thread may use the connection; the caller provides a lock.

    Raises:
        UserError: the file cannot be read or written, is damaged, or belongs to another program.
    """
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log, which needs exclusive access; SQLite itself does not wait for it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.row_factory = sqlite3.Row
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # deleted text does not stay in free pages
    connection.execute("BEGIN IMMEDIATE")  # if two processes start at once, one of them creates the tables
    with rolled_back_on_error(connection):
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION:
            raise UserError(f"{path} is a database of another program; choose another file")
        if tables and version != VERSION:
            raise UserError(
                f"{path} has tables of version {version}, and this version of Tercet reads version {VERSION}; "
                "use the version that wrote the file, or choose another file"
            )
        if not tables:
            for statement in _statements(TABLES):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            with contextlib.suppress(OSError):
                path.chmod(0o600)  # it holds the user's messages


def _statements(script: str) -> Iterator[str]:
    """Yield the statements one by one; ``executescript`` would commit the open transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def rolled_back_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit the writes of the block, or roll all of them back if it raises."""
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk and of SQLite into a UserError that names the file."""
    try:
        yield
    except sqlite3.OperationalError as problem:
        raise UserError(
            f"cannot use {path}: {problem}; check that it can be written to and that the disk has room"
        ) from problem
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a defect of the program, such as the use of a closed connection
    except sqlite3.DatabaseError as problem:
        raise UserError(
            f"{path} is damaged or not a database ({problem}); move it away to start with an empty one"
        ) from problem
    except OSError as problem:
        raise UserError(f"cannot use {path}: {problem.strerror or problem}") from problem
    except UnicodeEncodeError as problem:  # half of a surrogate pair, which JSON can express
        raise UserError("a text is not valid Unicode text; send it as UTF-8") from problem


class Owner:
    """The owner of the drafts of this process, by which other processes see whether it still runs.

    It is a file next to the database, locked as long as the process runs. The operating system releases the
    lock however the process ends.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self._directory = path.with_name(path.name + ".owners")
        with file_errors(path):
            self._directory.mkdir(exist_ok=True, mode=0o700)
            while True:
                self.name = secrets.token_hex(8)
                self._file: IO[str] = (self._directory / self.name).open("w")
                fcntl.flock(self._file, fcntl.LOCK_EX)
                if (self._directory / self.name).exists():
                    break
                self._file.close()  # another process removed the file before it was locked

    def lives(self, name: str) -> bool:
        """Return whether the process with this name still runs; remove the file of one that does not."""
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
        """Remove the files of processes that have ended."""
        for file in self._directory.iterdir():
            self.lives(file.name)

    def close(self) -> None:
        """Release the lock; this process writes no more drafts."""
        with contextlib.suppress(OSError):
            (self._directory / self.name).unlink(missing_ok=True)
        self._file.close()


class Connection:
    """A connection that several threads share: calls of one process take turns.

    Args:
        path: the file; it is created where it does not exist.

    Raises:
        UserError: the file cannot be read or written, is damaged, or belongs to another program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection = open_database(path)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, file_errors(self.path):
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Make all writes of the block durable together, or none of them."""
        with self._lock, file_errors(self.path):
            if self._connection.in_transaction:  # a part of a larger change
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            with rolled_back_on_error(self._connection):
                yield self._connection
