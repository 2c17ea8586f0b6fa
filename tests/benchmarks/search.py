"""Search time on the paper's networks with 4 devices, tables built: `make bench-search`.

Prints the table beside the paper's Table 3 and writes results/search.json. LeNet-5 is also searched
exhaustively, and both must agree.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax

import jaxlwp
from jaxlwp._model import load_workload

NETWORKS = {
    "LeNet-5": ("models.lenet:LeNet5", 0.01),
    "AlexNet": ("models.alexnet:AlexNet", 0.02),
    "VGG-16": ("models.vgg:VGG16", 0.1),
}
RATES = jaxlwp.Rates(
    flops_per_s=5e12, memory_bytes_per_s=5e11, latency_s=(1e-5,), link_bytes_per_s=(2e10,)
)
RESULTS = Path(__file__).parent / "results" / "search.json"
REPEATS = 15


def row(name: str) -> dict[str, Any]:
    """Times of one network."""
    path, paper_s = NETWORKS[name]
    workload = load_workload(path, batch=128, abstract=True)
    start = time.perf_counter()
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    traced = time.perf_counter()
    mesh = jaxlwp.make_mesh(jax.devices()[:4])
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=RATES))
    priced = time.perf_counter()
    results = [jaxlwp.search(space) for _ in range(REPEATS)]
    exhaustive = None
    if name == "LeNet-5":
        tables = space.tables
        start_all = time.perf_counter()
        every = jaxlwp.solve(
            tables.node_costs_s,
            tables.edges,
            tables.transfer_s,
            method="exhaustive",
            enumerate_limit=10**11,
        )
        exhaustive = {"wall_s": time.perf_counter() - start_all, "cost_s": every.cost_s}
        assert math.isclose(every.cost_s, results[0].solution.cost_s, rel_tol=1e-12)
    return {
        "network": name,
        "layers": len(graph.layers),
        "strategies": float(math.prod(len(c) for c in space.configs)),
        "trace_s": traced - start,
        "price_s": priced - traced,
        "search_s": statistics.median(r.solution.wall_s for r in results),
        "paper_search_s": paper_s,
        "exhaustive": exhaustive,
    }


def main() -> None:
    """Print the table and write the results."""
    rows = [row(name) for name in NETWORKS]
    for r in rows:
        print(
            f"{r['network']:8} {r['layers']:3} layers {r['strategies']:8.2e} strategies: "
            f"trace {r['trace_s']:.2f} s, price {r['price_s']:.2f} s, search "
            f"{r['search_s'] * 1e3:.2f} ms (paper {r['paper_search_s'] * 1e3:.0f} ms), "
            f"exhaustive {r['exhaustive'] or 'not run'}"
        )
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
