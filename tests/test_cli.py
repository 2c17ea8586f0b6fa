"""The command line: plans, comparisons, models of every kind, and errors of one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner, Result

from jaxlwp import BASELINES
from jaxlwp.cli._commands import main
from jaxlwp.cli._workload import Workload, load_workload
from jaxlwp.devices import Environment, Measurement, Store

LENET = "models.lenet:LeNet5"
RATES = "--flops 1e9 --memory-bandwidth 1e9 --latency 1e-5 --bandwidth 1e9".split()
ROOT = Path(__file__).parent.parent

MODULES = """
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

number = 3


class Normed(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3,))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Wordless(nn.Module):
    input_shape: ClassVar = (8, 8, 1)

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3))(x).sum((1, 2, 3))


class Pixels(nn.Module):
    input_shape: ClassVar = (8, 8, 1)

    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, (3, 3))(x)


class Needy(nn.Module):
    features: int
    input_shape: ClassVar = (8, 8, 1)

    def __call__(self, x):
        return x


class Graph(nnx.Module):
    input_shape = (8, 8, 1)

    def __init__(self, *, rngs, image_size=16):
        self.norm = nnx.BatchNorm(image_size * image_size, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(image_size * image_size, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(self.norm(x.reshape(x.shape[0], -1))))


instance = Normed(features=6)


def triple(batch=16):
    def loss(params, x, y):
        return jnp.mean((x @ params["w"] - y) ** 2)

    return loss, {"w": np.zeros((6, 2), np.float32)}, (np.ones((batch, 6), np.float32), 1.0)


def fixed():
    return (lambda w, x: jnp.mean(x @ w)), np.zeros((6, 2), np.float32), np.ones((16, 6))


def pair():
    return 1, 2


def broken():
    raise RuntimeError("no data here")


def unfit():
    return (lambda w, x: jnp.mean(x @ w)), np.zeros((6, 2)), (np.ones((4, 5)),)
"""


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test has its own module search path, XLA flags and measured rates."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "rates"))


@pytest.fixture
def user_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's modules, as current folder."""
    (tmp_path / "user_models.py").write_text(MODULES)
    (tmp_path / "user_broken.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    return tmp_path


@pytest.fixture
def eight() -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# --- plan ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight")
def test_plan_of_each_strategy_and_a_saved_one(tmp_path: Path) -> None:
    saved = tmp_path / "found.json"
    options = [LENET, "--devices", "8", "--batch", "16", *RATES]

    found = _run("plan", *options, "--save", str(saved))
    again = _run("plan", *options, "--strategy", str(saved))
    data = _run("plan", *options, "--strategy", "data", "--input", "32x32x1")

    assert found.exit_code == again.exit_code == data.exit_code == 0, found.output + again.output
    assert f"{LENET}, batch 16, on 8 x " in found.stdout
    assert "strategy search on 8 x " in found.stdout
    assert "optimal" in found.stdout
    assert all(layer in found.stdout for layer in ("conv1", "conv2", "fc3", "fc4", "fc5"))
    assert len(json.loads(saved.read_text())["configs"]) > 5
    rows = [line for line in found.stdout.splitlines() if "│" in line]
    assert rows == [line for line in again.stdout.splitlines() if "│" in line]
    assert "strategy data on 8 x " in data.stdout
    assert "sample=8" in data.stdout
    assert sorted(tmp_path.iterdir()) == [saved]  # nothing half written, no rates measured


def test_plan_with_constraints_and_reasons() -> None:
    command = ["plan", LENET, "--devices", "4", "--batch", "64", *RATES]
    pinned = ["--pin", "fc3:channel=2,sample=2", "--pin", "conv1:", "--forbid", "reduction"]
    result = _run(*command, *pinned, "--replicated", "*fc5*", "--why", "fc3:sample")
    assert "under the constraints given" in result.output
    assert re.search(r"fc3 .*sample=2 channel=2", result.output)
    assert re.search(r"conv1 .*replicated", result.output)
    assert "layer fc3 with sample split" in result.output
    everything = _run(*command, "--why", "all", "--curve", "--objective", "overlap")
    assert "fastest strategies for less and less memory" in everything.output
    assert everything.output.count("ms)") > 10
    for wrong, message in (
        (["--pin", "fc3=channel"], "give a layer and its split"),
        (["--pin", "fc9:channel=2"], "matches no layer"),
        (["--forbid", "rows"], "is no dimension"),
        (["--why", "fc9"], "there is no layer 'fc9'"),
        (["--memory", "-1"], "give a positive number of bytes"),
        (["--memory", "1000"], "is too little"),
    ):
        refused = _run(*command, *wrong)
        assert refused.exit_code == 2
        assert message in refused.output and refused.output.count("\n") == 1


@pytest.mark.usefixtures("eight")
@pytest.mark.usefixtures("eight")
def test_plan_with_the_rates_of_a_system(tmp_path: Path) -> None:
    """By name, and of a file: nothing is measured."""
    options = ["plan", LENET, "--devices", "8", "--batch", "16"]
    file = tmp_path / "cluster.toml"
    file.write_text(
        'name = "mine"\ngpu = "a100"\n[inside]\ndevices = 8\nbytes_per_s = 1e11\nstart_s = 0.0\n'
    )
    for rates, name in (("h200", "dgx-h200"), ("DGX-A100", "dgx-a100"), (str(file), "mine")):
        result = _run(*options, "--rates", rates)
        assert result.exit_code == 0, result.stderr
        assert f"rates: system {name}" in " ".join(result.stdout.split())
        assert "measured" not in result.stdout


def test_plan_splits_a_batch_unevenly() -> None:
    result = _run("plan", LENET, "--devices", "8", "--batch", "6", *RATES)
    assert result.exit_code == 0, result.output


def test_simulates_devices_when_nothing_says_how_many(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAXLWP_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "jaxlwp", "plan", LENET, "--devices", "8", *RATES]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"on 8 x cpu, simulated on {os.cpu_count()} processor cores" in done.stdout
    assert "strategy search on 8 x cpu" in done.stdout


# --- compare -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight")
def test_compare(tmp_path: Path) -> None:
    file = tmp_path / "results.json"

    result = _run(
        "compare", LENET, "--devices", "8", "--batch", "16",
        "--rounds", "2", "--json", str(file), *RATES,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert f"{LENET}, batch 16, training step on 8 x " in result.stdout
    data = json.loads(file.read_text())
    assert (data["model"], data["batch"], data["devices"]) == (LENET, 16, 8)
    assert {"machine", "versions", "date", "rates"} <= set(data)
    assert data["rounds"] == 2
    assert [entry["strategy"] for entry in data["results"]] == ["search", *BASELINES]
    for entry in data["results"]:
        assert entry["strategy"] in result.stdout
        assert entry["predicted_bytes_by_kind"] == entry["compiled_bytes_by_kind"]
        assert entry["predicted_bytes"] == entry["compiled_bytes"] > 0
        assert entry["peak_bytes"] > 0
        assert 0 < entry["measured_min_s"] <= entry["measured_s"] <= entry["measured_max_s"]
        assert entry["predicted_s"] > 0
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.usefixtures("eight")
def test_compare_under_a_memory_limit() -> None:
    given = ("--devices", "8", "--batch", "16", "--rounds", "1", *RATES)
    result = _run("compare", LENET, *given, "--memory", "1000")
    assert result.exit_code == 2
    assert "memory_bytes: 1,000 is too little" in result.output


@pytest.mark.usefixtures("user_models")
def test_compare_writes_no_file_when_it_fails() -> None:
    result = _run("compare", "user_models:unfit", "--devices", "1", "--json", "out.json", *RATES)
    assert result.exit_code == 2
    assert not Path("out.json").exists()


# --- profile and cache ----------------------------------------------------------------------------


def test_profile_then_cache_then_plan_elsewhere(
    quick_measurements: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What one machine measured is listed, taken along, and plans on a machine with none of it."""
    done = _run("profile", LENET, "--devices", "4", "--batch", "16")
    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    count = int(re.search(r"([\d,]+) pairs of layer and config are measured", output)[1])
    assert re.search(r"[1-9]\d* programs now", output)
    again = _run("profile", LENET, "--devices", "4", "--batch", "16")
    assert f"{count} pairs" in again.output and " 0 programs now" in " ".join(again.output.split())
    listed = _run("cache", "list").output
    assert "layer" in listed and "1 rates" in listed
    file = tmp_path / "machine.json"
    assert "wrote" in _run("cache", "export", str(file)).output
    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("jaxlwp.devices._rates.measure", None)  # nothing may be measured
    monkeypatch.setattr("jaxlwp.measure._timer.time_together", None)
    plan = _run("plan", LENET, "--devices", "4", "--batch", "16", "--profile", str(file))
    assert plan.exit_code == 0, plan.output
    measured, pairs = re.search(r"measured: (\d+) of (\d+)", " ".join(plan.output.split())).groups()
    assert measured == pairs and int(pairs) >= count
    other = _run("plan", LENET, "--devices", "8", "--batch", "16", "--profile", str(file))
    assert other.exit_code == 2 and "profile as many devices there" in other.output
    assert "added" in _run("cache", "import", str(file)).output
    assert "added 0" in _run("cache", "import", str(file)).output
    wrong = _run("cache", "clear", "--environment", "nonesuch")
    assert wrong.exit_code == 2 and "'nonesuch' is unknown" in wrong.output
    assert "dropped 1 measurements" in _run("cache", "clear", "--kind", "rates").output
    assert _run("cache", "clear").exit_code == 0
    assert "dropped 0" in _run("cache", "clear").output


def test_profile_of_several_machines_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        for kind in ("one", "two"):
            environment = Environment(
                device_kind=kind, platform="gpu", driver="1", jax="1", jaxlib="1"
            )
            store.put(environment, "layer", {"k": Measurement(seconds=1.0)})
        store.export(tmp_path / "both.json")
    done = _run("plan", LENET, "--devices", "4", "--profile", str(tmp_path / "both.json"))
    assert done.exit_code == 2
    assert "measurements of 2 environments" in done.output and "--environment" in done.output


# --- models --------------------------------------------------------------------------------------


def _shapes(work: Workload) -> Any:
    return jax.tree.map(lambda x: (jax.typeof(x).shape, jax.typeof(x).dtype), work.batch[:2])


@pytest.mark.usefixtures("user_models")
@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("user_models:Normed", (16, 2), 16 * 4 * 5 + 5 + 3 * 2 * 4 + 4 + 4 + 4),
        ("user_models:instance", (16, 2), 16 * 6 * 5 + 5 + 3 * 2 * 6 + 6 + 6 + 6),
        ("user_models:Graph", None, 64 * 5 + 5 + 64 + 64),
        ("user_models:Pixels", None, 9 * 5 + 5),
    ],
)
def test_flax_modules(name: str, shape: tuple[int, ...] | None, count: int) -> None:
    sys.path.insert(0, os.getcwd())
    real = load_workload(name, batch=6, input_shape=shape)
    shapes = load_workload(name, batch=6, input_shape=shape, abstract=True)

    assert sum(leaf.size for leaf in jax.tree.leaves(real.params)) == count
    assert real.batch[0].shape == (6, *(shape or (8, 8, 1)))
    assert real.batch[1].shape == ((6, 8, 8) if name.endswith("Pixels") else (6,))
    assert jax.tree.structure(shapes.params) == jax.tree.structure(real.params)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(shapes.params))
    abstract = jax.eval_shape(lambda *arguments: arguments, real.params, *real.batch)
    assert jax.tree.leaves(abstract) == jax.tree.leaves((shapes.params, *shapes.batch))
    loss = real.loss(real.params, *real.batch)
    assert loss.shape == ()
    assert 0.5 < loss < 10  # log 5 is 1.6


@pytest.mark.usefixtures("user_models")
@pytest.mark.parametrize(
    ("name", "batch", "size"), [("triple", None, 16), ("triple", 4, 4), ("fixed", None, 16)]
)
def test_functions(name: str, batch: int | None, size: int) -> None:
    sys.path.insert(0, os.getcwd())
    work = load_workload(f"user_models:{name}", batch=batch)
    assert work.batch[0].shape == (size, 6)
    assert work.loss(work.params, *work.batch).shape == ()


@pytest.mark.usefixtures("user_models")
@pytest.mark.parametrize(
    ("name", "shape"),
    [("user_models:Normed", (16, 2)), ("user_models:Graph", None), ("user_models:Wordless", None)],
)
def test_modules_that_are_only_evaluated(name: str, shape: tuple[int, ...] | None) -> None:
    sys.path.insert(0, os.getcwd())
    work = load_workload(name, batch=6, input_shape=shape, train=False)
    out = work.loss(work.params, *work.batch)
    assert out.shape[0] == 6
    options = ["--input", "x".join(map(str, shape))] if shape else []
    done = _run("plan", name, "--devices", "h100:2", "--batch", "6", "--forward", *options)
    assert done.exit_code == 0, done.output
    assert "momentum" not in done.output


@pytest.mark.usefixtures("user_models")
def test_plan_of_a_users_model() -> None:
    options = ["--devices", "2", "--batch", "4", *RATES] if len(jax.devices()) > 1 else RATES
    linen = _run("plan", "user_models:Normed", "--input", "16x2", *options)
    graph = _run("plan", "user_models:Graph", *options)
    function = _run("plan", "user_models:triple", *options)
    for result in (linen, graph, function):
        assert result.exit_code == 0, result.output
        assert "compute" in result.stdout


# --- errors: tests/bad_input has them -----------------------------------------------------------


def test_help_and_version() -> None:
    assert "compare" in _run("--help").stdout
    assert "--memory-bandwidth" in _run("plan", "--help").stdout
    assert "jaxlwp" in _run("--version").stdout
