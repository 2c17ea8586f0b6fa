"""Habits of the shell: exit codes, quiet, JSON, pipes, interruptions, warnings, doctor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import pytest
from click.testing import CliRunner, Result

from jaxlwp.cli import _doctor, main
from jaxlwp.cli._shell import ExitCode
from jaxlwp.devices import Environment, Measurement, Store
from jaxlwp.devices._store import default_path
from jaxlwp.files import _write

ROOT = Path(__file__).parent.parent
PLAN = ("plan", "models.lenet:LeNet5", "--devices", "h100:2", "--batch", "8")
HERE = Environment(device_kind="test", platform="gpu", driver="1", jax="1", jaxlib="1")


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_options(name: str) -> None:
    options = {text for parameter in COMMANDS[name].params for text in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= options


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs/command-line.md").read_text()
    table = re.findall(r"^\| (\d+) \| ", page.partition("## Exit codes")[2], re.MULTILINE)
    assert [int(code) for code in table] == [int(code) for code in ExitCode]
    assert all(name.split()[0] in page for name in COMMANDS)


# --- results -------------------------------------------------------------------------------------


def test_plan_as_json_in_a_pipe() -> None:
    done = run(*PLAN, "--json", "-", "--save", "s.json", "--curve", "--why", "fc3")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)  # nothing else is there
    assert content["strategy"] == json.loads(Path("s.json").read_text())
    total_s = content["cost"].pop("total_s")
    assert sum(content["cost"].values()) == pytest.approx(total_s)
    assert content["memory"]["peak_bytes"] > 0 and content["mesh"] == {"device0": 2}
    assert [layer["name"] for layer in content["layers"]][:2] == ["conv1", "max_pool_0"]
    best = content["why"]["fc3"][0]["best_s"]
    assert best == pytest.approx(total_s) and len(content["why"]["fc3"]) > 1
    assert content["curve"][0]["seconds"] == pytest.approx(best)


def test_quiet_leaves_results() -> None:
    loud, quiet = run(*PLAN, "--save", "a.json"), run(*PLAN, "--save", "b.json", "--quiet")
    assert loud.stdout == quiet.stdout + "wrote a.json\n"
    assert "\x1b" not in loud.output  # no colour, no bars
    assert loud.stderr == quiet.stderr == ""
    cleared = run("cache", "clear", "--quiet", "--json", "count.json")
    assert (cleared.output, json.loads(Path("count.json").read_text())) == ("", {"measurements": 0})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("16GB", 16e9), ("16 gib", 16 * 2**30), ("1.5e3kB", 1.5e6), ("70e9", 70e9), ("2048", 2048)],
)
def test_sizes(text: str, num_bytes: float) -> None:
    (option,) = [each for each in COMMANDS["plan"].params if each.name == "memory_bytes"]
    context = click.Context(COMMANDS["plan"])
    assert option.process_value(context, text) == num_bytes


def test_memory_is_a_limit() -> None:
    assert run(*PLAN, "--memory", "80GB").exit_code == 0
    refused = run(*PLAN, "--memory", "1kB")
    assert refused.exit_code == 2 and "memory_bytes: 1,000 is too little" in refused.stderr


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_fault_of_ours_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlwp.cli._commands.parallelize", lambda *_, **__: [][0])
    done = run(*PLAN)
    assert done.exit_code == 3
    assert "IndexError" in done.stderr and "this is a fault of jaxlwp" in done.stderr


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["search", "write"])
def test_interrupted(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as it was, and nothing lies beside it."""
    Path("s.json").write_text("as it was")
    if where == "search":
        monkeypatch.setattr("jaxlwp.cli._commands.parallelize", interrupt)
    else:
        monkeypatch.setattr(_write.Path, "replace", interrupt)
    done = run(*PLAN, "--save", "s.json")
    assert done.exit_code == 130
    assert done.stderr.startswith("\nInterrupted: ") and "Traceback" not in done.stderr
    assert Path("s.json").read_text() == "as it was"
    assert os.listdir() == ["s.json"]


@pytest.mark.slow
def test_interrupted_by_a_signal(tmp_path: Path) -> None:
    """Ctrl-C while layers are measured: one line, 130, and the rates, measured before, are kept."""
    command = [sys.executable, "-m", "jaxlwp", "profile", "models.lenet:LeNet5", "--devices", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not _measured():
            assert process.poll() is None
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.strip().startswith("Interrupted: "), errors
    assert _measured() and not list(tmp_path.rglob("*damaged*"))


def _measured() -> bool:
    if not default_path().exists():
        return False
    with Store() as store:
        return bool(store.environments())


def test_warnings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    default_path().write_text("no database")
    done = run("cache", "list")
    assert done.exit_code == 0
    assert re.fullmatch(r"Warning: .* was set aside as .*\n", done.stderr)
    default_path().write_text("no database")
    assert run("cache", "list", "--quiet").stderr == ""


def test_damaged_environment_is_named_once() -> None:
    other = Environment(**{**vars(HERE), "device_kind": "other"})
    with Store() as store:
        for each in (HERE, other):
            store.put(each, "layer", {"k": Measurement(seconds=1.0)})
        store._connection.execute(
            "UPDATE environments SET content = replace(content, 'test', 'tess') WHERE key = ?",
            (HERE.key,),
        )
    with Store() as store, pytest.warns(UserWarning, match=f"1 environments.*{HERE.key}") as told:
        assert store.environments() == [(other, {"layer": 1})]
        assert store.environments() == [(other, {"layer": 1})]
        assert store.export(Path("out.json")) == 1
        assert store.get(HERE, "layer", "k") is not None  # who measured it still has it
        assert len(told) == 1
        store.put(HERE, "layer", {"new": Measurement(seconds=1.0)})
        assert len(store.environments()) == 2  # the description is there again
    listed = run("cache", "list")
    assert listed.exit_code == 0 and listed.stderr == ""


# --- doctor --------------------------------------------------------------------------------------


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """All holds; then its own numbers do not, or nothing can be tried, or the cache is damaged."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    done = run("doctor", "--json", "d.json")
    assert done.exit_code == 0, done.output
    found = json.loads(Path("d.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["mesh"] and found["cache"]["measurements"] == 0 and found["problems"] == []
    assert found["tried"]["own_error"] < 1e-4 and len(found["tried"]["faults"]) == 3
    for fault in found["tried"]["faults"]:
        assert fault["present"] == (fault["error"] > 1e-4)
        assert fault["name"].split(",")[0] in " ".join(done.stdout.replace("│", " ").split())
    monkeypatch.setattr(_doctor, "try_all", lambda: {**found["tried"], "own_error": 0.5})
    wrong = run("doctor")
    assert wrong.exit_code == 1 and "do not train with it" in " ".join(wrong.stdout.split())
    monkeypatch.setattr(_doctor, "try_all", lambda: found["tried"])
    default_path().write_text("no database")
    assert run("doctor").exit_code == 1


@pytest.mark.slow
def test_doctor_with_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are tried in another process, on simulated devices."""
    tried = _doctor._tried(jax.devices()[:1])
    assert tried["on"] == "4 simulated devices" and tried["own_error"] < 1e-4
    monkeypatch.setattr(_doctor, "NUM_DEVICES", 0)
    monkeypatch.setattr(_doctor.sys, "executable", "false")
    monkeypatch.setattr(_doctor.jax, "process_count", lambda: 2)
    assert "cannot be tried (exit code 1)" in _doctor._tried([])["problem"]
