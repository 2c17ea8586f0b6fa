"""The SQLite file: opened, checked, locked, written whole."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

FORMAT_VERSION = 2
"""In the file's name: an older jaxlwp leaves a newer one's file alone."""

APPLICATION_ID = 0x6A6C7770
"""Marks the SQLite file as ours ("jlwp")."""

BUSY_S = 60.0
"""Seconds to wait for another process that is writing."""

_SCHEMA = """
CREATE TABLE entries (
  environment TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, program TEXT NOT NULL,
  content TEXT NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (environment, kind, key));
CREATE TABLE environments (key TEXT PRIMARY KEY, content TEXT NOT NULL);
"""

_COLUMNS = {
    "entries": ["environment", "kind", "key", "program", "content", "checksum"],
    "environments": ["key", "content"],
}

T = TypeVar("T")


class StoreError(OSError):
    """The file cannot be used just now: locked, read-only, a full disk."""


class _DamagedError(sqlite3.DatabaseError):
    """The file is no store, or its content does not hold together."""


@contextlib.contextmanager
def undecodable_is_damage() -> Iterator[None]:
    """SQLite's messages quote names in a file; Python cannot tell one that is no UTF-8 any more."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _DamagedError("a name in it is no UTF-8") from error


def connect(path: Path | str) -> sqlite3.Connection:
    """Open a store, or make one.

    Raises:
      sqlite3.Error: the file is damaged, or cannot be used just now; `is_damage` tells which.
    """
    if path != ":memory:" and Path(path).is_dir():
        raise _DamagedError("it is a folder")
    # `Store` has a lock of its own. A flipped bit may leave text that is no UTF-8: its checksum
    # tells.
    connection = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = lambda content: content.decode(errors="replace")
    try:
        with undecodable_is_damage():
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if tables == 0 and not (path != ":memory:" and Path(path).stat().st_size):
                connection.executescript(
                    f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {_SCHEMA} COMMIT;"
                )
            _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    """Raises: sqlite3.Error: what is open is no store, or damaged."""
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    if mark != APPLICATION_ID:
        raise _DamagedError("it is another program's file")
    (sound,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if sound != "ok":
        raise _DamagedError(sound)
    columns = {
        table: [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        for table in _COLUMNS
    }
    if columns != _COLUMNS:
        raise _DamagedError(f"its columns are {columns}")


def in_memory(path: Path) -> sqlite3.Connection:
    """A store in memory, with what a file holds that can be read though not written."""
    with contextlib.suppress(sqlite3.Error), undecodable_is_damage():
        file = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        with contextlib.closing(file):
            _check(file)
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            file.backup(memory)
            return memory
    return connect(":memory:")


def as_transaction(
    work: Callable[[sqlite3.Connection], T],
) -> Callable[[sqlite3.Connection], T]:
    """All of the work is done, or nothing."""

    def whole(connection: sqlite3.Connection) -> T:
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # some errors have ended it
                connection.execute("ROLLBACK")
            raise
        return result

    return whole


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time looks at a file and sets it aside."""
    try:
        import fcntl
    except ImportError:  # Windows: a damaged file might be set aside twice
        yield
        return
    with open(f"{path}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's content is at fault, not its surroundings."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, _DamagedError) or (
        code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    )
