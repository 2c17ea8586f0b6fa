"""The solver against its peers on the same instances, as numbers: part of `make bench-search`.

Every family is solved by `jaxlwp.solve`, by toulbar2 (default options) and, where it is told to, by
HiGHS (the integer program of the local polytope), in this process, one thread each. Costs are
uniform random, or shaped like those of sharding: configs are degrees of two in four dimensions, a
layer's work is divided by them, its parameters are synchronised over those that do not split the
channel, windows exchange halos, and an edge moves what its reader needs and does not hold.

Prints the table and writes it into results/search.json, beside what the networks' part put there:
one row per instance and solver, then how the time grows with layers and configs. `wall_s` is
solving alone, the least of a few runs, `build_s` making the peer's model from the arrays. Also run
on its own: `python -m tests.benchmarks.solvers [--families NAME ...]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlwp import solve
from jaxlwp.solver import Solution

RESULTS = Path(__file__).parent / "results" / "search.json"

Edges = list[tuple[int, int]]
Instance = tuple[list[np.ndarray], Edges, list[np.ndarray]]


# Graphs: the number of layers, and the edges ----------------------------------------------------


def chain(layers: int) -> tuple[int, Edges]:
    return layers, [(n, n + 1) for n in range(layers - 1)]


def inception(layers: int) -> tuple[int, Edges]:
    """Blocks of four branches of 1, 2, 3 and 2 layers that a ninth layer joins; series-parallel."""
    edges: Edges = []
    last, layer = 0, 1
    while layer + 9 <= layers:
        join = layer + 8
        for length in (1, 2, 3, 2):
            path = [last, *range(layer, layer + length), join]
            edges += itertools.pairwise(path)
            layer += length
        last, layer = join, join + 1
    edges += itertools.pairwise([last, *range(layer, layers)])
    return layers, edges


def k_tree(layers: int, width: int) -> tuple[int, Edges]:
    """Each layer reads the `width` layers before it: treewidth `width`."""
    return layers, [(n, m) for m in range(layers) for n in range(max(0, m - width), m)]


def dense(layers: int) -> tuple[int, Edges]:
    return layers, list(itertools.combinations(range(layers), 2))


def dense_blocks(sizes: Sequence[int]) -> tuple[int, Edges]:
    """Dense blocks, each beginning with the layer that the one before ends with."""
    edges: Edges = []
    start = 0
    for size in sizes:
        edges += itertools.combinations(range(start, start + size), 2)
        start += size - 1
    return start + 1, edges


# Costs ------------------------------------------------------------------------------------------


def uniform(graph: tuple[int, Edges], configs: int, seed: int) -> Instance:
    """Costs between 0 and 1."""
    layers, edges = graph
    rng = np.random.default_rng(seed)
    nodes = [rng.random(configs) for _ in range(layers)]
    return nodes, edges, [rng.random((configs, configs)) for _ in edges]


def sharding(graph: tuple[int, Edges], configs: int, seed: int) -> Instance:
    """Costs shaped like those of layers on devices: see the module's docstring."""
    layers, edges = graph
    rng = np.random.default_rng(seed)
    degrees = [log_degrees(configs, rng) for _ in range(layers)]
    devices = max(int(d.sum(axis=1).max()) for d in degrees)
    nodes, tables = [], []
    for split in degrees:
        work, parameters = 10 ** rng.uniform(-3, -1), 10 ** rng.uniform(-4.5, -1.5)
        halo = 10 ** rng.uniform(-5, -3) * (split[:, 1:3] > 0).sum(axis=1)
        replicas = 2.0 ** (devices - split[:, 3])
        sync = 2 * parameters * 2.0 ** -split[:, 3] * (1 - 1 / replicas)
        nodes.append(work / 2.0 ** split.sum(axis=1) + halo + sync)
    for i, j in edges:
        tensor = 10 ** rng.uniform(-3.5, -1.5)
        writer, reader = degrees[i][:, None, :], degrees[j][None, :, :]
        needed = 2.0 ** -reader[..., :3].sum(axis=-1)  # of all channels
        finer = np.maximum(writer, reader)[..., :3].sum(axis=-1)
        tables.append(2 * tensor * (needed - 2.0 ** -(finer + writer[..., 3])))  # and back
    return nodes, edges, tables


def log_degrees(configs: int, rng: np.random.Generator) -> np.ndarray:
    """Shape (configs, 4): exponents of two of the degrees in sample, height, width, channel."""
    total = next(n for n in itertools.count() if math.comb(n + 4, 4) >= configs)
    every = np.array([d for d in itertools.product(range(total + 1), repeat=4) if sum(d) <= total])
    return every[np.sort(rng.permutation(len(every))[:configs])]


# Solvers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a solver said: `cost` of its choices, summed from the arrays."""

    optimal: bool
    cost: float | None
    wall_s: float
    build_s: float = 0.0
    gap: float | None = None


def total(instance: Instance, choices: Sequence[int]) -> float:
    nodes, edges, tables = instance
    own = sum(costs[c] for costs, c in zip(nodes, choices, strict=True))
    moved = (t[choices[i], choices[j]] for (i, j), t in zip(edges, tables, strict=True))
    return float(own + sum(moved))


def jaxlwp(instance: Instance, limit_s: float) -> Outcome:
    found: Solution = solve(*instance, time_limit_s=limit_s)
    cost = total(instance, found.choices)
    return Outcome(optimal=found.optimal, cost=cost, wall_s=found.wall_s, gap=found.gap)


def toulbar2(instance: Instance, limit_s: float) -> Outcome:
    """Default options, costs to eight decimals."""
    import pytoulbar2

    nodes, edges, tables = instance
    start = time.perf_counter()
    model = pytoulbar2.CFN(1e6, resolution=8, verbose=-1)
    for n, costs in enumerate(nodes):
        model.AddVariable(f"x{n}", range(len(costs)))
    for n, costs in enumerate(nodes):
        model.AddFunction([n], costs.tolist())
    for (i, j), table in zip(edges, tables, strict=True):
        model.AddFunction([i, j], table.ravel().tolist())
    built = time.perf_counter()
    result = model.Solve(timeLimit=max(1, math.ceil(limit_s)))
    ended = time.perf_counter()
    return Outcome(
        optimal=bool(result) and ended - built < limit_s,
        cost=total(instance, result[0]) if result else None,
        wall_s=ended - built,
        build_s=built - start,
    )


def highs(instance: Instance, limit_s: float) -> Outcome:
    """Binary x[l, c] and, continuous, y[e, c, d]: the sums of y over c and over d are x."""
    import highspy

    nodes, edges, tables = instance
    start = time.perf_counter()
    first = np.cumsum([0, *(c.size for c in nodes), *(t.size for t in tables)])
    one_config = [(1.0, [*range(first[n], first[n + 1])], []) for n in range(len(nodes))]
    marginals = []
    for e, ((i, j), table) in enumerate(zip(edges, tables, strict=True)):
        at = first[len(nodes) + e] + np.arange(table.size).reshape(table.shape)
        marginals += [(0.0, list(row), [first[i] + c]) for c, row in enumerate(at)]
        marginals += [(0.0, list(row), [first[j] + c]) for c, row in enumerate(at.T)]
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = int(first[-1]), len(one_config) + len(marginals)
    program.col_cost_ = np.concatenate([a.ravel() for a in (*nodes, *tables)])
    program.col_lower_, program.col_upper_ = np.zeros(first[-1]), np.ones(first[-1])
    rows = one_config + marginals
    program.row_lower_ = program.row_upper_ = np.array([r for r, _, _ in rows])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.cumsum([0, *(len(p) + len(m) for _, p, m in rows)])
    program.a_matrix_.index_ = np.concatenate([[*p, *m] for _, p, m in rows])
    program.a_matrix_.value_ = np.concatenate(
        [[1.0] * len(p) + [-1.0] * len(m) for _, p, m in rows]
    )
    chosen = int(first[len(nodes)])
    kinds = [highspy.HighsVarType.kInteger] * chosen
    program.integrality_ = kinds + [highspy.HighsVarType.kContinuous] * (int(first[-1]) - chosen)
    model = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("time_limit", float(limit_s)),
        ("mip_rel_gap", 0.0),
    ):
        model.setOptionValue(option, value)
    model.passModel(program)
    built = time.perf_counter()
    model.run()
    ended = time.perf_counter()
    values = np.array(model.getSolution().col_value)
    found = values.size and model.getInfo().primal_solution_status == 2
    choices = [int(np.argmax(values[first[n] : first[n + 1]])) for n in range(len(nodes))]
    return Outcome(
        optimal=model.getModelStatus() == highspy.HighsModelStatus.kOptimal,
        cost=total(instance, choices) if found else None,
        wall_s=ended - built,
        build_s=built - start,
    )


SOLVERS: dict[str, Callable[[Instance, float], Outcome]] = {
    "jaxlwp": jaxlwp,
    "toulbar2": toulbar2,
    "HiGHS": highs,
}


# The runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    """Instances of one graph.

    Attributes:
        graph: layers and edges.
        configs: per layer.
        treewidth: of the graph.
        highs: the costs for which HiGHS is run, too.
        costs: the costs for which the others are run.
        limit_s: for each solver and instance.
    """

    graph: tuple[int, Edges]
    configs: int
    treewidth: int
    highs: tuple[Callable[..., Instance], ...] = ()
    costs: tuple[Callable[..., Instance], ...] = (uniform, sharding)
    limit_s: float = 80


FAMILIES = {
    "chain 21 x 35": Family(graph=chain(21), configs=35, treewidth=1, highs=(uniform, sharding)),
    "chain 21 x 70": Family(graph=chain(21), configs=70, treewidth=1, highs=(uniform, sharding)),
    "chain 100 x 64": Family(graph=chain(100), configs=64, treewidth=1, highs=(sharding,)),
    "series-parallel 102 x 35": Family(
        graph=inception(102), configs=35, treewidth=2, highs=(uniform, sharding)
    ),
    "series-parallel 102 x 70": Family(
        graph=inception(102), configs=70, treewidth=2, highs=(sharding,)
    ),
    "2-tree 102 x 35": Family(graph=k_tree(102, 2), configs=35, treewidth=2),
    "3-tree 30 x 35": Family(graph=k_tree(30, 3), configs=35, treewidth=3),
    "dense 6 x 35": Family(graph=dense(6), configs=35, treewidth=5, highs=(sharding,)),
    "dense 8 x 35": Family(graph=dense(8), configs=35, treewidth=7, highs=(sharding,)),
    "dense 10 x 35": Family(graph=dense(10), configs=35, treewidth=9, highs=(sharding,)),
    "dense 12 x 35": Family(graph=dense(12), configs=35, treewidth=11, highs=(sharding,)),
    "dense 6-8-10-12 x 35": Family(
        graph=dense_blocks((6, 8, 10, 12)), configs=35, treewidth=11, costs=(sharding,)
    ),
}
SEEDS = (0, 1, 2)


def run(solver: str, instance: Instance, limit_s: float) -> Outcome:
    """The fastest of a few runs; of one, if that takes long."""
    outcome = SOLVERS[solver](instance, limit_s)
    repeats = 0 if outcome.wall_s > 1 else 2 if outcome.wall_s > 0.1 else 6
    again = (SOLVERS[solver](instance, limit_s) for _ in range(repeats))
    return min((outcome, *again), key=lambda o: o.wall_s)


def rows(name: str, family: Family) -> list[dict[str, Any]]:
    """One row per instance and solver."""
    result = []
    for costs in family.costs:
        for seed in SEEDS:
            if any(r["costs"] == costs.__name__ and r["wall_s"] > 30 for r in result):
                continue  # once is enough
            instance = costs(family.graph, family.configs, seed)
            solvers = ["jaxlwp", "toulbar2"]
            if costs in family.highs and seed == 0:
                solvers.append("HiGHS")
            for solver in solvers:
                outcome = run(solver, instance, 300 if solver == "HiGHS" else family.limit_s)
                row = {"family": name, "costs": costs.__name__, "seed": seed, "solver": solver}
                result.append(row | vars(outcome) | {"treewidth": family.treewidth})
                show(result[-1])
            ours, peer = (r["wall_s"] for r in result[-len(solvers) :][:2])
            if family.treewidth > 3 and ours > 2 * peer:  # what is proven after twice its time
                again = SOLVERS["jaxlwp"](instance, 2 * peer)
                row = {"family": name, "costs": costs.__name__, "seed": seed}
                row |= {"solver": "jaxlwp, twice toulbar2's time"}
                result.append(row | vars(again) | {"treewidth": family.treewidth})
                show(result[-1])
    return result


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    cost = "none" if row["cost"] is None else f"{row['cost']:.6f}"
    gap = f", gap {row['gap']:.2%}" if row["gap"] else ""
    print(
        f"{row['family']:25} {row['costs']:8} {row['seed']} {row['solver']:8.30} "
        f"{row['wall_s'] * 1e3:10.2f} ms (model {row['build_s'] * 1e3:7.1f} ms) {cost}"
        f"{'' if row['optimal'] else ' not proven optimal'}{gap}",
        flush=True,
    )


GROWTH = {
    # name -> (graph of so many layers, the layers, the configs)
    "chain, layers": (chain, (10, 30, 100, 300, 1000, 2000), (35,)),
    "chain, configs": (chain, (50,), (16, 32, 64, 128, 256, 512, 1024)),
    "series-parallel, layers": (inception, (11, 29, 101, 299, 1001, 2000), (35,)),
    "series-parallel, configs": (inception, (20,), (16, 32, 64, 128, 256)),
}


def growth() -> list[dict[str, Any]]:
    """Times against layers and configs, and the exponents fitted to the upper half of the sizes."""
    result = []
    for (name, (graph, layers, configs)), costs in itertools.product(
        GROWTH.items(), (uniform, sharding)
    ):
        sizes = layers if len(layers) > 1 else configs
        times = []
        for layer_count, config_count in itertools.product(layers, configs):
            instance = costs(graph(layer_count), config_count, 0)
            times.append(run("jaxlwp", instance, 300).wall_s)
        half = len(sizes) // 2
        exponent = float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])
        row = {"growth": name, "costs": costs.__name__, "sizes": sizes, "wall_s": times}
        result.append(row | {"exponent": exponent})
        line = ", ".join(f"{n}: {t * 1e3:.2f}" for n, t in zip(sizes, times, strict=True))
        print(f"{name:25} {costs.__name__:8} exponent {exponent:.2f}; ms at {line}", flush=True)
    return result


def main() -> None:
    """Print the tables and add them to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), help="default: all")
    parser.add_argument("--no-growth", action="store_true", help="instances only")
    options = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = [r for r in content.get("solvers", []) if r["family"] not in options.families]
    new = [row for name in options.families for row in rows(name, FAMILIES[name])]
    content["solvers"] = sorted(kept + new, key=lambda r: list(FAMILIES).index(r["family"]))
    if not options.no_growth:
        content["growth"] = growth()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
