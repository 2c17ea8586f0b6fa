"""Measurements on disk: one SQLite file, safe under several processes, kills and damage.

Every entry belongs to an environment: what the measurement is true for (kind of device, versions,
for processors the machine). Entries of another environment are never returned. Every entry carries
a checksum, and a file that is no store, or is damaged, is named in a warning, set aside and made
anew: no figure out of it is used.

SQLite's rollback journal is kept, not the write-ahead log: home directories are often network file
systems, where the log's shared memory does not work. What is committed survives a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

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


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a measurement is true for.

    Attributes:
      device_kind: as JAX names it.
      platform: "cpu" or "gpu".
      driver: version of the platform's runtime and driver, as JAX tells it.
      jax: version.
      jaxlib: version.
      host: for processors, whose kind names no machine: node, processor and number of cores.
      at_once: simulated devices that shared the cores and ran at once; 1 for accelerators.
    """

    device_kind: str
    platform: str
    driver: str
    jax: str
    jaxlib: str
    host: str = ""
    at_once: int = 1

    @property
    def key(self) -> str:
        """Hash of all of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """For reports."""
        host = f" on {self.host}, {self.at_once} at once" if self.host else ""
        return f"{self.device_kind}{host}, JAX {self.jax}"


def environment_of(devices: Sequence[Any]) -> Environment:
    """The environment of devices that run at once."""
    import importlib.metadata

    first = devices[0]
    cpu = first.platform == "cpu"
    return Environment(
        device_kind=first.device_kind,
        platform=first.platform,
        driver=str(getattr(first.client, "platform_version", "")),
        jax=importlib.metadata.version("jax"),
        jaxlib=importlib.metadata.version("jaxlib"),
        host=f"{platform.node()} ({platform.machine()}, {os.cpu_count()} cores)" if cpu else "",
        at_once=len(devices) if cpu else 1,
    )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure, and how it came about.

    Attributes:
      seconds: the median.
      spread: median absolute deviation of the runs, relative to the median.
      samples: how many runs.
      date: when, in UTC, ISO 8601.
      program: hash of the program that was run; "" if there is none.
      each_s: if it was measured several times, minutes apart, each of them; `seconds` is their
        median.
      data: more, as plain JSON data.

    Raises:
      ValueError: a figure is negative, infinite or NaN.
    """

    seconds: float
    spread: float = 0.0
    samples: int = 1
    date: str = ""
    program: str = ""
    each_s: tuple[float, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.each_s, (tuple, list)):
            raise ValueError(f"Measurement: each_s is {self.each_s!r}; it must be a list")
        object.__setattr__(self, "each_s", tuple(self.each_s))
        figures = [(name, getattr(self, name)) for name in ("seconds", "spread", "samples")]
        for name, value in (*figures, *(("each_s", each) for each in self.each_s)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise ValueError(
                    f"Measurement: {name} is {value!r}; it must be a finite number of at least 0"
                )
        if not all(isinstance(getattr(self, name), str) for name in ("date", "program")):
            raise ValueError("Measurement: date and program must be text")
        if not isinstance(self.data, Mapping):
            raise ValueError(f"Measurement: data is {self.data!r}; it must be a mapping")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "data": dict(self.data)}


def now() -> str:
    """The date of a measurement."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def default_path() -> Path:
    """Where measurements are kept; JAXLWP_CACHE_DIR overrides the folder."""
    folder = os.environ.get("JAXLWP_CACHE_DIR") or platformdirs.user_cache_dir("jaxlwp")
    return Path(folder) / f"profile-{FORMAT_VERSION}.sqlite3"


class StoreError(OSError):
    """The file cannot be used just now: locked, read-only, a full disk."""


class _DamagedError(sqlite3.DatabaseError):
    """The file is no store, or its content does not hold together."""


@contextlib.contextmanager
def _undecodable_is_damage() -> Iterator[None]:
    """SQLite's messages quote names in a file; Python cannot tell one that is no UTF-8 any more."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _DamagedError("a name in it is no UTF-8") from error


class Store:
    """Measurements in one file; threads may share a store.

    Work goes on whatever becomes of the file. One that cannot be written to is named in a warning,
    and what it holds is used from memory. One that is damaged is named, set aside and made anew. A
    file that is locked, read-only or on a full disk is left as it is: nothing in it is wrong.

    Args:
      path: the file; see `default_path`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self._lock = threading.RLock()
        self._connection = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                try:
                    return _connect(self.path)
                except sqlite3.Error as error:
                    if not _is_damage(error):
                        raise
                    self._set_aside(error)
                    return _connect(self.path)
        except (OSError, sqlite3.Error) as error:
            warnings.warn(
                f"measurements cannot be kept in {self.path} ({error}); they are kept in memory: "
                "set JAXLWP_CACHE_DIR to a folder that can be written to",
                stacklevel=3,
            )
            return _in_memory(self.path)

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged or foreign file, and its journal, to a name that is free."""
        number = 0
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        # The journal first: a new file must never find an old one's.
        for suffix in ("-journal", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        os.replace(self.path, aside)
        warnings.warn(
            f"{self.path} is damaged or no store of jaxlwp ({error}); it was set aside as {aside} "
            "and is made anew: what it held will be measured again",
            stacklevel=4,
        )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the file; when that shows it damaged, once more with a new one.

        Raises:
          StoreError: the file cannot be used just now.
        """
        with self._lock:
            try:
                try:
                    with _undecodable_is_damage():
                        return work(self._connection)
                except sqlite3.Error as error:
                    if not _is_damage(error):
                        raise
                # Another process may have set the file aside already: look again before doing so.
                self._connection.close()
                self._connection = self._opened()
                with _undecodable_is_damage():
                    return work(self._connection)
            except sqlite3.Error as error:
                raise StoreError(
                    f"{self.path} cannot be used ({error}); see that no other program holds it, "
                    "that the disk has room, and that it can be written to"
                ) from error

    # --- reading ---

    def get_all(self, environment: Environment, kind: str) -> dict[str, Measurement]:
        """Every measurement of a kind, by key; none, with a warning, if the file cannot be used."""
        return self._found("WHERE environment = ? AND kind = ?", (environment.key, kind))

    def get(self, environment: Environment, kind: str, key: str) -> Measurement | None:
        """One measurement; None, with a warning, if the file cannot be used."""
        where = "WHERE environment = ? AND kind = ? AND key = ?"
        return self._found(where, (environment.key, kind, key)).get(key)

    def _found(self, where: str, values: Sequence[str]) -> dict[str, Measurement]:
        try:
            return {key: measurement for *_, key, measurement in self._rows(where, values)}
        except StoreError as error:
            warnings.warn(f"measurements are not read: {error}", stacklevel=3)
            return {}

    def environments(self) -> list[tuple[Environment, dict[str, int]]]:
        """Every environment, with the number of its entries of each kind.

        Raises:
          StoreError: the file cannot be used just now.
        """
        counts: dict[str, dict[str, int]] = {}
        for environment, kind, _, _ in self._rows("", ()):
            of = counts.setdefault(environment, {})
            of[kind] = of.get(kind, 0) + 1
        known = self._environments()
        return [(known[key], kinds) for key, kinds in sorted(counts.items()) if key in known]

    def _environments(self) -> dict[str, Environment]:
        result = {}
        for key, content in self._select("SELECT key, content FROM environments", ()):
            with contextlib.suppress(ValueError, TypeError):
                environment = Environment(**json.loads(content))
                if environment.key == key:
                    result[key] = environment
        return result

    def _rows(
        self, where: str, values: Sequence[str]
    ) -> Iterator[tuple[str, str, str, Measurement]]:
        """Environment, kind, key and measurement of every sound entry."""
        columns = "environment, kind, key, program, content, checksum"
        bad = 0
        for row in self._select(f"SELECT {columns} FROM entries {where} ORDER BY rowid", values):
            if any(not isinstance(value, str) for value in row) or row[-1] != _checksum(row[:-1]):
                bad += 1
                continue
            environment, kind, key, program, content, _ = row
            yield environment, kind, key, Measurement(program=program, **json.loads(content))
        if bad:
            warnings.warn(
                f"{self.path}: {bad} damaged entries are not used; they will be measured again",
                stacklevel=4,
            )

    def _select(self, query: str, values: Sequence[str]) -> list[Any]:
        return self._run(lambda connection: connection.execute(query, values).fetchall())

    # --- writing ---

    def put(self, environment: Environment, kind: str, entries: Mapping[str, Measurement]) -> None:
        """Add or replace measurements by key.

        They are on disk when this returns; if the file cannot be used, a warning says that they
        are not.
        """
        try:
            self._write([(environment, kind, entries)])
        except StoreError as error:
            warnings.warn(f"measurements were not kept: {error}", stacklevel=2)

    def _write(self, groups: Sequence[tuple[Environment, str, Mapping[str, Measurement]]]) -> None:
        """Write all of it or nothing.

        Raises:
          StoreError: the file cannot be used just now.
        """

        def work(connection: sqlite3.Connection) -> None:
            for environment, kind, entries in groups:
                description = json.dumps(dataclasses.asdict(environment), sort_keys=True)
                connection.execute(
                    "INSERT OR REPLACE INTO environments VALUES (?, ?)",
                    (environment.key, description),
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                    [_row(environment.key, kind, key, value) for key, value in entries.items()],
                )

        self._run(_as_transaction(work))

    def forget(self, environment: Environment | None = None, kind: str | None = None) -> int:
        """Drop entries of one environment or kind, or all, to measure them again.

        Returns:
          How many.

        Raises:
          StoreError: the file cannot be used just now; nothing is dropped then.
        """
        where, values = [], []
        if environment is not None:
            where.append("environment = ?")
            values.append(environment.key)
        if kind is not None:
            where.append("kind = ?")
            values.append(kind)
        clause = f" WHERE {' AND '.join(where)}" if where else ""

        def work(connection: sqlite3.Connection) -> int:
            return connection.execute(f"DELETE FROM entries{clause}", values).rowcount

        return self._run(_as_transaction(work))

    # --- files to take along ---

    def export(self, path: Path, environment: Environment | None = None) -> int:
        """Write the measurements, of one environment or all, to one JSON file; returns how many.

        The file is whole or not there.

        Raises:
          OSError: one of the two files cannot be used.
        """
        known = self._environments()
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, "environments": []}
        groups: dict[str, list[dict[str, Any]]] = {}
        for key, kind, name, measurement in self._rows("", ()):
            if key in known and environment in (None, known[key]):
                groups.setdefault(key, []).append(
                    {"kind": kind, "key": name, **measurement.to_json()}
                )
        for key, entries in sorted(groups.items()):
            content["environments"].append(
                {"environment": dataclasses.asdict(known[key]), "entries": entries}
            )
        _write_whole(path, json.dumps(content, indent=1))
        return sum(map(len, groups.values()))

    def import_file(self, path: Path) -> int:
        """Add what `export` wrote; of two entries the newer one stays. Returns how many were added.

        Raises:
          ValueError: the file is not there, or not one that `export` wrote.
          StoreError: the store's file cannot be used just now. Nothing is added in either case.
        """
        newer = []
        for environment, groups in read_export(path):
            for kind, entries in groups.items():
                known = self.get_all(environment, kind)
                newer.append(
                    (
                        environment,
                        kind,
                        {
                            key: entry
                            for key, entry in entries.items()
                            if key not in known or known[key].date < entry.date
                        },
                    )
                )
        self._write(newer)
        return sum(len(entries) for _, _, entries in newer)


def read_export(path: Path) -> list[tuple[Environment, dict[str, dict[str, Measurement]]]]:
    """What `Store.export` wrote: environments, and their measurements by kind and key.

    Raises:
      ValueError: the file is not there, or not one that `export` wrote.
    """
    try:
        content = json.loads(path.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, not {FORMAT_VERSION}")
        result = []
        for group in content["environments"]:
            kinds: dict[str, dict[str, Measurement]] = {}
            for entry in group["entries"]:
                kind, key = entry.pop("kind"), entry.pop("key")
                kinds.setdefault(str(kind), {})[str(key)] = Measurement(**entry)
            result.append((Environment(**group["environment"]), kinds))
        return result
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as exported measurements ({type(error).__name__}: {error}); "
            "give a file that `jaxlwp cache export` wrote"
        ) from error


def _row(environment: str, kind: str, key: str, measurement: Measurement) -> tuple[str, ...]:
    content = measurement.to_json()
    program = content.pop("program")
    row = (environment, kind, key, program, json.dumps(content, sort_keys=True))
    return (*row, _checksum(row))


def _checksum(row: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(row).encode()).hexdigest()[:16]


def _connect(path: Path | str) -> sqlite3.Connection:
    """Open a store, or make one.

    Raises:
      sqlite3.Error: the file is damaged, or cannot be used just now; `_is_damage` tells which.
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
        with _undecodable_is_damage():
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


def _in_memory(path: Path) -> sqlite3.Connection:
    """A store in memory, with what a file holds that can be read though not written."""
    with contextlib.suppress(sqlite3.Error), _undecodable_is_damage():
        file = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        with contextlib.closing(file):
            _check(file)
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            file.backup(memory)
            return memory
    return _connect(":memory:")


def _as_transaction(
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
def _locked(path: Path) -> Iterator[None]:
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


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's content is at fault, not its surroundings."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, _DamagedError) or (
        code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    )


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    handle, partial = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
