"""What one session on a GPU machine is for: `make gpu-check`, unattended, in under 8 minutes.

On whatever devices are there, one after the other, each part with its share of the time:

1. correctness: plans of small networks against the plain function, loss and gradients;
2. rates of devices and links;
3. accuracy: single-device training steps, predicted from measured layers and measured, float32 and
   bfloat16;
4. a shard: one process of an 8-GPU step whose peers are mocked: its time without communication
   against the predicted work, if this JAX can do it;
5. layer times of the local shapes of AlexNet, VGG-16, ResNet-50 and Inception-v3 on 8 devices:
   those of the strategy found and the baselines first, then all others, until the time is up.

Leaves one JSON file, written anew after every part, and the profile (`jaxlwp cache export`) beside
it. Parts that fail are in the file with their error.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlwp
from jaxlwp.check._compare import step_times
from jaxlwp.cli._workload import load_workload
from jaxlwp.devices._device_graph import axis_shape
from jaxlwp.devices._store import Store, environment_of
from jaxlwp.measure._timer import LayerTimer, TimingCache
from jaxlwp.optimize._measured import measured_space

MODELS = {
    "AlexNet": "models.alexnet:AlexNet",
    "VGG-16": "models.vgg:VGG16",
    "ResNet-50": "models.resnet:ResNet50",
    "Inception-v3": "models.inception:InceptionV3",
}
SMALL = {"LeNet-5": "models.lenet:LeNet5", "ResNet-18": "models.resnet:ResNet18"}
BASELINES = ("data", "model", "owt", "spatial")
PLANNED = 8
"""Devices that layer times are measured for; they need not exist."""


def cast(workload: Any, dtype: Any) -> Any:
    """The workload's loss on parameters and images of another dtype."""

    def to(tree: Any) -> Any:
        def leaf(x: Any) -> Any:
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, dtype) if floating else x
            return x.astype(dtype) if floating else x

        return jax.tree.map(leaf, tree)

    return workload.loss, to(workload.params), tuple(to(each) for each in workload.batch)


def correctness() -> list[dict[str, Any]]:
    """Loss and gradients of plans on the devices at hand against the plain function."""
    rows = []
    for name, module in SMALL.items():
        shape = (32, 32, 3) if name == "ResNet-18" else None
        work = load_workload(module, batch=16, input_shape=shape)
        plain = jax.jit(jax.value_and_grad(work.loss))(work.params, *work.batch)
        for strategy in ("search", *(BASELINES if len(jax.devices()) > 1 else ())):
            rates = jaxlwp.Rates(flops_per_s=1e13, memory_bytes_per_s=1e12)
            plan = jaxlwp.parallelize(
                work.loss, work.params, *work.batch, strategy=strategy, rates=rates
            )
            params, batch = plan.place(work.params), plan.place_batch(*work.batch)
            ours = jax.jit(jax.value_and_grad(plan))(params, *batch)
            worst = max(
                float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-6))
                for a, b in zip(
                    map(np.asarray, jax.tree.leaves(ours)),
                    map(np.asarray, jax.tree.leaves(plain)),
                    strict=True,
                )
            )
            rows.append({"model": name, "strategy": strategy, "worst_relative": worst})
    return rows


def rates() -> dict[str, Any]:
    """Rates of the devices at hand, measured now."""
    return jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()), again=True).to_json()


def accuracy(
    batch: int, shape: tuple[int, ...] | None, until: float, write: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """Single-device steps: the sum of measured layers and the rest, against the measured step."""
    rows: list[dict[str, Any]] = []
    device = jax.devices()[:1]
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, module in MODELS.items():
            if time.monotonic() > until:
                return rows
            work = load_workload(module, batch=batch, input_shape=shape)
            loss, params, data = cast(work, dtype)
            plan = jaxlwp.parallelize(loss, params, *data, devices=device)
            times_s = step_times(plan, ((params, *data), {}), None, 15)
            rows.append(
                {
                    "model": name,
                    "dtype": jnp.dtype(dtype).name,
                    "batch": batch,
                    "predicted_s": plan.cost.total_s,
                    "compute_s": plan.cost.compute_s,
                    "overhead_s": plan.cost.overhead_s,
                    "measured_s": float(np.median(times_s)),
                    "times_s": times_s,
                }
            )
            write(rows)
    return rows


def shard(batch: int, shape: tuple[int, ...] | None) -> list[dict[str, Any]]:
    """One process of an 8-GPU step whose peers are mocked, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--shard", "--batch", str(batch)]
    if shape:
        command += ["--input", "x".join(map(str, shape))]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    rows: list[dict[str, Any]] = json.loads(out.stdout.splitlines()[-1])
    return rows


def run_shard(batch: int, shape: tuple[int, ...] | None) -> list[dict[str, Any]]:
    """Inside that process: data parallel AlexNet on 8 mocked processes with one GPU each."""
    jax.config.update("jax_mock_num_gpu_processes", PLANNED)
    assert len(jax.devices()) == PLANNED
    work = load_workload(MODELS["AlexNet"], batch=batch * PLANNED, input_shape=shape, abstract=True)
    rates = planned_rates()
    rows = []
    for strategy in ("data", "owt"):
        plan = jaxlwp.parallelize(
            work.loss, work.params, *work.batch, strategy=strategy, rates=rates
        )
        arguments = (work.params, *work.batch)

        def make(leaf: Any, sharding: Any) -> Any:
            def block(index: Any) -> Any:
                sizes = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
                return np.zeros(sizes, leaf.dtype)

            return jax.make_array_from_callback(leaf.shape, sharding, block)

        keys = [isinstance(x.dtype, np.dtype) for x in jax.tree.leaves(arguments)]
        if not all(keys):
            raise RuntimeError("random keys cannot be placed on mocked devices")
        placed = jax.tree.map(make, arguments, plan.shardings)
        step = jax.jit(jax.value_and_grad(plan)).lower(*placed).compile()
        times = []
        for _ in range(15):
            start = time.perf_counter()
            jax.block_until_ready(step(*placed))
            times.append(time.perf_counter() - start)
        rows.append({"strategy": strategy, "measured_s": float(np.median(times[1:]))})
    return rows


def planned_rates() -> jaxlwp.DeviceGraph:
    """8 devices like the one at hand, with NVLink as on an HGX board (450 GB/s each way)."""
    axes = tuple(
        jaxlwp.devices.MeshAxis(name=n, size=s, level=level, latency_s=1.5e-5, bytes_per_s=3.6e11)
        for n, s, level in axis_shape((PLANNED,))
    )
    return jaxlwp.DeviceGraph(
        axes=axes, conv_flops_per_s=3e13, dense_flops_per_s=4e13, memory_bytes_per_s=3e12
    )


def layers(
    batch: int, shape: tuple[int, ...] | None, until: float, write: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """Layer times for 8 devices, on one: found and baselines first, then the rest."""
    rows: list[dict[str, Any]] = []
    devices = planned_rates()
    local = jax.devices()[:1]
    here = jaxlwp.device_graph(jaxlwp.make_mesh(local))
    queue = []
    for name, module in MODELS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            work = load_workload(module, batch=batch * PLANNED, input_shape=shape, abstract=True)
            loss, params, data = cast(work, dtype)
            graph = jaxlwp.trace(loss, params, *data)
            space = jaxlwp.price(graph, devices)
            strategies = [jaxlwp.search(space).strategy, *map(space.baseline, BASELINES)]
            first = [p for s in strategies for p in space.pairs(s) if not p[0].fused]
            rest = [
                (layer, config)
                for layer, configs in zip(graph.layers, space.configs, strict=True)
                for config in configs
                if not layer.fused
            ]
            queue.append((name, jnp.dtype(dtype).name, graph, space, first, rest))
    with Store() as store:
        cache = TimingCache(store, environment_of(local))
        for stage in (4, 5):
            for name, dtype, graph, space, *pairs in queue:
                rated = jaxlwp.DeviceGraph.from_json(
                    {**here.to_json(), "axes": devices.to_json()["axes"], "links": ()}
                )
                timer = LayerTimer(graph, rated, local, cache)
                todo = pairs[stage - 4]
                for start in range(0, len(todo), 8):
                    if time.monotonic() > until:
                        break
                    timer.measure(todo[start : start + 8])
                known = [timer.known_s(*pair) is not None for pair in todo]
                space = measured_space(space, timer)
                rows.append(
                    {
                        "model": name,
                        "dtype": dtype,
                        "pairs": "found and baselines" if stage == 4 else "all",
                        "measured": sum(known),
                        "of": len(known),
                        "data_compute_s": space.evaluate(space.baseline("data")).compute_s,
                    }
                )
                write(rows)
        if store.path.exists():
            store.export(PROFILE, environment_of(local))
    return rows


RESULTS = Path(__file__).parent / "results" / "gpu-check.json"
PROFILE = RESULTS.with_name("gpu-profile.json")


def main() -> None:
    """Run every part and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5, help="when to stop")
    parser.add_argument("--batch", type=int, default=32, help="examples for each device")
    parser.add_argument("--input", help="shape of one example, as in 64x64x3; the model's own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = tuple(map(int, options.input.split("x"))) if options.input else None
    if options.shard:
        print(json.dumps(run_shard(options.batch, shape)))
        return
    end = time.monotonic() + 60 * options.minutes
    content: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "machine": f"{os.uname().machine}, {os.cpu_count()} cores",
        "versions": {n: importlib.metadata.version(n) for n in ("jaxlwp", "jax", "jaxlib", "flax")},
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }

    def write(name: str, rows: Any) -> None:
        content[name] = rows
        options.out.write_text(json.dumps(content, indent=1) + "\n")

    parts: dict[str, Callable[[], Any]] = {
        "correctness": correctness,
        "rates": rates,
        "accuracy": lambda: accuracy(
            options.batch, shape, end - 36 * options.minutes, lambda r: write("accuracy", r)
        ),
        "shard": lambda: shard(options.batch, shape),
        "layers": lambda: layers(options.batch, shape, end - 20, lambda r: write("layers", r)),
    }
    for name, part in parts.items():
        start = time.monotonic()
        try:
            write(name, part())
        except Exception:
            write(name, {"error": traceback.format_exc()[-2000:]})
        print(f"{name}: {time.monotonic() - start:.0f} s", json.dumps(content[name])[:2000])


if __name__ == "__main__":
    main()
