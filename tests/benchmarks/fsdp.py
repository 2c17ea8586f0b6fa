"""Fully sharded data parallelism by plain JAX, compiled for eight H200s that are not there.

Run with the extra gpu-aot: `JAX_PLATFORMS=cpu .venv-gpu-aot/bin/python -m tests.benchmarks.fsdp`.
The rows stand beside those of `make bench-gpu` (results/gpu.json), with the same networks, batches,
optimizer and forecast; docs/comparison.md has both. Written to results/fsdp.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.check import forecast
from jaxlwp.check._target import target_mesh
from jaxlwp.plan import OPTIMIZER, program_memory
from tests.benchmarks.gpu import NETWORKS, Row

RESULTS = Path(__file__).parent / "results" / "fsdp.json"
TARGET = "h200:8"
LEAST_SIZE = 2**14
"""Smaller parameters stay whole on every device, as is usual."""


def fully_sharded(leaf: Any, mesh: Mesh) -> NamedSharding:
    """An array split over all devices along its largest dimension that they divide."""
    dims = [d for d, size in enumerate(leaf.shape) if size % mesh.size == 0]
    if leaf.size < LEAST_SIZE or not dims:
        return NamedSharding(mesh, PartitionSpec())
    largest = max(dims, key=lambda d: leaf.shape[d])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, mesh.axis_names))


def lowered(row: Row, mesh: Mesh) -> Any:
    """The training step: state fully sharded, batch by sample, the rest left to the partitioner."""
    work = row.workload()

    def step(state: Any, batch: Any) -> Any:
        params, slots = state

        def loss(params: Any) -> Any:
            out = work.loss(params, *batch)
            return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())

        value, gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, slots = OPTIMIZER.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    state = jax.eval_shape(lambda params: (params, OPTIMIZER.init(params)), work.params)
    stored = jax.tree.map(lambda leaf: fully_sharded(leaf, mesh), state)

    def by_sample(leaf: Any) -> NamedSharding:
        whole = not leaf.shape or leaf.shape[0] != row.batch
        return NamedSharding(mesh, PartitionSpec() if whole else PartitionSpec(mesh.axis_names))

    fed = jax.tree.map(by_sample, work.batch)
    jitted = jax.jit(
        step, donate_argnums=0, in_shardings=(stored, fed), out_shardings=(stored, None)
    )
    return jitted.lower(state, work.batch)


def main() -> None:
    """Compile, forecast and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["AlexNet", "VGG-16", "ResNet-50"])
    arguments = parser.parse_args()
    mesh = target_mesh(TARGET)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for network in arguments.networks:
        row = Row(network, "bfloat16", NETWORKS[network].batch * mesh.size, TARGET)
        program = lowered(row, mesh).compile()
        found = forecast(program, row.system)
        content[row.key] = {
            "forecast_s": found.total_s,
            "exposed_s": found.exposed_s,
            "collective_bytes": {kind: t.num_bytes for kind, t in found.collectives.items()},
            "memory": dataclasses.asdict(program_memory(program, "gpu")),
            "jax": jax.__version__,
        }
        print(row.key, json.dumps(content[row.key]), flush=True)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
