"""Figures of results: scaling, thresholds, time against memory, predicted against measured.

They need matplotlib (the extra `jaxlwp[plot]`), which is imported where something is drawn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jaxlwp.check import CompiledComparison
from jaxlwp.report._tables import seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlwp.check import Comparison
    from jaxlwp.optimize import ParetoCurve
    from jaxlwp.simulate import Scaling, Threshold


def need_matplotlib(function: str) -> None:
    """Check that there is something to draw with.

    Raises:
      ImportError: there is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{function}: matplotlib is not installed; it comes with the extra plot: "
            "pip install 'jaxlwp[plot]'"
        )


def plot_scaling(
    scaling: Scaling,
    *,
    value: Literal["throughput", "efficiency"] = "throughput",
    ax: Axes | None = None,
) -> Figure:
    """Throughput, or efficiency, against devices: a line per strategy.

    A hollow marker is a strategy that does not fit into a GPU's memory; the dashed line is what
    as many single GPUs do, each on its own.

    Args:
      scaling: from `jaxlwp.simulate.scaling`.
      value: "throughput" is examples per second, both axes logarithmic; "efficiency" is in
        percent of the dashed line.
      ax: axes to draw on; a new figure by default.

    Returns:
      The figure.

    Raises:
      ValueError: another value.
      ImportError: matplotlib is not installed: it comes with the extra `jaxlwp[plot]`.
    """
    if value not in ("throughput", "efficiency"):
        raise ValueError(f"plot_scaling: value is {value!r}; give 'throughput' or 'efficiency'")
    need_matplotlib("plot_scaling")
    from jaxlwp.report import _figure as made

    figure, axes = made.drawing(ax, (6.4, 4.0))
    fast = value == "throughput"
    points = sorted(scaling.points, key=lambda point: point.devices)
    counts = [point.devices for point in points]
    ideal = [100.0 for _ in points]
    if fast:  # efficiency is of this
        ideal = [p.outcomes[0].examples_per_s / p.outcomes[0].efficiency for p in points]
    axes.plot(counts, ideal, "--", color="black", linewidth=1, label="as many single GPUs")
    for name in dict.fromkeys(each.strategy for point in points for each in point.outcomes):
        drawn = [(p.devices, e) for p in points for e in p.outcomes if e.strategy == name]
        heights = [e.examples_per_s if fast else 100 * e.efficiency for _, e in drawn]
        fits = [e.fits for _, e in drawn]
        _line(axes, made.style(name), name, [n for n, _ in drawn], heights, fits)
    made.ticks_at(axes, sorted(set(counts)))
    if fast:
        axes.set_yscale("log")
        made.plain_log(axes.yaxis)
    else:
        axes.set_ylim(0, 1.06 * max(axes.dataLim.y1, 100))  # not cut off at the top
    weak = f"batch {points[0].batch // points[0].devices} a GPU (weak scaling)"
    batch = weak if scaling.weak else f"batch {points[0].batch} in all (strong scaling)"
    title = f"{scaling.model} on {scaling.gpu}, {batch}, predicted"
    made.finish(axes, title, "GPUs", "examples per second" if fast else "efficiency, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _line(
    axes: Axes,
    style: tuple[str, str],
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    full: Sequence[bool],
) -> None:
    """A line with a marker for each point, hollow where `full` is False."""
    colour, marker = style
    # What is found lies on top of its equals, which stick out.
    order, size = (3, 6) if label in ("found", "search") else (2, 8)
    drawn = axes.plot(
        x, y, marker=marker, markersize=size, color=colour, label=label, zorder=order
    )[0]
    drawn.set_markevery([n for n, fits in enumerate(full) if fits])
    if not all(full):
        hollow = [(a, b) for a, b, fits in zip(x, y, full, strict=True) if not fits]
        axes.plot(
            *zip(*hollow, strict=True),
            marker,
            markersize=size,
            zorder=order,
            color=colour,
            markerfacecolor="white",
            label=f"{label}: does not fit",
        )


def plot_threshold(threshold: Threshold, *, name: str = "", ax: Axes | None = None) -> Figure:
    """Steps of the strategy found and of a baseline, against link rates or batches.

    A dashed line is the threshold, from which on the baseline is as good (takes no more than
    `within` longer); a dotted one the rate that the system has.

    Args:
      threshold: from `jaxlwp.simulate.link_threshold` or `batch_threshold`.
      name: of the network and the system, for the title.
      ax: axes to draw on; a new figure by default.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed: it comes with the extra `jaxlwp[plot]`.
    """
    need_matplotlib("plot_threshold")
    from jaxlwp.report import _figure as made

    figure, axes = made.drawing(ax, (6.4, 4.0))
    links = threshold.what == "links"
    scale = 1e-9 if links else 1.0
    unit = "GB/s" if links else "examples"
    values = [sample.value * scale for sample in threshold.samples]
    for strategy, part in (("found", "found_s"), (threshold.against, "other_s")):
        taken_ms = [1e3 * getattr(sample, part) for sample in threshold.samples]
        _line(axes, made.style(strategy), strategy, values, taken_ms, [True] * len(values))
    if threshold.value is not None:
        value = threshold.value * scale
        label = f"within {threshold.within:.0%} from {value:.3g} {unit} on"
        axes.axvline(value, linestyle="--", color="black", linewidth=1, label=label)
    if threshold.now is not None:
        now = threshold.now * scale
        axes.axvline(now, linestyle=":", color="black", label=f"what there is, {now:.3g} {unit}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        made.plain_log(axis)
    head = f"{name}: " if name else ""
    title = f"{head}found and {threshold.against}, predicted"
    x = "GB/s of a GPU over the slowest links" if links else "examples of a GPU"
    made.finish(axes, title, x, "milliseconds a step")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_pareto(curve: ParetoCurve, *, name: str = "", ax: Axes | None = None) -> Figure:
    """Time against memory: the fastest strategies for less and less memory of a device.

    The line is the least time under a limit of memory, by the sum of the layers' bytes that the
    search keeps below it; diamonds are the same strategies by the memory of their programs.

    Args:
      curve: from `jaxlwp.pareto`.
      name: of the network, for the title.
      ax: axes to draw on; a new figure by default.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed: it comes with the extra `jaxlwp[plot]`.
    """
    need_matplotlib("plot_pareto")
    from jaxlwp.report import _figure as made

    figure, axes = made.drawing(ax, (6.4, 4.0))
    points = sorted(curve.points, key=lambda point: point.estimated_bytes)
    times_ms = [1e3 * point.seconds for point in points]
    large = max(point.estimated_bytes for point in points) > 5e8
    unit, size = ("GB", 1e9) if large else ("MB", 1e6)
    axes.plot(
        [point.estimated_bytes / size for point in points],
        times_ms,
        drawstyle="steps-post",  # between two limits the strategy of the lower one is the best
        marker="o",
        color=made.BLUE,
        label="by layers, what the search limits",
    )
    programs = [
        (point.memory.peak_bytes / size, 1e3 * point.seconds) for point in points if point.memory
    ]
    if programs:  # a saved problem has none
        axes.plot(
            *zip(*programs, strict=True),
            "D",
            color=made.RED,
            markerfacecolor="none",
            label="by the program, as compiled for GPUs",
        )
    devices = points[0].result.space.devices
    head = f"{name} on " if name else ""
    title = f"{head}{devices.num_devices} x {devices.device_kind}: time against memory, predicted"
    made.finish(axes, title, f"{unit} of a device", "milliseconds a step")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_comparison(
    comparison: Comparison | CompiledComparison, *, ax: Axes | None = None
) -> Figure:
    """Predicted against measured: a row per strategy, milliseconds a step, logarithmic.

    Measured steps have their median, and a bar from the fastest to the slowest. Of a comparison
    of compiled programs it is their forecast.

    Args:
      comparison: from `jaxlwp.compare`, or `jaxlwp.check.compare_compiled`.
      ax: axes to draw on; a new figure by default.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed: it comes with the extra `jaxlwp[plot]`.
    """
    need_matplotlib("plot_comparison")
    from jaxlwp.report import _figure as made

    results = comparison.results
    rows = range(len(results))
    figure, axes = made.drawing(ax, (8, 1.4 + 0.45 * len(results)))
    if isinstance(comparison, CompiledComparison):
        taken_s = [result.forecast_s for result in comparison.results]
        what = "forecast of the compiled step"
        title = f"{comparison.model}, {comparison.num_devices} devices of {comparison.system}"
    else:
        taken_s = [result.measured_s for result in comparison.results]
        what = "measured, median"
        _draw_rounds(axes, comparison, made.BLUE)
        devices = comparison.devices
        title = (
            f"{comparison.model}, batch {comparison.batch}, "
            f"{devices.num_devices} x {devices.device_kind}"
        )
    axes.plot([1e3 * s for s in taken_s], rows, "o", color=made.BLUE, label=what)
    known = [n for n in rows if results[n].predicted_s is not None]  # plain JAX has none
    predicted_ms = [1e3 * (results[n].predicted_s or 0.0) for n in known]
    axes.plot(predicted_ms, known, "D", color="black", fillstyle="none", label="predicted")
    for row, value_s in enumerate(taken_s):
        axes.text(1e3 * value_s, row - 0.3, seconds(value_s), ha="center", va="center", fontsize=8)
    axes.set_yticks(rows, [result.strategy for result in results])
    axes.set_ylim(len(results) - 0.5, -0.7)  # the first strategy on top
    axes.set_xscale("log")
    made.plain_log(axes.xaxis)
    made.finish(axes, title, "milliseconds a step, logarithmic", "strategy")
    if ax is None:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_rounds(axes: Axes, comparison: Comparison, colour: str) -> None:
    """A bar for each strategy, from its fastest step to its slowest."""
    axes.hlines(
        range(len(comparison.results)),
        [1e3 * min(result.times_s) for result in comparison.results],
        [1e3 * max(result.times_s) for result in comparison.results],
        color=colour,
        alpha=0.4,
        linewidth=6,
        label="measured, all rounds",
    )
