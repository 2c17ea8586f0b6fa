"""Pictures have a row per layer, a segment per split, and the numbers they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import pytest

import jaxlwp
from jaxlwp.check._compare import Comparison, StrategyResult
from jaxlwp.devices import device_graph, make_mesh
from jaxlwp.report._plot import layer_costs, plot_comparison, plot_plan
from jaxlwp.solver._tables import Cost

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")


def _plan(strategy: str) -> jaxlwp.Plan:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.relu(x @ params["first"]) @ params["second"])

    params = {"first": jnp.ones((8, 16)), "second": jnp.ones((16, 8))}
    return jaxlwp.parallelize(
        loss, params, jnp.ones((16, 8)), devices=8, rates=RATES, strategy=strategy
    )


@pytest.mark.parametrize("strategy", ["search", *jaxlwp.BASELINES])
def test_plan_has_a_row_per_layer_and_a_segment_per_split(strategy: str) -> None:
    plan = _plan(strategy)
    figure, (splits, times) = plot_plan(plan)
    figure.canvas.draw()
    layers = plan.graph.layers
    assert [label.get_text() for label in splits.get_yticklabels()] == [x.name for x in layers]
    assert splits.get_ylim()[0] > splits.get_ylim()[1]  # the first layer on top
    rows = [
        config.describe(plan.space.devices.axis_sizes) for config in plan.strategy.configs.values()
    ]
    expected = [part.replace("=", " ") for row in rows for part in row.split()]
    assert [text.get_text() for text in splits.texts] == expected
    assert len(times.patches) == 3 * len(layers)
    assert strategy in figure.get_suptitle()


def test_length_of_a_segment() -> None:
    splits = plot_plan(_plan("data"))[1][0]
    assert {round(bar.get_width(), 6) for bar in splits.patches} == {round(math.log2(8), 6)}


def test_times_add_up_to_the_predicted_step() -> None:
    plan = _plan("owt")
    costs = layer_costs(plan)
    assert sum(cost.total_s for cost in costs) == pytest.approx(plan.cost.total_s, rel=1e-12)
    times = plot_plan(plan)[1][1]
    drawn_ms = sum(bar.get_width() for bar in times.patches)
    assert drawn_ms == pytest.approx(plan.cost.total_s * 1e3, rel=1e-9)


def test_one_device() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(x @ params)

    plan = jaxlwp.parallelize(loss, jnp.ones((8, 4)), jnp.ones((4, 8)), devices=1, rates=RATES)
    figure, (splits, _) = plot_plan(plan)
    figure.canvas.draw()
    assert {text.get_text() for text in splits.texts} == {"replicated"}


def test_comparison_has_a_row_per_strategy() -> None:
    results = [
        StrategyResult(
            strategy=name,
            predicted=Cost(compute_s=0.25, transfer_s=0.5, sync_s=0.125),
            times_s=(0.5, 0.25, 2.0),
            predicted_bytes_by_kind={},
            compiled_bytes_by_kind={},
            argument_bytes=100,
            temporary_bytes=20,
            peak_bytes=150,
        )
        for name in ("search", "data")
    ]
    comparison = Comparison(
        model="net",
        batch=32,
        devices=device_graph(make_mesh(jax.devices()[:1]), rates=RATES),
        machine={"simulated": True, "cpu_count": 3},
        versions={},
        date="2025-01-01T00:00:00+00:00",
        results=tuple(results),
    )
    figure, axes = plot_comparison(comparison)
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["search", "data"]
    measured, predicted = axes.lines
    assert list(measured.get_xdata()) == [500, 500]
    assert list(predicted.get_xdata()) == [875, 875]
    spans = axes.collections[0].get_segments()
    assert [(span[0][0], span[1][0]) for span in spans] == [(250, 2000), (250, 2000)]
    assert [text.get_text() for text in axes.texts] == ["500", "500"]
    assert "net" in axes.get_title() and "32" in axes.get_title()
