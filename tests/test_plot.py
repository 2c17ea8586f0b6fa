"""Figures draw what the data say: rows, segments, lines, markers, and what they are called."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import jaxlwp
from jaxlwp.check import CompiledComparison
from jaxlwp.check._compare import Comparison, StrategyResult
from jaxlwp.devices import device_graph, make_mesh
from jaxlwp.optimize import ParetoCurve
from jaxlwp.report import plot_comparison, plot_pareto, plot_plan, plot_scaling, plot_threshold
from jaxlwp.report._rows import layer_costs
from jaxlwp.simulate import Outcome, Point, Scaling, Threshold
from jaxlwp.simulate._thresholds import Sample
from jaxlwp.solver._tables import Cost

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)


@pytest.fixture(autouse=True)
def _no_figure_is_left_open() -> Any:
    yield
    assert not plt.get_fignums()


def _lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Label of each line -> its data."""
    figure.canvas.draw()
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].lines
    }


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
    figure = plot_plan(plan, name="net")
    figure.canvas.draw()
    splits, times = figure.axes
    layers = plan.graph.layers
    assert [label.get_text() for label in splits.get_yticklabels()] == [x.name for x in layers]
    assert splits.get_ylim()[0] > splits.get_ylim()[1]  # the first layer on top
    rows = [
        config.describe(plan.space.devices.axis_sizes) for config in plan.strategy.configs.values()
    ]
    expected = [part.replace("=", " ") for row in rows for part in row.split()]
    assert [text.get_text() for text in splits.texts] == expected
    assert len(times.patches) == 4 * len(layers)
    assert figure.get_suptitle().startswith(f"net, strategy {strategy} on 8 x ")


def test_length_of_a_segment() -> None:
    splits = plot_plan(_plan("data")).axes[0]
    assert {round(bar.get_width(), 6) for bar in splits.patches} == {round(math.log2(8), 6)}


def test_times_add_up_to_the_predicted_step() -> None:
    plan = _plan("owt")
    costs = layer_costs(plan)
    assert sum(cost.total_s for cost in costs) == pytest.approx(plan.cost.total_s, rel=1e-12)
    times = plot_plan(plan).axes[1]
    drawn_ms = sum(bar.get_width() for bar in times.patches)
    assert drawn_ms == pytest.approx(plan.cost.total_s * 1e3, rel=1e-9)
    assert [text.get_text() for text in times.get_legend().get_texts()] == [
        *("compute", "transfer", "sync", "besides")
    ]
    hatches = {bar.get_hatch() for bar in times.patches}
    assert len(hatches) == len({to_hex(bar.get_facecolor()) for bar in times.patches}) == 4


def test_one_device() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(x @ params)

    plan = jaxlwp.parallelize(loss, jnp.ones((8, 4)), jnp.ones((4, 8)), devices=1, rates=RATES)
    figure = plot_plan(plan)
    figure.canvas.draw()
    assert {text.get_text() for text in figure.axes[0].texts} == {"replicated"}
    assert "loss" in figure.get_suptitle()


def comparison() -> Comparison:
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
    return Comparison(
        model="net",
        batch=32,
        devices=device_graph(make_mesh(jax.devices()[:1]), rates=RATES),
        machine={"simulated": True, "cpu_count": 3},
        versions={},
        date="2025-01-01T00:00:00+00:00",
        results=tuple(results),
    )


def test_comparison_has_a_row_per_strategy() -> None:
    figure = plot_comparison(comparison())
    lines = _lines(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["search", "data"]
    assert lines["measured, median"] == ([500, 500], [0, 1])
    assert lines["predicted"] == ([875, 875], [0, 1])
    spans = axes.collections[0].get_segments()
    assert [(span[0][0], span[1][0]) for span in spans] == [(250, 2000), (250, 2000)]
    assert [text.get_text() for text in axes.texts] == ["500", "500"]
    assert axes.get_title() == "net, batch 32, 1 x cpu"
    assert "milliseconds" in axes.get_xlabel()
    assert len(figure.legends[0].get_texts()) == 3


def test_comparison_of_compiled_programs() -> None:
    """Plain JAX has a forecast and no prediction."""
    results = [
        SimpleNamespace(strategy="found", predicted_s=0.25, forecast_s=0.5),
        SimpleNamespace(strategy="plain JAX", predicted_s=None, forecast_s=1.0),
    ]
    comparison = CompiledComparison(
        model="net", system="dgx-h100", num_devices=8, results=cast(Any, tuple(results))
    )
    figure = plot_comparison(comparison)
    lines = _lines(figure)
    assert lines["forecast of the compiled step"] == ([500, 1000], [0, 1])
    assert lines["predicted"] == ([250], [0])
    assert figure.axes[0].get_title() == "net, 8 devices of dgx-h100"


def _outcome(strategy: str, rate: float, efficiency: float, fits: bool = True) -> Outcome:
    return Outcome(
        strategy=strategy,
        step_s=1.0,
        examples_per_s=rate,
        efficiency=efficiency,
        sent_bytes=0,
        memory_bytes=0,
        fits=fits,
    )


def _scaling(weak: bool = True) -> Scaling:
    """Data parallelism does not apply to the second system; there nothing of "model" fits."""
    outcomes = (
        (_outcome("found", 750, 0.75), _outcome("data", 500, 0.5), _outcome("model", 100, 0.1)),
        (_outcome("found", 1600, 0.8), _outcome("model", 200, 0.1, fits=False)),
    )
    points = tuple(
        Point(system="", hosts=n, devices=8 * n, batch=64 * n if weak else 64, outcomes=each)
        for n, each in zip((1, 2), outcomes, strict=True)
    )
    return Scaling(model="net", weak=weak, gpu="h100", gpu_bytes=8e10, one_s=0.064, points=points)


def test_throughput_against_devices() -> None:
    figure = plot_scaling(_scaling())
    assert _lines(figure) == {
        "as many single GPUs": ([8, 16], [1000, 2000]),
        "found": ([8, 16], [750, 1600]),
        "data": ([8], [500]),
        "model": ([8, 16], [100, 200]),
        "model: does not fit": ([16], [200]),
    }
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16"]
    labels = {label.get_text() for label in axes.get_yticklabels()}
    assert {"100", "1,000"} <= labels and not any("e" in label for label in labels)
    assert axes.get_title() == "net on h100, batch 8 a GPU (weak scaling), predicted"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("GPUs", "examples per second")
    full, hollow = axes.lines[-2:]
    assert full.get_markevery() == [0]  # the second marker is the hollow one
    assert to_hex(hollow.get_markerfacecolor()) == "#ffffff"
    drawn = [line for line in axes.lines if line.get_label() in ("found", "data", "model")]
    assert len({line.get_marker() for line in drawn}) == len({x.get_color() for x in drawn}) == 3


def test_efficiency_against_devices() -> None:
    figure = plot_scaling(_scaling(weak=False), value="efficiency")
    lines = _lines(figure)
    assert lines["as many single GPUs"] == ([8, 16], [100, 100])
    assert lines["found"] == ([8, 16], [75, 80])
    assert "batch 64 in all (strong scaling)" in figure.axes[0].get_title()
    assert "%" in figure.axes[0].get_ylabel()
    with pytest.raises(ValueError, match=r"value is 'speed'; give 'throughput'"):
        plot_scaling(_scaling(), value=cast(Any, "speed"))


def threshold(what: str, scale: float) -> Threshold:
    samples = [
        Sample(value=value * scale, found_s=0.5, other_s=other_s)
        for value, other_s in ((1.0, 2.0), (4.0, 0.75), (16.0, 0.5))
    ]
    return Threshold(
        what=what,
        against="data",
        within=0.01,
        now=4e9 if what == "links" else None,
        samples=tuple(samples),
    )


@pytest.mark.parametrize(("what", "scale"), [("links", 1e9), ("batch", 1.0)])
def test_thresholds(what: str, scale: float) -> None:
    figure = plot_threshold(threshold(what, scale), name="net on two hosts")
    lines = _lines(figure)
    assert lines["found"] == ([1, 4, 16], [500, 500, 500])
    assert lines["data"] == ([1, 4, 16], [2000, 750, 500])
    unit = "GB/s" if what == "links" else "examples"
    assert lines[f"within 1% from 16 {unit} on"][0] == [16, 16]
    assert ("what there is, 4 GB/s" in lines) == (what == "links")
    axes = figure.axes[0]
    assert axes.get_title() == "net on two hosts: found and data, predicted"
    assert unit in axes.get_xlabel() and "milliseconds" in axes.get_ylabel()


def test_time_against_memory() -> None:
    points = [
        SimpleNamespace(
            seconds=seconds,
            estimated_bytes=estimated,
            memory=SimpleNamespace(peak_bytes=peak),
            result=SimpleNamespace(space=_plan("data").space),
        )
        for seconds, estimated, peak in ((1.0, 4e9, 5e9), (1.5, 2e9, 2e9))
    ]
    figure = plot_pareto(ParetoCurve(points=cast(Any, tuple(points))), name="net")
    assert _lines(figure) == {
        "by layers, what the search limits": ([2, 4], [1500, 1000]),
        "by the program, as compiled for GPUs": ([2, 5], [1500, 1000]),
    }
    axes = figure.axes[0]
    assert axes.lines[0].get_drawstyle() == "steps-post"  # with 3 GB one has the plan of 2 GB
    assert axes.get_title() == "net on 8 x cpu: time against memory, predicted"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("GB of a device", "milliseconds a step")


def test_time_against_memory_of_a_search() -> None:
    curve = jaxlwp.pareto(_plan("search").space, points=3)
    figure = plot_pareto(curve)
    by_layers = _lines(figure)["by layers, what the search limits"]
    assert by_layers[0] == sorted(point.estimated_bytes / 1e6 for point in curve.points)
    assert figure.axes[0].get_xlabel() == "MB of a device"
    assert by_layers[1] == sorted((1e3 * point.seconds for point in curve.points), reverse=True)


def test_axes_of_ones_own() -> None:
    figure = Figure()
    left, right = figure.subplots(ncols=2)
    assert plot_scaling(_scaling(), ax=left) is figure
    assert plot_scaling(_scaling(), ax=right, value="efficiency") is figure
    assert (len(left.lines), len(right.lines)) == (5, 5)
    part = figure.subfigures()
    assert plot_scaling(_scaling(), ax=part.subplots()) is figure


def test_notebooks_show_figures_without_pyplot() -> None:
    figure = plot_scaling(_scaling())
    assert cast(Any, figure)._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    for call in (
        lambda: plot_plan(_plan("data")),
        lambda: plot_comparison(cast(Any, None)),
        lambda: plot_scaling(_scaling()),
        lambda: plot_threshold(cast(Any, None)),
        lambda: plot_pareto(cast(Any, None)),
    ):
        with pytest.raises(ImportError, match=r"^plot_\w+: .*pip install 'jaxlwp\[plot\]'$"):
            call()


def test_matplotlib_is_imported_where_something_is_drawn() -> None:
    """At the top of one file alone, which is itself imported inside functions only."""
    for path in Path(jaxlwp.__file__).parent.rglob("*.py"):
        modules = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").split(".")[0])
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        assert "jaxlwp.report._figure" not in modules
        assert ("matplotlib" in modules) == (path.name == "_figure.py"), path
