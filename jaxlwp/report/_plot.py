"""Pictures: what a plan splits, and how a comparison came out. Needs matplotlib.

Core code never imports this module, and this module imports matplotlib only where it draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxlwp.report._rows import layer_costs
from jaxlwp.report._tables import seconds
from jaxlwp.solver import Cost
from jaxlwp.space import DIMENSIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlwp.check import Comparison
    from jaxlwp.plan import Plan

# Colours of Okabe and Ito, which the colour-blind can tell apart.
_COLOURS = dict(
    zip(
        DIMENSIONS,
        ("#56B4E9", "#D55E00", "#009E73", "#E69F00", "#F0E442", "#CC79A7", "#0072B2"),
        strict=True,
    )
)
_DARK = ("#D55E00", "#009E73", "#0072B2")
_OTHER = "#999999"
_IDLE = "#EEEEEE"
_CAUSES = {"compute": "#4C72B0", "transfer": "#DD8452", "sync": "#C44E52"}


def plot_plan(plan: Plan) -> tuple[Figure, tuple[Axes, Axes]]:
    """A row per layer: left how it is split, right its predicted milliseconds by cause.

    Left, a full row is all devices: a segment is a split dimension with its degree, as long as
    the logarithm of the degree; the rest of the row is replicated.
    """
    import matplotlib.pyplot as plt

    layers = plan.graph.layers
    figure, (splits, times) = plt.subplots(
        ncols=2,
        sharey=True,
        figsize=(11, 1.6 + 0.34 * len(layers)),
        width_ratios=(3, 2),
        layout="constrained",
    )
    _draw_splits(splits, plan)
    _draw_times(times, layer_costs(plan))
    splits.set_yticks(range(len(layers)), [layer.name for layer in layers])
    splits.set_ylim(len(layers) - 0.5, -0.5)  # the first layer on top
    times.tick_params(axis="y", left=False)
    figure.suptitle(
        f"strategy {plan.strategy.name} on {plan.space.devices.num_devices} devices: "
        f"{seconds(plan.cost.total_s)} ms a step predicted"
    )
    return figure, (splits, times)


def _draw_splits(axes: Axes, plan: Plan) -> None:
    sizes, devices = plan.space.devices.axis_sizes, plan.space.devices.num_devices
    full = math.log2(devices) or 1.0
    for row, config in enumerate(plan.strategy.for_graph(plan.graph)):
        axes.barh(row, full, color=_IDLE, height=0.8)
        left = 0.0
        for dimension, names in config.splits:
            degree = math.prod(sizes[name] for name in names)
            width = math.log2(degree)
            if degree == 1:  # a mesh of one device
                continue
            colour = _COLOURS.get(dimension, _OTHER)
            axes.barh(row, width, left=left, color=colour, edgecolor="white", height=0.8)
            ink = "white" if colour in _DARK else "black"
            _label(axes, row, left + width / 2, f"{dimension} {degree}", ink)
            left += width
        if left == 0:
            _label(axes, row, full / 2, "replicated", "black")
    axes.set_xlim(0, full)
    axes.set_xticks([])
    axes.set_title("split (the full width is all devices)", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", left=False)


def _label(axes: Axes, row: int, middle: float, text: str, colour: str) -> None:
    axes.text(middle, row, text, ha="center", va="center", fontsize=8, color=colour)


def _draw_times(axes: Axes, costs: list[Cost]) -> None:
    left = [0.0] * len(costs)
    for cause, colour in _CAUSES.items():
        values_ms = [getattr(cost, f"{cause}_s") * 1e3 for cost in costs]
        axes.barh(range(len(costs)), values_ms, left=left, color=colour, label=cause)
        left = [start + value for start, value in zip(left, values_ms, strict=True)]
    axes.set_xlabel("predicted ms")
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def plot_comparison(comparison: Comparison) -> tuple[Figure, Axes]:
    """A row per strategy: milliseconds a step, predicted, and measured from fastest to slowest."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    results = comparison.results
    rows = range(len(results))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.45 * len(results)), layout="constrained")
    measured_ms = [result.measured_s * 1e3 for result in results]
    axes.hlines(
        rows,
        [min(result.times_s) * 1e3 for result in results],
        [max(result.times_s) * 1e3 for result in results],
        color=_CAUSES["compute"],
        alpha=0.4,
        linewidth=6,
        label="measured, all rounds",
    )
    axes.plot(measured_ms, rows, "o", color=_CAUSES["compute"], label="measured, median")
    predicted_ms = [result.predicted_s * 1e3 for result in results]
    axes.plot(predicted_ms, rows, "D", color="#777777", fillstyle="none", label="predicted")
    for row, result in zip(rows, results, strict=True):
        place = (measured_ms[row], row - 0.3)
        axes.text(*place, seconds(result.measured_s), ha="center", va="center", fontsize=8)
    axes.set_yticks(rows, [result.strategy for result in results])
    axes.set_ylim(len(results) - 0.5, -0.7)  # the first strategy on top
    axes.set_xscale("log")
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1.2, 0.4)))
    axes.set_xlabel("milliseconds a step, logarithmic")
    axes.set_title(
        f"{comparison.model}, batch {comparison.batch}, "
        f"{comparison.devices.num_devices} x {comparison.devices.device_kind}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
