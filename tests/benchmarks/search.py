"""How long tracing, pricing and search take on real networks: `make bench-search`.

Prints the table beside the paper's Table 3 (4 devices), then the large networks on 8 devices of one
link level and of two (2 hosts), then deep ones on up to 4096 devices in up to three link levels,
and writes results/search.json, where `solvers` adds the solver's peers. Every row starts with empty
caches, and every row of many devices in a process of its own, for its memory.
LeNet-5 is also searched exhaustively, and both must agree. With --profile, prints where the time
goes instead.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost import _changes, _collectives
from jaxlwp.cost import _model as _cost
from jaxlwp.cost import _search_space as _space
from jaxlwp.devices._device_graph import axis_shape
from jaxlwp.optimize._wide import is_large
from jaxlwp.space import _moves
from models.unet3d import UNet3D

NETWORKS = {
    "LeNet-5": "models.lenet:LeNet5",
    "AlexNet": "models.alexnet:AlexNet",
    "VGG-16": "models.vgg:VGG16",
    "Inception-v3": "models.inception:InceptionV3",
    "DenseNet-121": "models.densenet:DenseNet121",
    "ResNet-101": "models.resnet:ResNet101",
    "3-D U-Net": "tests.benchmarks.search:volumes",
}
SCALED = ("Inception-v3", "ResNet-101", "DenseNet-121", "3-D U-Net")
LEVELS = ((8,), (8, 8), (64, 8), (8, 64, 8))
"""Devices per link level, slowest first: pods, hosts, devices."""

GROWN = "AlexNet"
GROWTH_LEVELS = ((2,), (4,), (8,), (16,), (32,), (8, 8), (16, 8), (32, 8), (64, 8), (2, 64, 8))
GROWTH_LEVELS += ((4, 64, 8), (8, 64, 8))
"""The network and the devices of which growth with the number of devices is told."""

PAPER_S = {"LeNet-5": 0.01, "AlexNet": 0.02, "VGG-16": 0.1}
"""Search time in Table 3, on 4 devices."""

ROWS = (
    *((name, (4,)) for name in tuple(NETWORKS)[:5]),
    *((name, devices) for name in ("Inception-v3", "DenseNet-121") for devices in ((8,), (2, 4))),
)
"""Networks, and devices per link level."""

CACHES = (
    _changes.changes,
    _changes._plan,
    _collectives.layout_collectives,
    _moves.plan_options,
)
PHASES: tuple[tuple[Any, str, str], ...] = (
    (_space, "layer_configs", "enumerate configs"),
    (_cost.AnalyticCostModel, "layer", "layers"),
    (_cost.AnalyticCostModel, "_operator_s", "  work of operators"),
    (_cost.AnalyticCostModel, "_member_s", "  halo exchanges and partial sums"),
    (_cost.AnalyticCostModel, "_own_use_s", "  arguments, changes of layout inside"),
    (_cost.AnalyticCostModel, "transfer_s", "edges"),
    (_cost, "changes", "all changes of layout"),
    (_changes, "_plan", "  plan their moves"),
    (_changes, "_spread", "  exchanges of every pair"),
    (_changes.Changes, "seconds", "seconds of changes for one tensor"),
    (_cost, "CostTables", "check tables"),
)
"""Where a function is looked up, its name there, what it does; the phases overlap."""

RESULTS = Path(__file__).parent / "results" / "search.json"
REPEATS = 15


def volumes(batch: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """A 3-D U-Net that labels the voxels of large volumes."""
    model = UNet3D()
    x = jax.ShapeDtypeStruct((batch, 128, 128, 112, 1), jnp.float32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    variables = dict(jax.eval_shape(model.init, key, x))
    params = variables.pop("params")
    labels = jax.ShapeDtypeStruct((batch, 128, 128, 112), jnp.int32)

    def loss(params: Any, stats: Any, x: Any, labels: Any) -> Any:
        logits, changed = model.apply(
            {"params": params} | stats, x, train=True, mutable=list(stats)
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean(), changed

    return loss, params, (variables, x, labels)


def devices_of(levels: tuple[int, ...]) -> jaxlwp.DeviceGraph:
    """P100-like devices: NVLink inside a host, slower links between hosts, and between pods."""
    rates = (2.5e9, 5e9, 2e10)[3 - len(levels) :]
    axes = tuple(
        jaxlwp.devices.MeshAxis(
            name=name, size=size, level=level, latency_s=1e-5, bytes_per_s=rates[level]
        )
        for name, size, level in axis_shape(levels)
    )
    return jaxlwp.DeviceGraph(
        axes=axes, conv_flops_per_s=5e12, dense_flops_per_s=5e12, memory_bytes_per_s=5e11
    )


def row(name: str, levels: tuple[int, ...]) -> dict[str, Any]:
    """Times of one network on so many devices per link level."""
    devices = devices_of(levels)
    workload = load_workload(NETWORKS[name], batch=32 * devices.num_devices, abstract=True)
    for cache in CACHES:
        cache.cache_clear()
    start = time.perf_counter()
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    traced = time.perf_counter()
    space = jaxlwp.price(graph, devices)
    priced = time.perf_counter()
    results = [jaxlwp.search(space) for _ in range(REPEATS)]
    return {
        "network": name,
        "devices": levels,
        "layers": len(graph.layers),
        "edges": len(graph.edges),
        "configs": sum(map(len, space.configs)),
        "log10_strategies": sum(math.log10(len(configs)) for configs in space.configs),
        "trace_s": traced - start,
        "price_s": priced - traced,
        "search_s": statistics.median(r.solution.wall_s for r in results),
        "paper_search_s": PAPER_S.get(name) if levels == (4,) else None,
        "exhaustive": exhaustive(space, results[0]) if name == "LeNet-5" else None,
    }


def scaled_row(name: str, levels: tuple[int, ...]) -> dict[str, Any]:
    """Times, memory and proof for one network on many devices, in this process."""
    devices = devices_of(levels)
    # Volumes are few: what they do not share out by sample has to be split in space.
    batch = max(1, devices.num_devices // 8) if name == "3-D U-Net" else 32 * devices.num_devices
    workload = load_workload(NETWORKS[name], batch=batch, abstract=True)
    start = time.perf_counter()
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    traced = time.perf_counter()
    whole = not is_large(graph, devices)
    space = jaxlwp.price(graph, devices) if whole else jaxlwp.optimize.price_around(graph, devices)
    result = jaxlwp.search(space)
    found = time.perf_counter()
    return {
        "network": name,
        "devices": levels,
        "batch": batch,
        "layers": len(graph.layers),
        "edges": len(graph.edges),
        "whole_space": whole,
        "configs": sum(map(len, space.configs)),
        "trace_s": traced - start,
        "tables_and_search_s": found - traced,
        "last_search_s": result.solution.wall_s,
        "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "optimal": result.optimal,
        "gap": result.gap,
        "cost_s": result.cost.total_s,
        "data_parallel_s": space.evaluate(space.baseline("data")).total_s
        if name != "3-D U-Net"
        else None,
    }


def growth() -> dict[str, Any]:
    """Seconds of tables and search for 2 to 4096 devices, and the exponent of the upper half."""
    made = [in_own_process(GROWN, levels) for levels in GROWTH_LEVELS]
    sizes = [math.prod(levels) for levels in GROWTH_LEVELS]
    times = [r["tables_and_search_s"] for r in made]
    half = len(sizes) // 2
    exponent = statistics.linear_regression(
        [math.log(n) for n in sizes[half:]], [math.log(t) for t in times[half:]]
    ).slope
    line = ", ".join(f"{n}: {t:.2f}" for n, t in zip(sizes, times, strict=True))
    print(f"{GROWN}, devices: exponent {exponent:.2f}; s at {line}", flush=True)
    return {
        "growth": f"{GROWN}, devices",
        "levels": GROWTH_LEVELS,
        "sizes": sizes,
        "wall_s": times,
        "gap": [r["gap"] for r in made],
        "exponent": exponent,
    }


def in_own_process(name: str, levels: tuple[int, ...]) -> dict[str, Any]:
    """`scaled_row`, in a process of its own: its caches are empty and its memory its own."""
    command = [sys.executable, "-m", "tests.benchmarks.search", "--scaled", name]
    command.append("x".join(map(str, levels)))
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def show_scaled(r: dict[str, Any]) -> None:
    """One line of the second table."""
    proof = "optimal" if r["optimal"] else f"gap {r['gap']:.1%}"
    data = f", data parallel {r['data_parallel_s'] * 1e3:,.0f}" if r["data_parallel_s"] else ""
    levels = " x ".join(map(str, r["devices"]))
    looked = "" if r["whole_space"] else " looked at"
    print(
        f"{r['network']:12} {levels:10} devices {r['layers']:3} layers {r['configs']:6,} configs"
        f"{looked}: trace {r['trace_s']:.1f} s, tables and search {r['tables_and_search_s']:.1f} s "
        f"(the last search {r['last_search_s'] * 1e3:.0f} ms), process {r['process_mb']:.0f} MB; "
        f"step {r['cost_s'] * 1e3:,.0f} ms, {proof}{data}",
        flush=True,
    )


def exhaustive(
    space: jaxlwp.cost.SearchSpace, found: jaxlwp.optimize.SearchResult
) -> dict[str, float]:
    """Time of exhaustive search, which must find the same cost."""
    tables = space.tables
    every = jaxlwp.solve(
        tables.node_costs_s,
        tables.edges,
        tables.transfer_s,
        method="exhaustive",
        enumerate_limit=10**11,
    )
    assert math.isclose(every.cost_s, found.solution.cost_s, rel_tol=1e-12)
    return {"wall_s": every.wall_s, "cost_s": every.cost_s}


def show(r: dict[str, Any]) -> None:
    """One line of the table."""
    paper = f" (paper {r['paper_search_s'] * 1e3:.0f} ms)" if r["paper_search_s"] else ""
    every = f", exhaustive {r['exhaustive']['wall_s']:.1f} s" if r["exhaustive"] else ""
    print(
        f"{r['network']:12} {' x '.join(map(str, r['devices'])):5} devices {r['layers']:3} layers "
        f"{r['edges']:3} edges 10^{r['log10_strategies']:<3.0f} strategies: "
        f"trace {r['trace_s']:.2f} s, price {r['price_s']:.2f} s, "
        f"search {r['search_s'] * 1e3:.2f} ms{paper}{every}",
        flush=True,
    )


def timed(function: Callable[..., Any], label: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The function, its seconds added to `spent`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - start

    return wrapper


def profile() -> None:
    """Print the rows of the large networks, and the seconds of each phase of pricing."""
    spent: dict[str, float] = collections.defaultdict(float)
    for place, name, label in PHASES:
        setattr(place, name, timed(getattr(place, name), label, spent))
    for name, levels in ROWS[5:]:
        spent.clear()
        show(row(name, levels))
        for _, _, label in PHASES:
            print(f"    {spent[label]:6.2f} s {label}")


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--scaled", nargs=2, help="one row of many devices, as JSON")
    options = parser.parse_args()
    if options.profile:
        profile()
        return
    if options.scaled:
        name, levels = options.scaled
        print(json.dumps(scaled_row(name, tuple(map(int, levels.split("x"))))))
        return
    rows = []
    for name, levels in ROWS:
        rows.append(row(name, levels))
        show(rows[-1])
    scaled = []
    for name, levels in itertools.product(SCALED, LEVELS):
        scaled.append(in_own_process(name, levels))
        show_scaled(scaled[-1])
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # of benchmarks.solvers
    content = kept | {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "rows": rows,
        "scaled": scaled,
        "growth_with_devices": growth(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
