"""Objectives: what they measure, by independent means, and that their minimum is one."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.memory._memory import memory_costs
from jaxlwp.solver import _marginals
from jaxlwp.solver._minmax import Rows, minimize_max
from jaxlwp.space._exchange import wire_share

RATES = jaxlwp.Rates(
    flops_per_s=5e12, memory_bytes_per_s=5e11, latency_s=(1e-5,), link_bytes_per_s=(2e10,)
)


def space_of(name: str, devices: int, batch: int) -> jaxlwp.cost.SearchSpace:
    workload = load_workload(name, batch=batch, abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    mesh = jaxlwp.make_mesh(jax.devices()[:devices])
    return jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=RATES))


@pytest.fixture(scope="module")
def alexnet() -> jaxlwp.cost.SearchSpace:
    return space_of("models.alexnet:AlexNet", 4, 64)


def random_choices(space: jaxlwp.cost.SearchSpace, count: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng()
    return [tuple(int(draw.integers(len(c))) for c in space.configs) for _ in range(count)]


# The largest of several sums ---------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Rows:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers, count, terms = (draw(st.integers(1, n)) for n in (5, 4, 3))
    sizes = [draw(st.integers(1, 4)) for _ in range(layers)]
    pairs = list(itertools.combinations(range(layers), 2))
    edges = tuple(draw(st.lists(st.sampled_from(pairs), max_size=6))) if pairs else ()

    def costs(*shape: int) -> np.ndarray:
        array = (
            rng.integers(0, 10, shape).astype(float) if rng.random() < 0.5 else rng.random(shape)
        )
        array[rng.random(shape) < 0.1] = math.inf if rng.random() < 0.3 else 0.0
        return array

    return Rows(
        terms=tuple(tuple(costs(size) for size in sizes) for _ in range(terms)),
        weights=tuple(
            rng.random((count, layers)) * rng.integers(0, 2, (count, 1)) for _ in range(terms)
        ),
        edges=edges,
        tables=tuple(costs(sizes[i], sizes[j]) for i, j in edges),
        scale=rng.integers(0, 3, count).astype(float),
    )


def by_hand(rows: Rows, choices: tuple[int, ...]) -> float:
    """The largest sum, term by term."""
    sums = []
    for k in range(len(rows.scale)):
        total = 0.0
        parts = [
            (float(rows.scale[k]), t[choices[i], choices[j]])
            for (i, j), t in zip(rows.edges, rows.tables, strict=True)
        ]
        for term, weights in zip(rows.terms, rows.weights, strict=True):
            parts += [(float(weights[k, n]), array[choices[n]]) for n, array in enumerate(term)]
        for weight, cost in parts:
            total += weight * cost if math.isfinite(cost) else math.inf
        sums.append(total)
    return max(sums)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_equals_trying_all(rows: Rows) -> None:
    every = itertools.product(*(range(array.size) for array in rows.terms[0]))
    best = min(by_hand(rows, choices) for choices in every)
    if best == math.inf:
        with pytest.raises(ValueError, match="no strategy is allowed"):
            minimize_max(rows)
        return
    found = minimize_max(rows)
    assert found.optimal and found.gap == 0
    assert math.isclose(found.cost_s, best, rel_tol=1e-7, abs_tol=1e-12)
    assert math.isclose(by_hand(rows, found.choices), best, rel_tol=1e-7, abs_tol=1e-12)


# What objectives measure -------------------------------------------------------------------------


def overlapped_s(space: jaxlwp.cost.SearchSpace, choices: tuple[int, ...]) -> float:
    """The step, event by event: computing goes on while one link does one synchronisation."""
    tables = space.tables
    moved = sum(
        float(t[choices[i], choices[j]])
        for (i, j), t in zip(tables.edges, tables.transfer_s, strict=True)
    )
    chosen = list(enumerate(choices))
    now = moved + sum(
        float(tables.exchange_s[n][c] + tables.overhead_s[n][c] + tables.compute_s[n][c] / 3)
        for n, c in chosen
    )
    link_free = 0.0
    for n, c in reversed(chosen):
        now += float(tables.compute_s[n][c]) * 2 / 3
        if tables.sync_s[n][c]:
            link_free = max(link_free, now) + float(tables.sync_s[n][c])
    return max(now, link_free)


def test_overlap_is_the_step_event_by_event(alexnet: jaxlwp.cost.SearchSpace) -> None:
    rows = jaxlwp.optimize.Overlap().rows(alexnet)
    for choices in random_choices(alexnet, 50):
        plain_s = alexnet.tables.evaluate(choices).total_s
        value_s = float(rows.sums(choices).max())
        assert math.isclose(value_s, overlapped_s(alexnet, choices), rel_tol=1e-9)
        assert value_s <= plain_s * (1 + 1e-9)


def test_bytes_are_those_of_the_collectives(alexnet: jaxlwp.cost.SearchSpace) -> None:
    """Whatever else takes time on the devices: waits, and new memory however little it is."""
    slow = dataclasses.replace(alexnet.devices, wait_s=1e9, first_touch_byte_s=((0.0, 1e3),))
    rows = jaxlwp.optimize.MovedBytes().rows(dataclasses.replace(alexnet, devices=slow))
    sizes = alexnet.devices.axis_sizes
    for choices in random_choices(alexnet, 20):
        configs = [known[c] for known, c in zip(alexnet.configs, choices, strict=True)]
        sent = sum(
            c.num_bytes * wire_share(c.kind, math.prod(sizes[a] for a in c.axes))
            for c in jaxlwp.cost.strategy_collectives(alexnet.graph, configs, sizes)
        )
        assert math.isclose(float(rows.sums(choices).max()), sent, rel_tol=1e-6)


def test_memory_is_the_estimate_of_the_layers_bytes(alexnet: jaxlwp.cost.SearchSpace) -> None:
    rows = jaxlwp.optimize.PeakMemory(optimizer_slots=2).rows(alexnet)
    costs = memory_costs(alexnet.graph, alexnet.configs, alexnet.devices.axis_sizes, 2)
    for choices in random_choices(alexnet, 20):
        assert math.isclose(float(rows.sums(choices).max()), costs.estimate(choices))


# Search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sum", "overlap", "bytes", "memory"])
def test_the_minimum_is_below_other_strategies(
    alexnet: jaxlwp.cost.SearchSpace, objective: str
) -> None:
    result = jaxlwp.search(alexnet, objective=objective)
    rows = result.objective.rows(alexnet)
    assert math.isclose(float(rows.sums(result.solution.choices).max()), result.solution.cost_s)
    assert result.solution.lower_bound_s <= result.solution.cost_s
    assert result.optimal or result.gap < 0.01
    strategies = ("sum", "overlap", "bytes", "memory")
    found = [jaxlwp.search(alexnet, objective=name).solution.choices for name in strategies]
    around = [list(result.solution.choices) for _ in range(200)]
    draw = np.random.default_rng()
    for choices in around:
        for layer in draw.integers(0, len(choices), 2):
            choices[layer] = int(draw.integers(len(alexnet.configs[layer])))
    baselines = [alexnet.choices(alexnet.baseline(name)) for name in jaxlwp.BASELINES]
    for choices in (*found, *map(tuple, around), *baselines):
        assert float(rows.sums(choices).max()) >= result.solution.lower_bound_s * (1 - 1e-9)


def test_overlap_hides_gradient_synchronisation(alexnet: jaxlwp.cost.SearchSpace) -> None:
    plain = jaxlwp.search(alexnet)
    hidden = jaxlwp.search(alexnet, objective="overlap")
    assert hidden.value <= plain.value
    assert hidden.objective.unit == "s" and plain.value == pytest.approx(plain.cost.total_s)


def test_refused(alexnet: jaxlwp.cost.SearchSpace) -> None:
    with pytest.raises(ValueError, match="'speed' is unknown; give one of sum, overlap"):
        jaxlwp.search(alexnet, objective="speed")
    with pytest.raises(ValueError, match='a memory limit goes with "sum"'):
        jaxlwp.search(alexnet, objective="bytes", memory_bytes=1e9)
    with pytest.raises(ValueError, match='objectives of several sums are by "elimination"'):
        jaxlwp.search(alexnet, objective="overlap", method="exhaustive")


def test_without_marginals(
    alexnet: jaxlwp.cost.SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On dense graphs tables of marginals would exceed memory: the same optima without them."""
    limit = 0.97 * jaxlwp.search(alexnet, objective="memory").value * 1.1
    expected = [
        jaxlwp.search(alexnet, objective="overlap").value,
        jaxlwp.search(alexnet, memory_bytes=limit).value,
        jaxlwp.search(jaxlwp.optimize.price_around(alexnet.graph, alexnet.devices)).value,
    ]
    monkeypatch.setattr(_marginals, "_ENTRIES_LIMIT", 1)
    with pytest.raises(_marginals.DenseGraphError, match="too dense"):
        jaxlwp.explain(alexnet)
    actual = [
        jaxlwp.search(alexnet, objective="overlap").value,
        jaxlwp.search(alexnet, memory_bytes=limit).value,
        jaxlwp.search(jaxlwp.optimize.price_around(alexnet.graph, alexnet.devices)).value,
    ]
    assert actual == pytest.approx(expected, rel=0.01)
