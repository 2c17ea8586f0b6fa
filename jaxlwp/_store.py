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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

FORMAT_VERSION = 1
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
      data: more, as plain JSON data.

    Raises:
      ValueError: a figure is negative, infinite or NaN.
    """

    seconds: float
    spread: float = 0.0
    samples: int = 1
    date: str = ""
    program: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seconds", "spread", "samples"):
            value = getattr(self, name)
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


class Store:
    """Measurements in one file.

    A folder that cannot be written to is named in a warning, and the store lives in memory.

    Args:
      path: the file; see `default_path`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self._connection = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                try:
                    return _connect(self.path)
                except sqlite3.DatabaseError as error:
                    if _is_busy(error):
                        raise
                    self._set_aside(error)
                    return _connect(self.path)
        except (OSError, sqlite3.Error) as error:
            warnings.warn(
                f"measurements cannot be kept in {self.path} ({error}); they are kept in memory: "
                "set JAXLWP_CACHE_DIR to a folder that can be written to",
                stacklevel=3,
            )
            return _connect(":memory:")

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged or foreign file, and its journal, to a name that is free."""
        number = 0
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        os.replace(self.path, aside)
        for suffix in ("-journal", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
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

    # --- reading ---

    def get_all(self, environment: Environment, kind: str) -> dict[str, Measurement]:
        """Every measurement of a kind, by key."""
        return {
            key: measurement
            for _, _, key, measurement in self._rows(
                "WHERE environment = ? AND kind = ?", (environment.key, kind)
            )
        }

    def get(self, environment: Environment, kind: str, key: str) -> Measurement | None:
        """One measurement."""
        found = self._rows(
            "WHERE environment = ? AND kind = ? AND key = ?", (environment.key, kind, key)
        )
        return next((measurement for *_, measurement in found), None)

    def environments(self) -> list[tuple[Environment, dict[str, int]]]:
        """Every environment, with the number of its entries of each kind."""
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
            yield environment, kind, key, _measurement(program, json.loads(content))
        if bad:
            warnings.warn(
                f"{self.path}: {bad} damaged entries are not used; they will be measured again",
                stacklevel=4,
            )

    def _select(self, query: str, values: Sequence[str]) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.DatabaseError) and _is_busy(error):
                raise
            self._rebuild(error)
            return []

    def _rebuild(self, error: Exception) -> None:
        """Set a file aside that turned out to be damaged, and open a new one."""
        self._connection.close()
        with _locked(self.path):
            self._set_aside(error)
        self._connection = self._opened()

    # --- writing ---

    def put(self, environment: Environment, kind: str, entries: Mapping[str, Measurement]) -> None:
        """Add or replace measurements by key; they are on disk when this returns."""
        try:
            self._write(environment, kind, entries)
        except sqlite3.DatabaseError as error:
            if _is_busy(error) or "full" in str(error) or "readonly" in str(error):
                warnings.warn(f"{self.path}: measurements were not kept ({error})", stacklevel=2)
                return
            self._rebuild(error)
            self._write(environment, kind, entries)

    def _write(
        self, environment: Environment, kind: str, entries: Mapping[str, Measurement]
    ) -> None:
        description = json.dumps(dataclasses.asdict(environment), sort_keys=True)
        with _transaction(self._connection) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO environments VALUES (?, ?)", (environment.key, description)
            )
            connection.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                [_row(environment.key, kind, key, value) for key, value in entries.items()],
            )

    def forget(self, environment: Environment | None = None, kind: str | None = None) -> int:
        """Drop entries of one environment or kind, or all, to measure them again.

        Returns:
          How many.
        """
        where, values = [], []
        if environment is not None:
            where.append("environment = ?")
            values.append(environment.key)
        if kind is not None:
            where.append("kind = ?")
            values.append(kind)
        clause = f" WHERE {' AND '.join(where)}" if where else ""
        with _transaction(self._connection) as connection:
            return connection.execute(f"DELETE FROM entries{clause}", values).rowcount

    # --- files to take along ---

    def export(self, path: Path, environment: Environment | None = None) -> int:
        """Write the measurements, of one environment or all, to one JSON file; returns how many.

        The file is whole or not there.
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
          ValueError: the file is not there, or not one that `export` wrote; nothing is added then.
        """
        added = 0
        for environment, groups in read_export(path):
            for kind, entries in groups.items():
                known = self.get_all(environment, kind)
                newer = {
                    key: entry
                    for key, entry in entries.items()
                    if key not in known or known[key].date < entry.date
                }
                self.put(environment, kind, newer)
                added += len(newer)
        return added


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


def _measurement(program: str, content: dict[str, Any]) -> Measurement:
    return Measurement(program=program, **content)


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
      sqlite3.DatabaseError: the file is damaged, or something else.
    """
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables == 0 and not (path != ":memory:" and Path(path).stat().st_size):
            connection.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {_SCHEMA} COMMIT;"
            )
        (mark,) = connection.execute("PRAGMA application_id").fetchone()
        if mark != APPLICATION_ID:
            raise sqlite3.DatabaseError("it is another program's file")
        (sound,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(sound)
        connection.execute("SELECT environment, kind, key, program, content, checksum FROM entries")
        connection.execute("SELECT key, content FROM environments")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time looks at a file and sets it aside."""
    try:
        import fcntl
    except ImportError:  # Windows: a damaged file might be set aside twice
        yield
        return
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_busy(error: sqlite3.DatabaseError) -> bool:
    return "locked" in str(error) or "busy" in str(error)


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
