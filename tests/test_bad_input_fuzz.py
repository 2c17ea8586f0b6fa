"""Files and command lines that nobody wrote: no exception but ours, and no file lost.

A few examples here, and many more of the same under `slow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxlwp
from jaxlwp.cli import main
from jaxlwp.devices import Environment, Measurement, Store, load_system
from jaxlwp.devices._store import _checksum, default_path
from jaxlwp.measure import load_profile
from tests.bad_input.desk import ENVIRONMENT, RATES, SYSTEM, arguments, loss_fn

ROOT = Path(__file__).parent.parent
HERE = Environment(**ENVIRONMENT)

few = settings(
    max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
many = settings(few, max_examples=500, derandomize=False)

# --- what is drawn -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\ud800", "sample", "a", "\0", "9" * 50]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Plain data of which one part, somewhere inside, is another or is not there."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(mutated(value[place])), *value[place + 1 :]]
    name = draw(st.sampled_from(sorted(value)))
    if draw(st.integers(0, 7)) == 0:
        return {key: each for key, each in value.items() if key != name}
    renamed = draw(st.text(max_size=4)) if draw(st.integers(0, 7)) == 0 else name
    rest = {key: each for key, each in value.items() if key != name}
    return {**rest, renamed: draw(mutated(value[name]))}


def texts(content: Any) -> st.SearchStrategy[bytes]:
    """JSON files: a sound one with a part changed, cut off, or other bytes altogether."""
    whole = json.dumps(content).encode()
    changed = mutated(content).map(lambda data: json.dumps(data).encode())
    cut = st.integers(0, len(whole)).map(lambda length: whole[:length])
    deep = st.sampled_from([b"[" * 10**5, b'{"configs":' * 10**5, b"[" * 63 + b"]" * 63])
    return changed | changed | cut | deep | st.binary(max_size=40)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Only errors of the documented classes, of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and not isinstance(error, UnicodeError), repr(error)
            assert len(str(error)) > 20, repr(error)


# --- strategies, profiles, systems ---------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> jaxlwp.Plan:
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    return jaxlwp.parallelize(loss_fn, *arguments(), devices=2, rates=RATES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_strategy(plan: jaxlwp.Plan, folder: Path, content: bytes) -> None:
    path = folder / "s.json"
    path.write_bytes(content)
    with ours():
        found = jaxlwp.Strategy.load(path)
        again = jaxlwp.Strategy.from_json(found.to_json())
        assert again == found
        assert plan.space.evaluate(found).total_s > 0
    assert path.read_bytes() == content


def check_profile(folder: Path, content: bytes) -> None:
    path = folder / "p.json"
    path.write_bytes(content)
    with ours(), Store(folder / "store") as store:
        store.forget()
        store.put(HERE, "layer", {"mine": Measurement(seconds=1.0)})
        try:
            store.import_file(path)
            store.environments()
            store.export(folder / "again.json")
            load_profile(path)
        finally:
            assert store.get(HERE, "layer", "mine") is not None
    assert path.read_bytes() == content


def check_system(folder: Path, content: bytes) -> None:
    path = folder / "s.toml"
    path.write_bytes(content)
    with ours():
        system = load_system(path)
        assert system.num_devices >= 1 and str(system)
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def files(plan: jaxlwp.Plan) -> dict[str, tuple[Any, Callable[..., None]]]:
    rates = {"kind": "rates", "key": "device0", "data": plan.space.devices.to_json()}
    layer = {"kind": "layer", "key": "k", "each_s": [1.0], "samples": 3, "program": "p"}
    entries = [{**each, "seconds": 1.0, "date": "2026"} for each in (rates, layer)]
    group = {"environment": ENVIRONMENT, "entries": entries}
    return {
        "strategy": (json.loads(plan.strategy.to_json()), check_strategy),
        "profile": ({"format_version": 2, "environments": [group]}, check_profile),
    }


def fuzz_json(data: st.DataObject, kind: str, files: Any, plan: Any, folder: Path) -> None:
    content, check = files[kind]
    given_file = data.draw(texts(content))
    check(*([plan] if kind == "strategy" else []), folder, given_file)


TOML = st.lists(
    st.sampled_from(SYSTEM.splitlines())
    | st.sampled_from(["[across]", "adapters = 8", "devices = 99", "[inside.x]", "[[inside]]"])
    | st.builds(
        "{} = {}".format,
        st.sampled_from(["name", "gpu", "devices", "bytes_per_s", "start_s", "adapters"]),
        JSON.map(json.dumps)
        | st.sampled_from(["nan", "inf", "2026-01-01", "0x10", "{}", "9" * 99]),
    ),
    max_size=9,
).map("\n".join)
SYSTEMS = TOML.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=30)


@pytest.mark.parametrize("kind", ["strategy", "profile"])
@given(st.data())
@few
def test_json_files(
    kind: str, files: Any, plan: jaxlwp.Plan, folder: Path, data: st.DataObject
) -> None:
    fuzz_json(data, kind, files, plan, folder)


@given(SYSTEMS)
@example(b"a = " + b"[" * 10**5)
@example(b"a = " + b"9" * 10**5)
@few
def test_systems(folder: Path, content: bytes) -> None:
    check_system(folder, content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strategy", "profile"])
@given(st.data())
@many
def test_many_json_files(
    kind: str, files: Any, plan: jaxlwp.Plan, folder: Path, data: st.DataObject
) -> None:
    fuzz_json(data, kind, files, plan, folder)


@pytest.mark.slow
@given(SYSTEMS)
@many
def test_many_systems(folder: Path, content: bytes) -> None:
    check_system(folder, content)


# --- the cache -----------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.sampled_from([HERE.key, "none"]) | st.text(max_size=3),
        st.sampled_from(["layer", "rates"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        mutated({"seconds": 1.0, "data": {}, "samples": 1}).map(json.dumps)
        | st.just("[" * 10**5)
        | st.binary(max_size=5),
        st.booleans(),
    ),
    max_size=4,
)
"""Entries that somebody wrote by hand, with right checksums or wrong ones."""

DESCRIPTIONS = st.lists(
    st.tuples(st.sampled_from([HERE.key, "none"]), mutated(dict(vars(HERE))).map(json.dumps))
    | st.just((HERE.key, "[" * 10**5)),
    max_size=2,
)


def check_store(folder: Path, rows: list[Any], descriptions: list[Any]) -> None:
    """What is sound is returned, whatever lies beside it, and nothing is set aside."""
    path = folder / "rows"
    path.unlink(missing_ok=True)
    sound = Measurement(seconds=2.0)
    with Store(path) as store:
        store.put(HERE, "layer", {"sound": sound})
    raw = sqlite3.connect(path, isolation_level=None)
    for *row, right in rows:
        sealed = right and all(isinstance(value, str) for value in row)
        values = (*row, _checksum(row) if sealed else "0")
        raw.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?)", values)
    for description in descriptions:
        raw.execute("INSERT OR REPLACE INTO environments VALUES (?, ?)", description)
    raw.close()
    with ours(), Store(path) as store:
        assert store.get(HERE, "layer", "sound") == sound
        store.environments()
        store.export(folder / "rows.json")
        store.put(HERE, "layer", {"new": sound})
        assert store.export(folder / "rows.json") >= 2
    assert not list(folder.glob("rows.damaged*"))


@given(ROWS, DESCRIPTIONS)
@few
def test_entries(folder: Path, rows: list[Any], descriptions: list[Any]) -> None:
    check_store(folder, rows, descriptions)


@pytest.mark.slow
@given(ROWS, DESCRIPTIONS)
@many
def test_many_entries(folder: Path, rows: list[Any], descriptions: list[Any]) -> None:
    check_store(folder, rows, descriptions)


# --- command lines -------------------------------------------------------------------------------

VALUES = st.sampled_from(
    ["0", "-1", "8", "nan", "1e400", "", "x", "16GB", "\ud800", "a\0b", "y" * 300, "h100:2", "8x8"]
    + ["models.lenet:LeNet5", "os:sep", "bad.json", "bad.toml", "folder", "-", "--", "data", "é"]
    + ["conv1:sample=2", "conv1:rows=2", "all", "h100:0", "dgx-h100:99999999", "1,2", "layer"]
) | st.text(max_size=5)
STEPS = ("parallelize", "compare", "compare_compiled", "pareto", "price", "provide_devices")
"""What takes long, or starts what takes long, in the commands about a model."""


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        elif name != "doctor":
            yield [*path, name], command


COMMANDS = list(leaves(main))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, in any order, and any values."""
    words, command = draw(st.sampled_from(COMMANDS))
    parts: list[list[str]] = []
    if draw(st.booleans()):
        parts.append([draw(st.just("models.lenet:LeNet5") | VALUES)])
    options = [each for each in command.params if isinstance(each, click.Option)]
    for option in draw(st.lists(st.sampled_from(options), max_size=4)):
        if option.name != "again":
            parts.append([option.opts[0], *([] if option.is_flag else [draw(VALUES)])])
    parts += draw(st.lists(VALUES.map(lambda text: [text]), max_size=1))
    return [*words, *(word for part in draw(st.permutations(parts)) for word in part)]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with files, in which nothing that would take long is done."""

    def stop(*_: Any, **__: Any) -> Any:
        raise ValueError("far enough: the options were read")

    for name in STEPS:
        monkeypatch.setattr(f"jaxlwp.cli._commands.{name}", stop)
    monkeypatch.setattr("jaxlwp.cli._simulate.scaling", stop)
    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("bad.json", "bad.toml"):
        (tmp_path / name).write_text("{")
    with Store() as store:
        store.put(HERE, "layer", {"k": Measurement(seconds=1.0)})
    return tmp_path


def check_command_line(folder: Path, words: list[str]) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code in (0, 2), (words, done.output)
    assert isinstance(done.exception, SystemExit | None), words
    if done.exit_code == 2:
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("Error: "), done.stderr
        if not {"bad.json", "bad.toml"} & set(words):
            assert (folder / "bad.json").read_text() == "{"
    assert (folder / "bad.toml").exists() and (folder / "bad.json").exists()
    assert default_path().exists() and not list(folder.rglob("*.partial"))
    for path in folder.iterdir():  # what a command was told to write
        if path.is_file() and path.name not in ("bad.json", "bad.toml"):
            os.unlink(path)


@given(command_lines())
@example(["plan", "models.lenet:LeNet5", "--save", "y" * 300])
@example(["cache", "import", "\ud800"])
@few
def test_command_lines(shell: Path, words: list[str]) -> None:
    check_command_line(shell, words)


@pytest.mark.slow
@given(command_lines())
@many
def test_many_command_lines(shell: Path, words: list[str]) -> None:
    check_command_line(shell, words)
