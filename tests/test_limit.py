"""Search under a memory limit against trying every strategy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.plan._planning import MEMORY_MARGIN
from jaxlwp.solver._limit import LayerBytes, MemoryLimitError, solve_limited
from tests.benchmarks.solvers import chain, inception, sharding
from tests.contracts.harness import drawn

RATES = jaxlwp.Rates(
    flops_per_s=5e14, memory_bytes_per_s=4e12, latency_s=(1e-5,), link_bytes_per_s=(2e11,)
)


def instance(seed: int) -> tuple[list, list[tuple[int, int]], list, list, list]:
    """A random small problem, of few distinct numbers so that there are ties."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 6))
    sizes = rng.integers(1, 5, layers)
    nodes = [rng.integers(0, 8, n).astype(float) for n in sizes]
    edges = [p for p in itertools.combinations(range(layers), 2) if rng.random() < 0.6]
    tables = [rng.integers(0, 8, (sizes[i], sizes[j])).astype(float) for i, j in edges]
    for table in tables:
        table[rng.random(table.shape) < 0.1] = math.inf
        table.flat[0] = 1.0
    memory = [LayerBytes(*(rng.integers(0, 12, n).astype(float) for _ in range(4))) for n in sizes]
    copied = [rng.integers(0, 6, table.shape).astype(float) for table in tables]
    return nodes, edges, tables, memory, copied


def peak(memory: list[LayerBytes], edges: list, copied: list, choices: tuple[int, ...]) -> float:
    held, kept, gradient, temporary = (
        [getattr(m, name)[c] for m, c in zip(memory, choices, strict=True)]
        for name in ("held", "kept", "gradient", "temporary")
    )
    between = sum(c[choices[i], choices[j]] for (i, j), c in zip(edges, copied, strict=True))
    return sum(held) + max(sum(kept) + between + max(temporary), sum(gradient))


def every(
    nodes: list, edges: list, tables: list, memory: list, copied: list
) -> list[tuple[float, float]]:
    """Cost and bytes of every allowed strategy."""
    result = []
    for choices in itertools.product(*(range(len(n)) for n in nodes)):
        cost = sum(n[c] for n, c in zip(nodes, choices, strict=True))
        cost += sum(t[choices[i], choices[j]] for (i, j), t in zip(edges, tables, strict=True))
        if cost < math.inf:
            result.append((cost, peak(memory, edges, copied, choices)))
    return result


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_as_trying_every_strategy(seed: int, share: float) -> None:
    nodes, edges, tables, memory, copied = instance(seed)
    known = every(nodes, edges, tables, memory, copied)
    if not known:
        return
    sizes = sorted(b for _, b in known)
    limit = sizes[int(share * (len(sizes) - 1))] - (share == 0)
    fitting = [c for c, b in known if b <= limit]
    if not fitting:
        with pytest.raises(MemoryLimitError, match="no strategy fits") as error:
            solve_limited(nodes, edges, tables, memory, limit, copied=copied)
        assert error.value.least_bytes == error.value.lower_bound_bytes == sizes[0]
        return
    found = solve_limited(nodes, edges, tables, memory, limit, copied=copied)
    assert found.optimal
    assert found.cost_s == pytest.approx(min(fitting), abs=1e-9)
    assert found.peak_bytes == peak(memory, edges, copied, found.choices) <= limit


@pytest.mark.parametrize("block", drawn(range(8), 0.25))
def test_the_least_bytes_are_named(block: int) -> None:
    """By the error of a limit below them, whatever makes them least; one strategy fits at them."""
    for seed in range(100 * block, 100 * block + 100):
        nodes, edges, tables, memory, copied = instance(seed)
        known = every(nodes, edges, tables, memory, copied)
        if not known:
            with pytest.raises(ValueError, match="allowed"):
                solve_limited(nodes, edges, tables, memory, 5.0, copied=copied)
            continue
        least = min(b for _, b in known)
        found = solve_limited(nodes, edges, tables, memory, least, copied=copied)
        assert found.optimal and found.peak_bytes == least
        assert found.cost_s == min(c for c, b in known if b == least)
        with pytest.raises(MemoryLimitError, match=f"takes least needs {least:.0f} bytes; no") as e:
            solve_limited(nodes, edges, tables, memory, least - 0.5, copied=copied)
        assert e.value.least_bytes == e.value.lower_bound_bytes == least
        assert peak(memory, edges, copied, e.value.choices) == least


def network(graph: tuple[int, list[tuple[int, int]]]) -> tuple[list, list, list, list[LayerBytes]]:
    """Costs like those of sharding, and bytes of which every moment may be the worst."""
    nodes, edges, tables = sharding(graph, 20, 3)
    rng = np.random.default_rng(5)
    memory = []
    for costs in nodes:
        whole = 10 ** rng.uniform(6, 9, 4)
        parts = 2.0 ** rng.integers(0, 4, (4, costs.size))
        memory.append(LayerBytes(*(w / p for w, p in zip(whole, parts, strict=True))))
    return nodes, edges, tables, memory


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(chain(12), id="chain"),
        pytest.param(chain(21), id="long chain", marks=pytest.mark.slow),
        pytest.param(inception(30), id="inception", marks=pytest.mark.slow),
    ],
)
def test_networks(graph: tuple[int, list[tuple[int, int]]]) -> None:
    """The less memory, the slower, never over the limit, down to the least."""
    problem = network(graph)
    free = solve_limited(*problem, 1e15)
    with pytest.raises(MemoryLimitError, match="takes least needs .* no strategy fits") as error:
        solve_limited(*problem, 1.0)
    least = error.value.least_bytes
    assert least == error.value.lower_bound_bytes
    costs = [free.cost_s]
    for limit in (0.9 * free.peak_bytes, 0.7 * free.peak_bytes, 0.5 * free.peak_bytes, least):
        found = solve_limited(*problem, limit, work_limit=2e10)
        assert found.optimal
        assert found.peak_bytes <= limit
        assert found.cost_s >= costs[-1] - 1e-12
        costs.append(found.cost_s)
    assert found.peak_bytes == least
    with pytest.raises(MemoryLimitError, match="no strategy fits") as error:
        solve_limited(*problem, least * (1 - 1e-6))
    assert error.value.least_bytes == least


@pytest.mark.parametrize(
    ("works", "twice"),
    [
        ((0, 1e9, 4e9), {1e9}),
        pytest.param((0, 1e9, 2e9, 4e9), {0, 1e9, 2e9, 4e9}, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_is_ended_says_what_it_knows(
    works: tuple[float, ...], twice: set[float]
) -> None:
    """Bounds are bounds, more work knows more, and the same work gives the same on any day."""
    problem = network(inception(30))
    best = solve_limited(*problem, 1.6e9)
    assert best.optimal
    gaps = []
    for work in works:
        found = solve_limited(*problem, 1.6e9, work_limit=work)
        if work in twice:
            assert found == solve_limited(*problem, 1.6e9, work_limit=work)
        assert found.lower_bound_s <= best.cost_s * (1 + 1e-9) <= found.cost_s * (1 + 2e-9)
        gaps.append(found.gap)
    assert gaps[0] > 0 == gaps[-1]
    with pytest.raises(MemoryLimitError) as error:
        solve_limited(*problem, 1.12e9)
    least = error.value.least_bytes
    assert least > 1.12e9
    with pytest.raises(MemoryLimitError) as error:
        solve_limited(*problem, 1.12e9, work_limit=0)
    known = error.value
    assert known.lower_bound_bytes < least < known.least_bytes
    assert (
        f"of those found needs {known.least_bytes:,.0f} bytes, and none takes less than "
        f"{known.lower_bound_bytes:,.0f}; use more" in str(known)
    )


@pytest.mark.parametrize("optimizer", [None, optax.adam(1e-3)], ids=["sgd", "adam"])
def test_plans_fit(mesh222: Mesh, optimizer: Any) -> None:
    """Plans of LeNet-5 under ever lower limits, down to one that nothing fits into."""
    work = load_workload("models.lenet:LeNet5", batch=256, abstract=True)

    def plan(memory_bytes: float | None, strategy: str = "search") -> jaxlwp.Plan:
        return jaxlwp.parallelize(
            work.loss,
            work.params,
            *work.batch,
            mesh=mesh222,
            rates=RATES,
            strategy=strategy,
            optimizer=optimizer,
            memory_bytes=memory_bytes,
        )

    def peak_of(plan: jaxlwp.Plan) -> int:
        return jaxlwp.plan.plan_memory(plan, optimizer or optax.sgd(0.1, momentum=0.9)).peak_bytes

    free = plan(None)
    costs = [free.cost.total_s]
    for share in (1.2, 0.8, 0.5):
        limit = share * peak_of(free)
        found = plan(limit)
        assert MEMORY_MARGIN * peak_of(found) <= limit
        assert found.result is not None and found.result.optimal
        costs.append(found.cost.total_s)
    assert costs[0] == pytest.approx(costs[1])
    assert costs == sorted(costs) and costs[3] > costs[1]
    with pytest.raises(jaxlwp.MemoryLimitError, match="conv1|too little"):
        plan(0.01 * peak_of(free))
    data = plan(None, "data")
    with pytest.raises(jaxlwp.MemoryLimitError, match="strategy 'data' needs about"):
        plan(0.9 * peak_of(data), "data")


def test_errors() -> None:
    one = LayerBytes([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="1 entries for 2 layers"):
        solve_limited([[1.0], [1.0]], [], [], [one], 10)
    with pytest.raises(ValueError, match=r"memory\[0\].kept must be 1 finite"):
        solve_limited([[1.0]], [], [], [LayerBytes([1.0], [math.nan], [1.0], [1.0])], 10)
    with pytest.raises(ValueError, match="1 entries for 0 edges"):
        solve_limited([[1.0]], [], [], [one], 10, copied=[[[1.0]]])
    with pytest.raises(ValueError, match=r"copied\[0\] must be finite numbers"):
        solve_limited([[1.0]] * 2, [(0, 1)], [[[1.0]]], [one, one], 10, copied=[[[-1.0]]])
    with pytest.raises(MemoryLimitError, match="needs 3 bytes; no strategy fits"):
        solve_limited([[1.0]], [], [], [one], 2.9)


def test_curve_of_time_and_memory(mesh222: Mesh) -> None:
    """Every point is the fastest under its limit, from the fastest of all to the smallest."""
    work = load_workload("models.lenet:LeNet5", batch=256, abstract=True)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh222, rates=RATES))
    points = jaxlwp.pareto(space, points=6).points
    assert points[0].seconds == pytest.approx(jaxlwp.search(space).cost.total_s)
    assert len(points) > 2
    for before, point in itertools.pairwise(points):
        assert point.estimated_bytes < before.estimated_bytes
        assert point.seconds > before.seconds
    for point in points:
        assert point.estimated_bytes <= point.limit_bytes and point.result.optimal
        again = jaxlwp.search(space, memory_bytes=point.limit_bytes)
        assert again.cost.total_s == pytest.approx(point.seconds)
        assert point.memory.peak_bytes == pytest.approx(point.estimated_bytes, rel=0.2)
    least = jaxlwp.search(space, objective="memory")
    assert points[-1].estimated_bytes == pytest.approx(least.value)
    with pytest.raises(jaxlwp.MemoryLimitError):
        jaxlwp.search(space, memory_bytes=0.99 * least.value)
    with pytest.raises(ValueError, match="points is 1: give at least 2"):
        jaxlwp.pareto(space, points=1)
