"""The store of measurements: two writers at once, kills, damage, other devices.

Whatever happens to the file: nothing that was complete is lost to another process or a kill, and
every figure that is returned is one that was written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlwp.devices import Environment, Measurement, Store, read_export

HERE = Environment(device_kind="test", platform="cpu", driver="1", jax="1", jaxlib="1", host="h")

WRITER = """
import sys
from pathlib import Path
from jaxlwp.devices import Environment, Measurement, Store
here = Environment(device_kind="test", platform="cpu", driver="1", jax="1", jaxlib="1", host="h")
store = Store(Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    store.put(here, "layer", {f"{sys.argv[2]}-{n}": Measurement(seconds=n + 0.5)})
    print(n, flush=True)
"""


def write(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def filled(path: Path, count: int = 200) -> dict[str, Measurement]:
    entries = {
        f"key{n}": Measurement(
            seconds=n / 7,
            spread=0.1,
            samples=n,
            program=f"p{n}",
            each_s=(n / 7,) * (n % 3),
            data={"n": n},
        )
        for n in range(count)
    }
    with Store(path) as store:
        store.put(HERE, "layer", entries)
    return entries


def test_round_trip(tmp_path: Path) -> None:
    entries = filled(tmp_path / "s")
    with Store(tmp_path / "s") as store:
        assert store.get_all(HERE, "layer") == entries
        assert store.get(HERE, "layer", "key3") == entries["key3"]
        assert store.get(HERE, "layer", "none") is None
        assert store.get_all(HERE, "rates") == {}
        assert store.environments() == [(HERE, {"layer": 200})]
        assert store.forget(HERE, "rates") == 0
        assert store.forget(kind="layer") == 200
        assert store.get_all(HERE, "layer") == {}


@pytest.mark.parametrize("field", ["device_kind", "driver", "jax", "jaxlib", "host", "at_once"])
def test_another_environment_is_not_used(tmp_path: Path, field: str) -> None:
    filled(tmp_path / "s")
    other = Environment(**{**vars(HERE), field: 8 if field == "at_once" else "other"})
    with Store(tmp_path / "s") as store:
        assert store.get_all(other, "layer") == {}
        assert store.get(other, "layer", "key1") is None


def test_two_writers_at_once(tmp_path: Path) -> None:
    writers = [write(tmp_path / "s", name, 150) for name in "ab"]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    with Store(tmp_path / "s") as store:
        found = store.get_all(HERE, "layer")
    assert {f"{name}-{n}" for name in "ab" for n in range(150)} == set(found)
    assert all(entry.seconds == int(key[2:]) + 0.5 for key, entry in found.items())


def test_killed_in_the_middle(tmp_path: Path) -> None:
    for attempt, wait_for in enumerate((1, 17, 60)):
        writer = write(tmp_path / "s", str(attempt), 100_000)
        assert writer.stdout is not None
        complete = [writer.stdout.readline() for _ in range(wait_for)]
        writer.send_signal(signal.SIGKILL)
        complete += writer.stdout.readlines()
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Store(tmp_path / "s") as store:
                found = store.get_all(HERE, "layer")
        assert {f"{attempt}-{int(n)}" for n in complete} <= set(found)


FOREIGN = ("text", "database", "folder", "empty database")


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file_is_set_aside(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "text":
        path.write_text("this is no database " * 100)
    elif kind == "folder":
        path.mkdir()
    else:
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 3")
            if kind == "database":
                other.execute("CREATE TABLE entries (environment TEXT)")
    with pytest.warns(UserWarning, match=r"set aside as .*damaged-0"):
        store = Store(path)
    store.put(HERE, "layer", {"k": Measurement(seconds=1.0)})
    assert store.get_all(HERE, "layer") == {"k": Measurement(seconds=1.0)}
    assert (tmp_path / "s.damaged-0").exists()
    store.close()
    path.write_text("again")
    with pytest.warns(UserWarning, match=r"damaged-1"):
        Store(path).close()
    assert (tmp_path / "s.damaged-0").exists()


def all_sound(path: Path, entries: dict[str, Measurement]) -> None:
    """Whatever is returned was written, and the store goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Store(path) as store:
            for key, entry in store.get_all(HERE, "layer").items():
                assert entries[key] == entry
            store.environments()
            store.put(HERE, "layer", {"new": Measurement(seconds=2.5)})
            assert store.get(HERE, "layer", "new") == Measurement(seconds=2.5)


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_truncated(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("truncated") / "s"
    entries = filled(path)
    os.truncate(path, int(share * path.stat().st_size))
    all_sound(path, entries)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_flipped_bits(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "s"
    entries = filled(path)
    content = bytearray(path.read_bytes())
    for share, mask in flips:
        content[int(share * len(content))] ^= mask
    path.write_bytes(content)
    all_sound(path, entries)


def test_name_that_is_no_text(tmp_path: Path) -> None:
    """SQLite quotes it in a message that Python's module cannot decode."""
    path = tmp_path / "s"
    entries = filled(path)
    content = path.read_bytes()
    for match in re.finditer(b"entries", content):
        name = bytearray(content)
        name[match.start() + 2] ^= 128
        path.write_bytes(name)
        all_sound(path, entries)


def test_changed_figure_is_not_used(tmp_path: Path) -> None:
    entries = filled(tmp_path / "s", 3)
    with sqlite3.connect(tmp_path / "s") as raw:
        raw.execute("UPDATE entries SET content = replace(content, '0.1', '0.2') WHERE rowid = 2")
    with Store(tmp_path / "s") as store, pytest.warns(UserWarning, match="1 damaged entries"):
        found = store.get_all(HERE, "layer")
    assert set(found) == {"key0", "key2"}
    assert all(entries[key] == entry for key, entry in found.items())


def test_unwritable_folder_leaves_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="kept in memory"):
        store = Store(tmp_path / "file" / "s")
    store.put(HERE, "layer", {"k": Measurement(seconds=1.0)})
    assert store.get(HERE, "layer", "k") == Measurement(seconds=1.0)


def test_what_cannot_be_written_is_still_read(tmp_path: Path) -> None:
    entries = filled(tmp_path / "s", 5)
    (tmp_path / "s.lock").unlink()
    (tmp_path / "s.lock").mkdir()  # root writes to read-only folders; nobody opens this one
    with pytest.warns(UserWarning, match="kept in memory"):
        store = Store(tmp_path / "s")
    assert store.get_all(HERE, "layer") == entries
    store.put(HERE, "layer", {"k": Measurement(seconds=1.0)})
    assert store.get(HERE, "layer", "k") == Measurement(seconds=1.0)
    (tmp_path / "s.lock").rmdir()
    unharmed(tmp_path / "s", entries)


def unharmed(path: Path, entries: dict[str, Measurement]) -> None:
    """The file was not set aside and holds what it held."""
    assert not list(path.parent.glob("*damaged*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Store(path) as store:
            found = store.get_all(HERE, "layer")
    assert entries.items() <= found.items()


FULL = """
import resource, sys, warnings
from pathlib import Path
from jaxlwp.devices import Environment, Measurement, Store
here = Environment(device_kind="test", platform="cpu", driver="1", jax="1", jaxlib="1", host="h")
size = Path(sys.argv[1]).stat().st_size + 4096
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
with Store(Path(sys.argv[1])) as store, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    many = {f"many{n}": Measurement(seconds=1.0, data={"text": "x" * 1000}) for n in range(100)}
    store.put(here, "layer", many)
    print(*(w.message for w in caught), sep="|")
    print(len(store.get_all(here, "layer")))
"""


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    entries = filled(tmp_path / "s", 20)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "s")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "measurements were not kept" in done.stdout
    assert done.stdout.split()[-1] == "20"
    unharmed(tmp_path / "s", entries)


def test_locked_by_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlwp.devices._sqlite.BUSY_S", 0.1)
    entries = filled(tmp_path / "s", 20)
    with Store(tmp_path / "s") as store:
        other = sqlite3.connect(tmp_path / "s", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.warns(UserWarning, match="not read: .*locked"):
            assert store.get_all(HERE, "layer") == {}
        with pytest.warns(UserWarning, match="not kept: .*locked"):
            store.put(HERE, "layer", {"k": Measurement(seconds=1.0)})
        with pytest.raises(OSError, match="cannot be used .*locked"):
            store.forget()
        with pytest.raises(OSError, match="cannot be used .*locked"):
            store.environments()
        other.execute("ROLLBACK")
        other.close()
        assert store.get_all(HERE, "layer") == entries
    unharmed(tmp_path / "s", entries)


def test_threads_share_a_store(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store, ThreadPoolExecutor(8) as pool:
        entries = {f"k{n}": Measurement(seconds=float(n)) for n in range(100)}
        list(pool.map(lambda key: store.put(HERE, "layer", {key: entries[key]}), entries))
        assert list(pool.map(lambda key: store.get(HERE, "layer", key), entries)) == list(
            entries.values()
        )
    unharmed(tmp_path / "s", entries)


def test_damage_under_an_open_store(tmp_path: Path) -> None:
    """Two stores meet the same damage: it is set aside once, and the new file serves both."""
    filled(tmp_path / "s", 2000)
    stores = [Store(tmp_path / "s") for _ in range(2)]
    content = (tmp_path / "s").read_bytes()
    changed = content[:24] + b"\0\0\1\0" + content[28:4096]  # the counter of changes: read again
    (tmp_path / "s").write_bytes(changed + b"\xff" * (len(content) - 4096))
    with pytest.warns(UserWarning, match="set aside"):
        assert stores[0].get_all(HERE, "layer") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stores[0].put(HERE, "layer", {"a": Measurement(seconds=1.0)})
    for store in stores:
        store.close()
    with Store(tmp_path / "s") as store:
        assert store.get_all(HERE, "layer") == {"a": Measurement(seconds=1.0)}
    assert len(list(tmp_path.glob("*damaged*"))) == 1


class TestExport:
    def test_round_trip(self, tmp_path: Path) -> None:
        entries = filled(tmp_path / "s")
        with Store(tmp_path / "s") as store:
            assert store.export(tmp_path / "out.json") == 200
        with Store(tmp_path / "other") as store:
            assert store.import_file(tmp_path / "out.json") == 200
            assert store.get_all(HERE, "layer") == entries
            assert store.import_file(tmp_path / "out.json") == 0
        assert read_export(tmp_path / "out.json") == [(HERE, {"layer": entries})]

    def test_the_newer_entry_stays(self, tmp_path: Path) -> None:
        old, new = (Measurement(seconds=s, date=d) for s, d in ((1.0, "2026-01"), (2.0, "2026-02")))
        for first, second in ((old, new), (new, old)):
            with Store(tmp_path / f"a{first.seconds}") as store:
                store.put(HERE, "layer", {"k": first})
                store.export(tmp_path / "out.json")
            with Store(tmp_path / f"b{first.seconds}") as store:
                store.put(HERE, "layer", {"k": second})
                store.import_file(tmp_path / "out.json")
                assert store.get(HERE, "layer", "k") == new

    def test_all_of_a_file_or_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("jaxlwp.devices._sqlite.BUSY_S", 0.1)
        filled(tmp_path / "s", 20)
        with Store(tmp_path / "s") as store:
            store.put(HERE, "rates", {"k": Measurement(seconds=1.0)})
            store.export(tmp_path / "out.json")
        with Store(tmp_path / "other") as store:
            other = sqlite3.connect(tmp_path / "other", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(OSError, match="cannot be used .*locked"):
                store.import_file(tmp_path / "out.json")
            other.execute("ROLLBACK")
            assert store.environments() == []
            assert store.import_file(tmp_path / "out.json") == 21

    @pytest.mark.parametrize(
        "text",
        [
            None,
            "no json",
            "[]",
            '{"format_version": 99, "environments": []}',
            '{"format_version": 2}',
            '{"format_version": 2, "environments": [{"entries": []}]}',
            '{"format_version": 1, "environments": []}',
            "nan",
            "negative",
            "text",
            "one of several",
            "no list",
        ],
    )
    def test_garbage_changes_nothing(self, tmp_path: Path, text: str | None) -> None:
        path = tmp_path / "in.json"
        wrong = {
            "nan": {"seconds": float("nan")},
            "negative": {"seconds": -1.0},
            "text": {"seconds": "1.0"},
            "one of several": {"each_s": [1.0, -1.0]},
            "no list": {"each_s": 1.0},
        }
        if text in wrong:
            sound = {"kind": "layer", "key": "sound", "seconds": 1.0}
            bad = {"kind": "layer", "key": "bad", "seconds": 1.0, **wrong[text]}
            group = {"environment": vars(HERE), "entries": [sound, bad]}
            path.write_text(json.dumps({"format_version": 2, "environments": [group]}))
        elif text is not None:
            path.write_text(text)
        entries = filled(tmp_path / "s", 3)
        with Store(tmp_path / "s") as store:
            with pytest.raises(ValueError, match=r"in.json(: No such file| cannot be read)"):
                store.import_file(path)
            assert store.get_all(HERE, "layer") == entries
