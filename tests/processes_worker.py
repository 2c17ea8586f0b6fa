"""One of several processes: `python -m tests.processes_worker CHECKS COORDINATOR COUNT RANK`.

It runs the checks that are named, joined by commas, and prints what came of them as JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

SHAPES = (8, 8, 8, 3), (8, 16)
"""Of the batch."""
STEPS = 3


def network() -> tuple[Any, tuple[Any, ...]]:
    """Parameters and batch of a small network; the same in every process."""
    generator = np.random.default_rng(7)

    def random(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32) * 0.1

    params = {"kernel": random(3, 3, 3, 16), "dense": random(8 * 8 * 16, 16)}
    return params, tuple(rows(shape, 0) for shape in SHAPES)


def rows(shape: tuple[int, ...], step: int, box: tuple[slice, ...] | None = None) -> Any:
    """A part of an array of a step's batch, made without the rest: its values are of its places."""
    box = box or tuple(slice(0, size) for size in shape)
    places = np.ogrid[box]
    return np.sin(step + sum(k * (n + 1.3) for n, k in enumerate(places))).astype(np.float32)


def loss(params: Any, x: Any, y: Any, stride: int = 1) -> Any:
    """Mean squared error."""
    x = lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x)[:, ::stride].reshape(x.shape[0], -1)
    return jnp.mean((x @ params["dense"][: x.shape[1]] - y) ** 2)


def train(fn: Callable[..., Any], params: Any, batches: Any) -> list[float]:
    """Losses of some steps."""

    @jax.jit
    def step(params: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(fn)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    losses = []
    for batch in batches:
        params, value = step(params, *batch)
        losses.append(float(value))
    return losses


def planned(**options: Any) -> Any:
    """A plan of the network by rates."""
    import jaxlwp

    params, batch = jax.eval_shape(lambda: network())
    rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
    options = {"fn": loss, "params": params, "batch": batch, "rates": rates} | options
    fn, params, batch = (options.pop(name) for name in ("fn", "params", "batch"))
    return jaxlwp.parallelize(fn, params, *batch, **options)


def refused(call: Callable[[], Any]) -> str:
    """The error of a call; "" if there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def held(array: jax.Array) -> float:
    """Share of an array that the devices of this process hold."""
    parts = {str(shard.index): shard.data.size for shard in array.addressable_shards}
    return sum(parts.values()) / array.size


# --- checks --------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """A plan, with everything measured, and one step."""
    import jaxlwp
    from jaxlwp.devices import _calibrate

    _calibrate.LINK_BYTES = (1 << 10, 1 << 20)  # every kind of measurement, but quickly
    _calibrate.FIRST_TOUCH_BYTES = 1 << 20, 1 << 20
    params, batch = network()
    plan = jaxlwp.parallelize(loss, params, *batch, check="measure")
    value, grads = jax.jit(jax.value_and_grad(plan))(plan.place(params), *plan.place_batch(*batch))
    norm = jax.jit(lambda grads: sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))(grads)
    return {
        "strategy": plan.strategy.to_json(),
        "cost_s": plan.cost.total_s,
        "checked": plan.checked,
        "num_measured": plan.space.num_measured,
        "rates": plan.space.devices.to_json(),
        "loss": float(value),
        "norm": float(norm) ** 0.5,
    }


def feeding() -> dict[str, Any]:
    """Every process feeds its own rows and columns: split by sample and by height."""
    devices, count = np.array(jax.devices(), dtype=object), jax.process_count()
    each = len(devices) // count
    orders = {
        "in order": devices,
        "reversed": devices[::-1],
        "interleaved": devices.reshape(count, each).T.reshape(-1),
    }
    if each == 1:
        del orders["interleaved"]  # the same as in order
    results: dict[str, Any] = {}
    for strategy in ("data", "spatial"):
        for order, ordered in orders.items():
            plan = planned(strategy=strategy, mesh=Mesh(ordered, ("d",)))
            boxes = plan.local_batch
            batches = [
                plan.place_batch(
                    *(rows(s, step, box) for s, box in zip(SHAPES, boxes, strict=True))
                )
                for step in range(STEPS)
            ]
            params, whole = network()
            losses = train(plan, plan.place(params), batches)
            whole_value = plan(plan.place(params), *plan.place_batch(*whole))
            results[f"{strategy}, {order}"] = {
                "losses": losses,
                "first loss of whole arrays": float(whole_value),
                "box": [[part.start, part.stop] for part in boxes[0]],
                "held": [held(array) for array in batches[0]],
            }
    return results


def sharded() -> dict[str, Any]:
    """Parameters and optimizer state are made in parts."""
    import optax

    plan, tx = planned(strategy="model"), optax.adam(1e-3)

    def init(key: Any) -> Any:
        shapes = plan.param_shardings
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        sizes = {name: shape.shape for name, shape in plan.argument_shapes[0].items()}
        params = {name: jax.random.normal(keys[name], sizes[name]) for name in shapes}
        return {"params": params, "slots": tx.init(params), "step": jnp.zeros((), int)}

    shapes = jax.eval_shape(init, jax.random.key(0))
    state = jax.jit(init, out_shardings=plan.state_shardings(shapes))(jax.random.key(0))
    placed = plan.place(state)
    alone = init(jax.random.key(0))  # the same numbers, whole
    same = jax.tree.map(
        lambda a, b: all(
            np.allclose(np.asarray(b)[shard.index], shard.data, rtol=1e-6, atol=0)
            for shard in a.addressable_shards
        ),
        placed,
        alone,
    )
    mine = alone["params"]
    mine["dense"] = mine["dense"] + (jax.process_index() == 1)
    return {
        "held": {name: held(array) for name, array in placed["params"].items()},
        "slots": {name: held(array) for name, array in placed["slots"][0].mu.items()},
        "same numbers": all(jax.tree.leaves(same)),
        "spec": {n: str(array.sharding.spec) for n, array in placed["params"].items()},
        "error": refused(lambda: plan.place({"params": mine})),
        "whole": held(plan.place(alone["slots"])[0].nu["dense"]),
    }


def differing() -> dict[str, Any]:
    """What processes are given differs: all of them say what."""
    import jaxlwp
    from jaxlwp import devices

    odd = jax.process_index() == 1

    def given(**options: Any) -> Callable[[], Any]:
        return lambda: planned(**(options if odd else {}))

    def profile() -> Any:
        mesh = jaxlwp.make_mesh(jax.devices())
        rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
        return jaxlwp.measure.Profile(
            environment=devices.environment_of(jax.local_devices()),
            rates={devices.rates_key(mesh): jaxlwp.device_graph(mesh, rates=rates)},
            layers={"some layer": devices.Measurement(seconds=0.5 if odd else 0.25)},
        )

    _, batch = network()
    stride = 2 if odd else 1
    version = importlib.metadata.version
    results = {
        "batch": refused(given(batch=tuple(array[:4] for array in batch))),
        "function": refused(lambda: planned(fn=lambda p, x, y: loss(p, x, y, stride))),
        "rates": refused(given(rates=jaxlwp.Rates(flops_per_s=2e10, memory_bytes_per_s=1e9))),
        "profile": refused(lambda: planned(rates=profile())),
        "option": refused(given(constraints=jaxlwp.Constraints(forbid=("height",)))),
        "check": refused(given(check="measure")),
        "mesh": refused(given(mesh=Mesh(np.array(jax.devices()).reshape(2, -1), ("a", "b")))),
        "failure": refused(given(fn=lambda p, x, y: x)),
    }
    importlib.metadata.version = lambda name: "0.0.1" if odd and name == "jaxlib" else version(name)
    results["versions"] = refused(planned)
    importlib.metadata.version = version
    results["none"] = refused(planned)
    return results


def strategies() -> dict[str, Any]:
    """Searches that end differently are told, too."""
    from jaxlwp.plan import _planning

    kept = _planning.bind
    if jax.process_index() == 1:
        _planning.bind = lambda space, strategy, *rest: kept(space, space.baseline("model"), *rest)
    message = refused(lambda: planned(strategy="data"))
    _planning.bind = kept
    return {"message": message}


def traced() -> dict[str, Any]:
    """A plan is made while a step is traced."""
    params, batch = network()

    @jax.jit
    def step(params: Any, *batch: Any) -> Any:
        return planned(strategy="data")(params, *batch)

    plan = planned(strategy="data")
    value = step(plan.place(params), *plan.place_batch(*batch))
    return {"loss": float(value)}


def files() -> dict[str, Any]:
    """Process 0 alone writes; in a folder that only it has."""
    folder = Path(os.environ["JAXLWP_CACHE_DIR"])
    planned(strategy="data").strategy.save(folder / "saved.json")
    return {"written": (folder / "saved.json").exists()}


def command() -> dict[str, Any]:
    """The command line uses the devices of all processes; the first one prints and writes."""
    from jaxlwp.cli import main as jaxlwp_command

    saved = Path(os.environ["JAXLWP_CACHE_DIR"]) / "plan.json"
    options = "--distributed plan models.lenet:LeNet5 --batch 16 --rates v100 --save".split()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        jaxlwp_command([*options, str(saved)], standalone_mode=False)
    return {"printed": printed.getvalue(), "written": saved.exists()}


def compared() -> dict[str, Any]:
    """Strategies run side by side; the batch has arrays on a device and a random key."""
    import jaxlwp

    def noisy(params: Any, x: Any, y: Any, key: Any) -> Any:
        return loss(params, x + jax.random.normal(key, x.shape), y)

    params, batch = jax.tree.map(jnp.asarray, network())
    rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
    found = jaxlwp.compare(
        noisy, params, *batch, jax.random.key(3), rates=rates, strategies=("data",), rounds=1
    )
    return {result.strategy: result.compiled_bytes for result in found.results}


def shapes() -> dict[str, Any]:
    """A wrong shape is told beside both that would do."""
    plan = planned(strategy="data")
    return {"message": refused(lambda: plan.place_batch(np.zeros((3, 8, 8, 3), np.float32)))}


CHECKS = {
    check.__name__: check
    for check in (
        measured,
        feeding,
        sharded,
        differing,
        strategies,
        traced,
        files,
        command,
        compared,
        shapes,
    )
}


def main() -> None:
    """Run the checks."""
    checks, coordinator, count, rank = sys.argv[1:]
    jax.distributed.initialize(coordinator, num_processes=int(count), process_id=int(rank))
    print(json.dumps({name: CHECKS[name]() for name in checks.split(",")}))


if __name__ == "__main__":
    main()
