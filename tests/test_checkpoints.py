"""Checkpoints: restored under other plans on fewer devices, and after kills while saving."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxlwp
from tests.test_readme import blocks

ROOT = Path(__file__).parent.parent
RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)

# --- the example, killed and started again -------------------------------------------------------

STEPS = 6
QUICK = "rates=jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)"
KILL = """
import os, re, runpy, signal, sys
event, place = sys.argv[1:3]
def kill(what, arguments):
    if what == event and re.search(place, os.fspath(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
runpy.run_path("train.py", run_name="__main__")
"""


def write_example(folder: Path) -> None:
    """The example, small: saving every step, with rates in place of measurements."""
    text = (ROOT / "examples" / "train.py").read_text()
    for old, new in (
        ("STEPS, EVERY = 64, 400, 50", f"STEPS, EVERY = 64, {STEPS}, 1"),
        ("optimizer=tx)", f"optimizer=tx, {QUICK})\nprint(plan.mesh.size)"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "train.py").write_text(text)


def run_example(folder: Path, devices: int, event: str, place: str) -> tuple[int, str]:
    """Run it on so many devices, killed when `event` is to happen to a path like `place`."""
    quick = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    quick["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", KILL, event, place]
    done = subprocess.run(
        command, env=os.environ | quick, cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    assert done.stdout.split()[0] == str(devices)
    return done.returncode, done.stdout


def unbroken(folder: Path) -> dict[int, list[float]]:
    """What the example prints by step where nothing happens, on the devices of this process."""
    write_example(folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(
            compile(Path("train.py").read_text(), "train.py", "exec", dont_inherit=True),
            {"__name__": "example"},
        )
    found = numbers(printed.getvalue())
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def numbers(text: str) -> dict[int, list[float]]:
    """By step: the training loss, and accuracy and loss of the test set."""
    lines = re.findall(r"step (\d+): (loss .*)", text)
    return {int(n): [float(x) for x in re.findall(r"\d+\.\d+", line)] for n, line in lines}


def complete(folder: Path) -> list[int]:
    """Steps of which a whole checkpoint is there."""
    return sorted(
        int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
    )


def half_written(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").iterdir() if not path.name.isdigit()]


def check_same(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    for step, values in found.items():
        assert len(values) == 3
        np.testing.assert_allclose(values, expected[step], rtol=1e-4, err_msg=f"step {step}")


def test_example_goes_on_after_kills_on_fewer_devices(tmp_path: Path) -> None:
    expected, folder = unbroken(tmp_path / "unbroken"), tmp_path / "killed"
    write_example(folder)
    # All of step 3 is written, and about to be given its name.
    code, text = run_example(folder, 8, "os.rename", r"checkpoints/3\.orbax-checkpoint-tmp")
    assert code == -signal.SIGKILL
    assert complete(folder) == [1, 2] and half_written(folder)
    check_same(numbers(text), expected)
    # Of step 5 there is a folder, and nothing in it.
    code, text = run_example(folder, 4, "os.mkdir", r"checkpoints/5\.orbax-checkpoint-tmp[^/]*/")
    assert code == -signal.SIGKILL
    assert complete(folder)[-2:] == [3, 4] and half_written(folder)
    assert min(numbers(text)) == 3
    check_same(numbers(text), expected)
    code, text = run_example(folder, 2, "never", "")
    assert code == 0
    assert complete(folder) == [STEPS - 1, STEPS] and not half_written(folder)
    assert sorted(numbers(text)) == [5, 6]
    check_same(numbers(text), expected)


# --- what a state is restored into ---------------------------------------------------------------


class Net(nn.Module):
    """Small, and under strategy "model" with split kernels and biases."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(16)(x.reshape(x.shape[0], -1))


class State(TrainState):
    """A training state with a random key."""

    key: jax.Array


MODEL, TX = Net(), optax.adam(1e-3)
IMAGES, LABELS = jnp.ones((16, 8, 8, 1)), jnp.arange(16)


def init(key: Any) -> State:
    own, dropout = jax.random.split(key)
    params = MODEL.init(own, IMAGES)["params"]
    return State.create(apply_fn=MODEL.apply, params=params, tx=TX, key=dropout)


def loss_fn(params: Any, images: Any, labels: Any) -> Any:
    logits = MODEL.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


SHAPES = jax.eval_shape(init, jax.random.key(0))


def make_plan(**kwargs: Any) -> jaxlwp.Plan:
    return jaxlwp.parallelize(loss_fn, SHAPES.params, IMAGES, LABELS, rates=RATES, **kwargs)


SAVED, SAVED_NNX = blocks("python", "docs/checkpoints.md")


def run_page(block: str, **names: Any) -> dict[str, Any]:
    """Run lines of the page, with rates and a strategy in place of measurements and a search."""
    block = block.replace("devices=4", "devices=4, rates=RATES, strategy='data'")
    exec(compile(block, "checkpoints.md", "exec", dont_inherit=True), names)
    return names


def check_restored(restored: Any, plan: jaxlwp.Plan, state: Any) -> None:
    """It is the state, bit by bit, where the plan wants it."""
    placed = plan.place(state)
    assert jax.tree.structure(restored) == jax.tree.structure(placed)
    for have, want in zip(*map(jax.tree.leaves, (restored, placed)), strict=True):
        assert have.sharding == want.sharding and have.dtype == want.dtype
        if jnp.issubdtype(have.dtype, jax.dtypes.prng_key):
            have, want = jax.random.key_data(have), jax.random.key_data(want)
        np.testing.assert_array_equal(have, want)


def test_restored_under_other_plans(tmp_path: Path) -> None:
    first = make_plan(strategy="model", devices=8)
    state = first.place(init(jax.random.key(0)).replace(step=jnp.int32(7)))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
    names = {"jaxlwp": jaxlwp, "RATES": RATES, "loss_fn": loss_fn, "batch": (IMAGES, LABELS)}
    names = run_page(SAVED, folder=tmp_path, step=7, state=state, shapes=SHAPES, **names)
    check_restored(names["restored"], names["fewer"], state)
    assert names["fewer"].mesh.size == 4
    for strategy, devices in (("spatial", 2), ("model", 1)):
        plan = make_plan(strategy=strategy, devices=devices)
        wanted = plan.abstract_state(SHAPES)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(wanted))
        restored = names["checkpoints"].restore(7, args=ocp.args.StandardRestore(wanted))
        check_restored(restored, plan, state)
    names["checkpoints"].close()


def test_abstract_state_of_arrays_and_of_nnx(tmp_path: Path) -> None:
    def create() -> tuple[Any, Any]:
        model = nnx.Sequential(
            nnx.Linear(12, 16, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2))
        )
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    def loss(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    shapes, x = nnx.eval_shape(create), jnp.ones((8, 12))
    plans = [
        jaxlwp.parallelize(loss, shapes[0], x, rates=RATES, devices=count, strategy="model")
        for count in (8, 2)
    ]
    made = plans[0].place(create())
    own, given = (jax.tree.leaves(plans[0].abstract_state(s)) for s in (made, shapes))
    assert [(leaf.shape, leaf.sharding) for leaf in own] == [(s.shape, s.sharding) for s in given]
    made[0](x)  # draws: the count is part of what is saved
    names = {"nnx": nnx, "ocp": ocp, "create": create, "pair": made, "fewer": plans[1]}
    names = run_page(SAVED_NNX, folder=tmp_path, **names)
    model, optimizer = names["model"], names["optimizer"]
    for kernel in (model.layers[0].kernel, optimizer.opt_state[0].mu["layers"][0]["kernel"]):
        assert kernel[...].sharding.shard_shape((12, 16)) == (12, 8)
    np.testing.assert_allclose(plans[1](model, x), loss(made[0], x), rtol=1e-5)


def test_what_cannot_be_restored_into_is_said_in_one_line() -> None:
    plan = make_plan(devices=2)
    for method in (plan.abstract_state, plan.state_shardings, plan.place):
        with pytest.raises(TypeError, match=r"state\['a'\]\['name'\] is a str.*pass arrays") as e:
            method({"a": {"name": "run 7"}, "step": 3})
        assert "\n" not in str(e.value)
    absent = make_plan(devices="dgx-h100:1")
    with pytest.raises(ValueError, match=r"abstract_state: .*") as absent_error:
        absent.abstract_state(SHAPES)
    assert "\n" not in str(absent_error.value)
