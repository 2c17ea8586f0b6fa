"""A plan as a figure: how each layer is split, and what it takes. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxlwp.report._plot import need_matplotlib
from jaxlwp.report._rows import layer_costs
from jaxlwp.report._tables import seconds
from jaxlwp.solver import Cost
from jaxlwp.space import DIMENSIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlwp.plan import Plan

_IDLE = "#EEEEEE"


def plot_plan(plan: Plan, *, name: str | None = None) -> Figure:
    """A plan's layers: left how each is split, right its predicted milliseconds by cause.

    Left, a full row is all devices: a segment is a split dimension with its degree, as long as
    the logarithm of the degree; the rest of the row is replicated. Right, transfers are the
    layer's own and those of the tensors that come in; "besides" are the optimizer's update and
    memory taken anew.

    Args:
      plan: from `parallelize` or `bind`.
      name: of the network, for the title; the function's by default.

    Returns:
      A figure of its own, the first layer on top; `axes` are the two sides.

    Raises:
      ImportError: matplotlib is not installed: it comes with the extra `jaxlwp[plot]`.
    """
    need_matplotlib("plot_plan")
    from jaxlwp.report._figure import Picture

    layers = plan.graph.layers
    figure = Picture(figsize=(11, 1.6 + 0.3 * len(layers)), layout="constrained")
    splits, times = figure.subplots(ncols=2, sharey=True, width_ratios=(3, 2))
    _draw_splits(splits, plan)
    _draw_times(times, layer_costs(plan))
    splits.set_yticks(range(len(layers)), [layer.name for layer in layers])
    splits.set_ylim(len(layers) - 0.5, -0.5)  # the first layer on top
    times.tick_params(axis="y", left=False)
    figure.suptitle(_title(plan, name))
    return figure


def _title(plan: Plan, name: str | None) -> str:
    name = name or str(getattr(plan.function, "__qualname__", "plan"))
    apart_s = plan.space.tables.step_s
    apart = f", {seconds(apart_s)} ms of them of no layer" if apart_s else ""
    devices = plan.space.devices
    return (
        f"{name}, strategy {plan.strategy.name} on {devices.num_devices} x {devices.device_kind}: "
        f"{seconds(plan.cost.total_s)} ms a step predicted{apart}"
    )


def _draw_splits(axes: Axes, plan: Plan) -> None:
    from jaxlwp.report import _figure

    colours = dict(zip(DIMENSIONS, _figure.ALL, strict=True))
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
            colour = colours.get(dimension, _figure.GREY)
            axes.barh(row, width, left=left, color=colour, edgecolor="white", height=0.8)
            ink = "white" if colour in _figure.DARK else "black"
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
    from jaxlwp.report import _figure

    left = [0.0] * len(costs)
    for cause, part, colour, hatch in (
        ("compute", "compute_s", _figure.BLUE, ""),
        ("transfer", "transfer_s", _figure.ORANGE, "////"),
        ("sync", "sync_s", _figure.RED, "xxxx"),
        ("besides", "overhead_s", _figure.GREY, "...."),
    ):
        values_ms = [getattr(cost, part) * 1e3 for cost in costs]
        bars = axes.barh(range(len(costs)), values_ms, left=left, color=colour, label=cause)
        for bar in bars:
            bar.set(hatch=hatch, edgecolor="white", linewidth=0)
        left = [start + value for start, value in zip(left, values_ms, strict=True)]
    axes.set_xlabel("predicted ms")
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
