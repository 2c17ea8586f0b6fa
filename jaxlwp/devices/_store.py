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
import hashlib
import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from jaxlwp.devices._environment import Environment, Measurement
from jaxlwp.devices._sqlite import (
    FORMAT_VERSION,
    StoreError,
    T,
    as_transaction,
    connect,
    in_memory,
    is_damage,
    locked,
    undecodable_is_damage,
)
from jaxlwp.files import is_text, parse_json, read_text, write_file


def default_path() -> Path:
    """Where measurements are kept; JAXLWP_CACHE_DIR overrides the folder."""
    folder = os.environ.get("JAXLWP_CACHE_DIR") or platformdirs.user_cache_dir("jaxlwp")
    return Path(folder) / f"profile-{FORMAT_VERSION}.sqlite3"


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
        self._named_as_damaged: set[str] = set()
        self._connection = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                try:
                    return connect(self.path)
                except sqlite3.Error as error:
                    if not is_damage(error):
                        raise
                    self._set_aside(error)
                    return connect(self.path)
        except (OSError, sqlite3.Error) as error:
            warnings.warn(
                f"measurements cannot be kept in {self.path} ({error}); they are kept in memory: "
                "set JAXLWP_CACHE_DIR to a folder that can be written to",
                stacklevel=3,
            )
            return in_memory(self.path)

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
                    with undecodable_is_damage():
                        return work(self._connection)
                except sqlite3.Error as error:
                    if not is_damage(error):
                        raise
                # Another process may have set the file aside already: look again before doing so.
                self._connection.close()
                self._connection = self._opened()
                with undecodable_is_damage():
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
        known = self._environments(counts)
        return [(known[key], kinds) for key, kinds in sorted(counts.items()) if key in known]

    def _environments(self, used: Iterable[str]) -> dict[str, Environment]:
        """The environments whose description is sound, by key; names those that are not, once."""
        result = {}
        for key, content in self._select("SELECT key, content FROM environments", ()):
            with contextlib.suppress(ValueError, TypeError):
                environment = Environment(**parse_json(content))
                if environment.key == key:
                    result[key] = environment
        nameless = sorted(set(used) - set(result) - self._named_as_damaged)
        if nameless:
            self._named_as_damaged.update(nameless)
            warnings.warn(
                f"{self.path}: the descriptions of {len(nameless)} environments are damaged "
                f"({', '.join(nameless)}); what was measured in them is kept, but not listed or "
                "exported: measure there again, which restores the description, or drop all with "
                "`jaxlwp cache clear`",
                stacklevel=4,
            )
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
            try:
                measurement = Measurement(program=program, **parse_json(content))
            except (ValueError, TypeError):  # written so by somebody who knows the checksum
                bad += 1
                continue
            yield environment, kind, key, measurement
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

        self._run(as_transaction(work))

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

        return self._run(as_transaction(work))

    # --- files to take along ---

    def export(self, path: Path, environment: Environment | None = None) -> int:
        """Write the measurements, of one environment or all, to one JSON file; returns how many.

        The file is whole or not there.

        Raises:
          OSError: one of the two files cannot be used.
        """
        rows = list(self._rows("", ()))
        known = self._environments(row[0] for row in rows)
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, "environments": []}
        groups: dict[str, list[dict[str, Any]]] = {}
        for key, kind, name, measurement in rows:
            if key in known and environment in (None, known[key]):
                groups.setdefault(key, []).append(
                    {"kind": kind, "key": name, **measurement.to_json()}
                )
        for key, entries in sorted(groups.items()):
            content["environments"].append(
                {"environment": dataclasses.asdict(known[key]), "entries": entries}
            )
        write_file(path, json.dumps(content, indent=1))
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
        text = read_text(path, EXPORTED)
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        return _exported(parse_json(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as exported measurements ({type(error).__name__}: {error}); "
            f"give {EXPORTED}"
        ) from error


EXPORTED = "a file that `jaxlwp cache export` wrote"


def _exported(content: Any) -> list[tuple[Environment, dict[str, dict[str, Measurement]]]]:
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {content['format_version']}, not {FORMAT_VERSION}")
    result = []
    for group in content["environments"]:
        kinds: dict[str, dict[str, Measurement]] = {}
        for entry in group["entries"]:
            kind, key = entry.pop("kind"), entry.pop("key")
            if not (is_text(kind) and is_text(key)):
                raise ValueError(f"an entry has the kind {kind!a:.60} and the key {key!a:.60}")
            kinds.setdefault(kind, {})[key] = Measurement(**entry)
        result.append((Environment(**group["environment"]), kinds))
    return result


def _row(environment: str, kind: str, key: str, measurement: Measurement) -> tuple[str, ...]:
    content = measurement.to_json()
    program = content.pop("program")
    row = (environment, kind, key, program, json.dumps(content, sort_keys=True))
    return (*row, _checksum(row))


def _checksum(row: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(row).encode()).hexdigest()[:16]
