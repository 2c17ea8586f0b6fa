"""Search over real networks: optimal, decomposed, and the same as exhaustive search."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

import jaxlwp
from jaxlwp.cli._workload import load_workload

RATES = jaxlwp.Rates(
    flops_per_s=5e12, memory_bytes_per_s=5e11, latency_s=(1e-5,), link_bytes_per_s=(2e10,)
)


def space_of(name: str, devices: int, rates: jaxlwp.Rates = RATES) -> jaxlwp.cost.SearchSpace:
    """A network's search space at the paper's batch of 32 per device."""
    workload = load_workload(name, batch=32 * devices, abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    mesh = jaxlwp.make_mesh(jax.devices()[:devices])
    return jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=rates))


@pytest.mark.parametrize("devices", [2, 4])
def test_equals_exhaustive_search_on_lenet(devices: int) -> None:
    space = space_of("models.lenet:LeNet5", devices)
    tables = space.tables
    found = jaxlwp.search(space)
    every = jaxlwp.solve(
        tables.node_costs_s,
        tables.edges,
        tables.transfer_s,
        method="exhaustive",
        enumerate_limit=10**10,
    )
    assert math.isclose(found.cost.total_s, every.cost_s, rel_tol=1e-12)
    assert found.optimal and found.gap == 0


@pytest.mark.parametrize("name", ["models.alexnet:AlexNet", "models.vgg:VGG16"])
def test_no_random_strategy_is_better(name: str) -> None:
    space = space_of(name, 8)
    found = jaxlwp.search(space)
    assert found.solution.remaining <= 2
    draw = np.random.default_rng()
    best = tuple(found.solution.choices)
    for _ in range(2000):
        # One or two layers changed: a strategy close to the optimum is the hardest to beat.
        choices = list(best)
        for layer in draw.integers(0, len(choices), 2):
            choices[layer] = int(draw.integers(0, len(space.configs[layer])))
        assert space.tables.evaluate(choices).total_s >= found.cost.total_s * (1 - 1e-12)


def test_cost_is_the_sum_of_its_parts() -> None:
    space = space_of("models.alexnet:AlexNet", 4)
    found = jaxlwp.search(space)
    assert math.isclose(found.cost.total_s, found.solution.cost_s, rel_tol=1e-12)
    evaluated = space.evaluate(found.strategy)
    assert evaluated == found.cost


def test_slow_links_move_dense_layers_off_data_parallelism() -> None:
    """The paper's pattern: dense layers by channel or reduction, not by sample."""
    space = space_of("models.alexnet:AlexNet", 4)
    strategy = jaxlwp.search(space).strategy
    for layer in ("fc6", "fc7"):
        assert not strategy.configs[layer].axes("sample")
    owt = space.evaluate(space.baseline("owt")).total_s
    assert owt < space.evaluate(space.baseline("data")).total_s


def test_full_space_contains_the_enumerated_one() -> None:
    workload = load_workload("models.lenet:LeNet5", batch=32, abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    devices = jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()[:8]), rates=RATES)
    few = jaxlwp.price(graph, devices)
    every = jaxlwp.price(graph, devices, interchangeable=False)
    for a, b in zip(few.configs, every.configs, strict=True):
        assert set(a) <= set(b)
    assert jaxlwp.search(every).cost.total_s <= jaxlwp.search(few).cost.total_s * (1 + 1e-12)


def test_a_config_outside_the_space_is_refused() -> None:
    space = space_of("models.lenet:LeNet5", 4)
    strategy = jaxlwp.search(space).strategy
    configs: dict[str, Any] = dict(strategy.configs)
    first = next(iter(configs))
    configs[first] = jaxlwp.Config.of({"depth": ("device0",)})
    odd = jaxlwp.Strategy(
        name="odd",
        configs=configs,
        axis_sizes=strategy.axis_sizes,
        fingerprint=strategy.fingerprint,
    )
    with pytest.raises(ValueError, match=r"'odd'.*depth=2.*not among its"):
        space.evaluate(odd)


def test_a_layer_without_a_rule_has_a_price() -> None:
    def loss(w: Any, x: Any) -> Any:
        return jax.numpy.mean(jax.numpy.fft.fft(x @ w).real)

    graph = jaxlwp.trace(loss, np.ones((64, 64), np.float32), np.ones((32, 64), np.float32))
    devices = jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()[:4]), rates=RATES)
    space = jaxlwp.price(graph, devices)
    unknown = next(layer for layer in graph.unknown() if layer.kind == "fft")
    assert space.configs[unknown.index] == (jaxlwp.Config(),)
    assert space.tables.compute_s[unknown.index][0] > 0
