"""How long tracing, pricing and search take on the paper's networks: `make bench-search`.

Prints the table beside the paper's Table 3 (4 devices), then the large networks on 8 devices of one
link level and of two (2 hosts), and writes results/search.json, where `solvers` adds the solver's
peers. Every row starts with empty caches.
LeNet-5 is also searched exhaustively, and both must agree. With --profile, prints where the time
goes instead.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jaxlwp
from jaxlwp import _changes, _cost, _layout, _search
from jaxlwp._devices import axis_shape
from jaxlwp._model import load_workload

NETWORKS = {
    "LeNet-5": "models.lenet:LeNet5",
    "AlexNet": "models.alexnet:AlexNet",
    "VGG-16": "models.vgg:VGG16",
    "Inception-v3": "models.inception:InceptionV3",
    "DenseNet-121": "models.densenet:DenseNet121",
}
PAPER_S = {"LeNet-5": 0.01, "AlexNet": 0.02, "VGG-16": 0.1}
"""Search time in Table 3, on 4 devices."""

ROWS = (
    *((name, (4,)) for name in NETWORKS),
    *((name, devices) for name in ("Inception-v3", "DenseNet-121") for devices in ((8,), (2, 4))),
)
"""Networks, and devices per link level."""

CACHES = (
    _changes.changes,
    _changes._plan,
    _cost.layout_collectives,
    _layout.plan_options,
)
PHASES: tuple[tuple[Any, str, str], ...] = (
    (_search, "layer_configs", "enumerate configs"),
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


def devices_of(levels: tuple[int, ...]) -> jaxlwp.DeviceGraph:
    """P100-like devices: NVLink inside a host, a link four times slower between hosts."""
    rates = (2e10,) if len(levels) == 1 else (5e9, 2e10)
    axes = tuple(
        jaxlwp.MeshAxis(name=name, size=size, level=level, latency_s=1e-5, bytes_per_s=rates[level])
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


def exhaustive(space: jaxlwp.SearchSpace, found: jaxlwp.SearchResult) -> dict[str, float]:
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
    for name, levels in ROWS[len(NETWORKS) :]:
        spent.clear()
        show(row(name, levels))
        for _, _, label in PHASES:
            print(f"    {spent[label]:6.2f} s {label}")


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    if parser.parse_args().profile:
        profile()
        return
    rows = []
    for name, levels in ROWS:
        rows.append(row(name, levels))
        show(rows[-1])
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # of benchmarks.solvers
    content = kept | {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
