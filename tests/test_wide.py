"""Large spaces: grown around the optimum, and bounded from below, against whole ones."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

import jaxlwp
from jaxlwp import Constraints
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost._model import AnalyticCostModel
from jaxlwp.devices._device_graph import DeviceGraph, LinkFit, axis_shape
from jaxlwp.optimize import _wide
from jaxlwp.optimize._floor import floor_s
from tests.contracts import zoo

MODELS = {
    "LeNet-5": "models.lenet:LeNet5",
    "AlexNet": "models.alexnet:AlexNet",
    "Inception-v3": "models.inception:InceptionV3",
}
RATES = (2e9, 5e9, 2e10)


def devices_of(levels: tuple[int, ...], **changes: Any) -> DeviceGraph:
    axes = tuple(
        jaxlwp.devices.MeshAxis(
            name=name,
            size=size,
            level=level,
            latency_s=1e-5,
            bytes_per_s=RATES[len(RATES) - len(levels) + level],
        )
        for name, size, level in axis_shape(levels)
    )
    rates = {"conv_flops_per_s": 5e12, "dense_flops_per_s": 4e12, "memory_bytes_per_s": 5e11}
    return DeviceGraph(axes=axes, **rates, **changes)


def graph_of(name: str, devices: int) -> jaxlwp.graph.ComputationGraph:
    work = load_workload(MODELS[name], batch=4 * devices, abstract=True)
    return jaxlwp.trace(work.loss, work.params, *work.batch)


def model_of(graph: jaxlwp.graph.ComputationGraph, devices: DeviceGraph) -> AnalyticCostModel:
    return AnalyticCostModel.of(graph, devices)


MEASURED_LIKE = {
    "overhead_s": 1e-5,
    "wait_s": 1e-5,
    "wait_work_s": 1e-3,
    "step_s": 1e-3,
    "update_pass_byte_s": 1e-11,
    "bucket_bytes": 1e6,
    "exposed_share": 0.6,
    "fuses": True,
    "first_touch_byte_s": ((1e6, 1e-11),),
    "links": (LinkFit(kind="all-reduce", axes_per_group=(2, 1), latency_s=3e-6, byte_s=1e-10),),
}


@pytest.mark.parametrize(
    ("name", "levels", "rates", "distance"),
    [
        ("LeNet-5", (8,), {}, 0.35),
        ("AlexNet", (8,), {}, 0.1),
        ("AlexNet", (2, 4), MEASURED_LIKE, 0.3),
        ("AlexNet", (2, 2, 2), {}, 0.4),
        pytest.param("Inception-v3", (8,), {}, 0.15, marks=pytest.mark.slow),
    ],
)
def test_floor_and_growth_against_the_whole_space(
    name: str, levels: tuple[int, ...], rates: Any, distance: float
) -> None:
    devices = devices_of(levels, **rates)
    graph = graph_of(name, devices.num_devices)
    best_s = jaxlwp.search(jaxlwp.price(graph, devices)).cost.total_s
    lower_s = floor_s(graph, model_of(graph, devices))
    assert (1 - distance) * best_s <= lower_s <= best_s * (1 + 1e-9)
    grown = jaxlwp.optimize.price_around(graph, devices)
    found = jaxlwp.search(grown)
    assert not grown.whole and grown.floor_s == pytest.approx(lower_s)
    assert best_s * (1 - 1e-9) <= found.cost.total_s <= 1.005 * best_s
    assert found.gap == pytest.approx(1 - lower_s / found.cost.total_s, abs=1e-9)
    assert sum(map(len, grown.configs)) < grown.num_pairs + 1
    for baseline in jaxlwp.BASELINES:
        grown.evaluate(grown.baseline(baseline))


@pytest.mark.parametrize("name", ["unet3d", "mobilenet_v2", "resnet18", "densenet121"])
def test_floor_is_below_every_strategy(name: str) -> None:
    """Nothing is priced below it on networks with every kind of layer."""
    space = zoo.case(name, 0).space
    lower_s = floor_s(space.graph, model_of(space.graph, space.devices))
    best_s = jaxlwp.search(space).cost.total_s
    assert 0.5 * best_s <= lower_s <= best_s * (1 + 1e-9)


def test_thousands_of_devices() -> None:
    devices = devices_of((8, 64, 8))
    graph = graph_of("AlexNet", devices.num_devices)
    assert _wide.is_large(graph, devices)
    grown = jaxlwp.optimize.price_around(graph, devices)
    found = jaxlwp.search(grown)
    assert found.cost.total_s <= grown.evaluate(grown.baseline("data")).total_s
    assert 0 < grown.floor_s <= found.cost.total_s
    # No move of one layer to any config that a random walk meets is better.
    draw = np.random.default_rng()
    for _ in range(20):
        choices = list(found.solution.choices)
        layer = int(draw.integers(len(choices)))
        choices[layer] = int(draw.integers(len(grown.configs[layer])))
        assert grown.tables.evaluate(choices).total_s >= found.cost.total_s * (1 - 1e-12)


def test_constraints_and_memory_in_a_large_space() -> None:
    devices = devices_of((4, 8))
    graph = graph_of("AlexNet", devices.num_devices)
    constraints = Constraints(forbid=("sample",))
    grown = jaxlwp.optimize.price_around(graph, devices, constraints=constraints)
    assert not any(config.axes("sample") for known in grown.configs for config in known)
    pin = Constraints(pin={"fc6": {"sample": 2, "channel": 8}, "conv2": {}})
    found = jaxlwp.search(jaxlwp.optimize.price_around(graph, devices, constraints=pin)).strategy
    assert found.configs["fc6"].describe(devices.axis_sizes) == "sample=2 channel=8"
    assert found.configs["conv2"] == jaxlwp.Config()
    free = jaxlwp.search(jaxlwp.optimize.price_around(graph, devices))
    most = float(jaxlwp.optimize.PeakMemory().rows(free.space).sums(free.solution.choices).max())
    smallest = jaxlwp.optimize.price_around(graph, devices, objective="memory")
    least = jaxlwp.search(smallest, objective="memory").value
    limit = 0.2 * most + 0.8 * least
    small = jaxlwp.optimize.price_around(graph, devices, memory_bytes=limit)
    fits = jaxlwp.search(small, memory_bytes=limit)
    assert fits.solution.peak_bytes <= limit < most
    assert fits.cost.total_s >= free.cost.total_s


def test_a_plan_from_a_large_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, baseline and strategy file, and the numbers of one device."""
    monkeypatch.setattr(_wide, "WHOLE_CONFIGS", 10)
    monkeypatch.setattr(_wide, "WHOLE_PAIRS", 0)
    work = load_workload(MODELS["LeNet-5"], batch=16)
    rates = jaxlwp.Rates(
        flops_per_s=5e12, memory_bytes_per_s=5e11, latency_s=(1e-5,), link_bytes_per_s=(2e10,)
    )

    def plan(strategy: Any, **options: Any) -> jaxlwp.Plan:
        arguments = work.params, *work.batch
        return jaxlwp.parallelize(
            work.loss, *arguments, rates=rates, strategy=strategy, devices=8, **options
        )

    found = plan("search")
    assert found.result is not None and not found.space.whole
    assert "within" in repr(found) or "optimal" in repr(found)
    again = plan(jaxlwp.Strategy.from_json(found.strategy.to_json()))
    assert again.cost.total_s == pytest.approx(found.cost.total_s)
    assert plan("data").cost.total_s >= found.cost.total_s
    by_time = plan("search", objective="overlap").result
    assert by_time is not None and by_time.gap == 1
    expected = jax.jit(jax.value_and_grad(work.loss))(work.params, *work.batch)
    actual = jax.jit(jax.value_and_grad(found))(work.params, *work.batch)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))
    smaller = load_workload(MODELS["LeNet-5"], batch=8, abstract=True).batch
    assert math.isfinite(found.rebind(*smaller).cost.total_s)
