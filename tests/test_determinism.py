"""The same input gives the same strategies: whatever the hash seed and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax
import jaxlwp
from jaxlwp.devices._device_graph import DeviceGraph, axis_shape
from jaxlwp.cli._workload import load_workload


def devices(*levels):
    axes = tuple(
        jaxlwp.devices.MeshAxis(name=n, size=s, level=l, latency_s=1e-5, bytes_per_s=(5e9, 2e10)[l])
        for n, s, l in axis_shape(levels)
    )
    return DeviceGraph(
        axes=axes, conv_flops_per_s=5e12, dense_flops_per_s=5e12, memory_bytes_per_s=5e11
    )


work = load_workload("models.alexnet:AlexNet", batch=64, abstract=True)
graph = jaxlwp.trace(work.loss, work.params, *work.batch)
space = jaxlwp.price(graph, devices(2, 4))
found = jaxlwp.search(space)
peak = float(jaxlwp.optimize.PeakMemory().rows(space).sums(found.solution.choices).max())
large = jaxlwp.optimize.price_around(graph, devices(8, 8))
for result in (
    found,
    jaxlwp.search(space, objective="overlap"),
    jaxlwp.search(space, memory_bytes=0.97 * peak),
    jaxlwp.search(large),
):
    print(result.strategy.to_json(), result.value, result.gap)
print(list(jaxlwp.program.program_lines(graph.program)))  # what processes compare
again = jaxlwp.trace(jax.checkpoint(work.loss), work.params, *work.batch)
print(list(jaxlwp.program.program_lines(again.program)))
for ranked in jaxlwp.optimize.runners_up(space, 5):
    print(ranked.strategy.to_json())
"""


def answer(hash_seed: str, threads: str) -> str:
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_results_do_not_depend_on_hash_seeds_and_threads() -> None:
    first = answer("0", "1")
    assert first.count("fingerprint") == 9
    assert answer("4242", "2") == first
