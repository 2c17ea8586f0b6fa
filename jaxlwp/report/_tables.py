"""Reports: what a plan looks like as a table. Core code never imports this module at load time."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

from jaxlwp.optimize import search

if TYPE_CHECKING:
    from jaxlwp.check import Comparison, CompiledComparison, Forecast, Traffic, Verification
    from jaxlwp.cost import Problem
    from jaxlwp.optimize import Alternative, Explanation, ParetoCurve
    from jaxlwp.simulate import StepSimulation


def render(table: RenderableType, width: int = 150) -> str:
    """What rich shows as plain text, in notebooks too (where rich would show it instead)."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, color_system=None, force_terminal=False, force_jupyter=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def seconds(value: float) -> str:
    """Seconds in milliseconds with three digits that matter, in full from a second on."""
    milliseconds = value * 1e3
    return f"{milliseconds:,.0f}" if milliseconds >= 999.5 else f"{milliseconds:.3g}"


def num_bytes(value: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def comparison_table(comparison: Comparison) -> Table:
    """A row per strategy: step time, collective bytes and memory, predicted and measured."""
    rounds = len(comparison.results[0].times_s)
    cores = f", simulated on {comparison.machine['cpu_count']} processor cores"
    simulated = cores if comparison.machine["simulated"] else ""
    table = titled_table(
        title=(
            f"{comparison.model}, batch {comparison.batch}, training step on "
            f"{comparison.devices.num_devices} x {comparison.devices.device_kind}{simulated}"
        ),
        caption=_comparison_notes(comparison),
    )
    table.add_column("strategy")
    for column in (
        "predicted ms",
        f"measured ms\n(median of {rounds})",
        "min..max ms",
        "speed-up\nover data",
        "bytes/device\npredicted",
        "bytes/device\ncompiled",
        "arguments\n/device",
        "temporaries\n/device",
        "peak\n/device",
    ):
        table.add_column(column, justify="right")
    for result in comparison.results:
        speedup = comparison.speedup(result.strategy)
        agrees = result.compiled_bytes_by_kind == result.predicted_bytes_by_kind
        table.add_row(
            result.strategy,
            seconds(result.predicted_s),
            seconds(result.measured_s),
            f"{seconds(min(result.times_s))}..{seconds(max(result.times_s))}",
            "" if speedup is None else f"{speedup:.2f}x",
            num_bytes(result.predicted_bytes),
            num_bytes(result.compiled_bytes) + ("" if agrees else " *"),
            num_bytes(result.argument_bytes),
            num_bytes(result.temporary_bytes),
            num_bytes(result.peak_bytes),
        )
    return table


def _comparison_notes(comparison: Comparison) -> str:
    """What the columns mean, what was not run, and where compiled bytes differ from predicted."""
    notes = [
        f"predicted: from layer times and rates, {comparison.devices.source}",
        "bytes: operands of the step's collectives; arguments: parameters, optimizer state, batch",
    ]
    for name, size in comparison.left_out.items():
        notes.append(f"{name}: not run, predicted to need {num_bytes(size)} of each device")
    for result in comparison.results:
        predicted, compiled = result.predicted_bytes_by_kind, result.compiled_bytes_by_kind
        for kind in sorted(predicted | compiled):
            if predicted.get(kind, 0) != compiled.get(kind, 0):
                notes.append(
                    f"* {result.strategy}: {kind} {predicted.get(kind, 0):,} B predicted, "
                    f"{compiled.get(kind, 0):,} B compiled"
                )
    return "\n".join(notes)


def comparison_text(comparison: Comparison) -> str:
    """`comparison_table` as text."""
    return render(comparison_table(comparison))


def explanation_table(explanation: Explanation) -> Table:
    """A row per layer: the configs of the cheapest strategies, and what the next cost more."""
    space = explanation.space
    table = titled_table(
        title=f"best strategy: {seconds(explanation.optimum_s)} ms; with another config of a layer",
        caption="every figure is the best strategy with that config, all other layers adapted",
    )
    for column in ("layer", "config", "second", "third", "most"):
        table.add_column(column)
    for layer in space.graph.layers:
        ranked = explanation.alternatives(layer.name)
        allowed = [a for a in ranked if a.best_s < math.inf]
        cells = [_alternative_text(a, space) for a in allowed]
        others = (*cells[1:3], "", "")[:2]
        most = cells[-1] if len(cells) > 3 else ""
        table.add_row(
            layer.name, allowed[0].config.describe(space.devices.axis_sizes), *others, most
        )
    return table


def _alternative_text(alternative: Alternative, space: Problem) -> str:
    text = alternative.config.describe(space.devices.axis_sizes)
    return f"{text} (+{seconds(alternative.extra_s)} ms)"


def alternatives_table(
    explanation: Explanation, layer: str, containing: Sequence[str] = (), rows: int = 8
) -> Table:
    """A row per config of a layer: the best strategy with it, and where it loses time.

    Args:
      explanation: from `explain`.
      layer: name of the layer.
      containing: dimensions that must be split.
      rows: how many, the best first.
    """
    space = explanation.space
    ranked = explanation.alternatives(layer, containing)
    asked = f" with {', '.join(containing)} split" if containing else ""
    table = titled_table(
        title=f"layer {layer}{asked}: the best strategy with each config",
        caption=f"{min(rows, len(ranked))} of {len(ranked)} configs; the optimum takes "
        f"{seconds(explanation.optimum_s)} ms; differences to it in ms",
    )
    table.add_column("config")
    for column in ("best ms", "more", "compute", "transfer", "sync", "besides", "layers changed"):
        table.add_column(column, justify="right")
    optimum = search(space)
    for alternative in ranked[:rows]:
        if alternative.best_s == math.inf:
            table.add_row(alternative.config.describe(space.devices.axis_sizes), "not allowed")
            continue
        found = explanation.best_with(layer, alternative.config)
        parts = ("compute_s", "transfer_s", "sync_s", "overhead_s")
        more = [getattr(found.cost, part) - getattr(optimum.cost, part) for part in parts]
        changed = sum(
            found.strategy.configs[name] != config
            for name, config in optimum.strategy.configs.items()
        )
        table.add_row(
            alternative.config.describe(space.devices.axis_sizes),
            seconds(alternative.best_s),
            f"{alternative.extra_s * 1e3:+.3g}",
            *(f"{value * 1e3:+.3g}" for value in more),
            str(changed),
        )
    return table


def pareto_table(curve: ParetoCurve) -> Table:
    """A row per strategy: memory, time, and what the time goes to."""
    fastest_s = curve.points[0].seconds
    known = curve.points[0].memory is not None
    table = titled_table(
        title="fastest strategies for less and less memory of a device",
        caption="limit, layers: the sum of the layers' bytes, which the search keeps below the "
        "limit" + ("; program: predicted as compiled for GPUs" if known else ""),
    )
    programs = ("program",) if known else ()
    for column in ("limit", "layers", *programs, "predicted ms", "slower", "proof"):
        table.add_column(column, justify="right")
    for point in curve.points:
        result = point.result
        table.add_row(
            num_bytes(point.limit_bytes),
            num_bytes(point.estimated_bytes),
            *(() if point.memory is None else (num_bytes(point.memory.peak_bytes),)),
            seconds(point.seconds),
            f"{point.seconds / fastest_s:.2f}x",
            "optimal" if result.optimal else f"within {result.gap:.1%}",
        )
    return table


def titled_table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left")


def verification_table(check: Verification) -> Table:
    """A row per layer: collectives as priced and in the program, time; the totals below."""
    measured = "" if check.measured_s is None else f", measured {seconds(check.measured_s)} ms"
    predicted, compiled = check.predicted_bytes_by_kind, check.compiled_bytes_by_kind
    notes = [f"step: predicted {seconds(check.predicted_s)} ms{measured}"]
    notes += [
        f"{kind}: {predicted.get(kind, 0):,} B predicted, {compiled.get(kind, 0):,} B compiled"
        for kind in sorted(predicted | compiled)
    ]
    notes.append(
        f"memory of a device: {num_bytes(check.predicted_memory_bytes)} predicted (as on GPUs), "
        f"{num_bytes(check.compiled_memory_bytes)} compiled"
    )
    if check.disagreeing:
        names = ", ".join(layer.name for layer in check.disagreeing)
        notes.append(f"* the program of these layers differs from what was priced: {names}")
    table = titled_table(
        title=f"strategy {check.strategy}, step compiled for {check.compiled_for}",
        caption="\n".join(notes),
    )
    for column in ("layer", "config", "collectives priced", "collectives in the program"):
        table.add_column(column)
    table.add_column("compute ms", justify="right")
    for layer in check.layers:
        table.add_row(
            layer.name,
            layer.config,
            _traffic_text(layer.predicted),
            "as priced" if layer.agrees else _traffic_text(layer.program) + " *",
            seconds(layer.compute_s) + (" measured" if layer.measured else ""),
        )
    return table


def _traffic_text(traffic: Traffic) -> str:
    lines = (f"{kind} {','.join(axes)} {size:,} B" for (kind, axes), size in traffic.items())
    return "\n".join(lines) or "-"


def verification_text(check: Verification) -> str:
    """`verification_table` as text."""
    return render(verification_table(check))


def forecast_table(forecast: Forecast) -> Table:
    """A row per kind of kernel and collective; what is hidden and what is exposed."""
    step = f"{seconds(forecast.total_s)} ms a step on {forecast.system}"
    notes = [
        f"kernels {seconds(forecast.compute_s)} ms, collectives "
        f"{seconds(forecast.communication_s)} ms, of which kernels wait for "
        f"{seconds(forecast.exposed_s)} ms"
    ]
    if forecast.memory is not None:
        memory = forecast.memory
        notes.append(
            f"memory of a device: {num_bytes(memory.peak_bytes)} at its peak, temporaries "
            f"{num_bytes(memory.temporary_bytes)}"
        )
    notes += forecast.notes
    table = titled_table(
        title=f"forecast: {step}, {forecast.num_devices} devices", caption="\n".join(notes)
    )
    table.add_column("kernels and collectives")
    for column in ("count", "bytes", "TFLOP", "ms", "exposed ms"):
        table.add_column(column, justify="right")
    for kind, total in (*forecast.kernels.items(), *forecast.collectives.items()):
        exposed = forecast.exposed.get(kind) if kind in forecast.collectives else None
        table.add_row(
            kind,
            f"{total.count:,}",
            num_bytes(total.num_bytes),
            f"{total.flops / 1e12:.3g}" if total.flops else "",
            seconds(total.seconds),
            seconds(exposed.seconds) if exposed else "",
        )
    return table


def compiled_table(comparison: CompiledComparison) -> Table:
    """A row per strategy: time by the compiled program, what it moves, sends and takes."""
    plain = {r.strategy: r.forecast_s for r in comparison.results}.get("plain JAX")
    table = titled_table(
        title=f"{comparison.model or 'strategies'} on {comparison.num_devices} devices of "
        f"{comparison.system}: forecast of the compiled steps",
        caption=f"fastest plan that fits: {comparison.best.strategy}"
        + "".join(f"\n{name}: not compiled, {said}" for name, said in comparison.refused.items()),
    )
    table.add_column("strategy")
    for column in (
        "forecast\nms",
        "predicted\nms",
        "speed-up\nover plain",
        "exposed\nms",
        "kernels",
        "moved",
        "sent",
        "memory",
    ):
        table.add_column(column, justify="right")
    for result in comparison.results:
        found = result.forecast
        table.add_row(
            result.strategy,
            seconds(result.forecast_s),
            "" if result.predicted_s is None else seconds(result.predicted_s),
            "" if plain is None else f"{plain / result.forecast_s:.2f}x",
            seconds(found.exposed_s),
            f"{found.num_kernels:,}",
            num_bytes(found.num_bytes),
            num_bytes(sum(total.num_bytes for total in found.collectives.values())),
            num_bytes(result.memory_bytes) + ("" if comparison.fits(result) else " *"),
        )
    return table


def compiled_text(comparison: CompiledComparison) -> str:
    """`compiled_table` as text."""
    return render(compiled_table(comparison))


def forecast_text(forecast: Forecast) -> str:
    """`forecast_table` as text."""
    return render(forecast_table(forecast))


def simulation_table(simulation: StepSimulation) -> Table:
    """A row per resource, and one per cause of what makes the step as long as it is."""
    how = "overlapped" if simulation.overlap else "one after the other"
    table = titled_table(
        title=f"{simulation.strategy} on {simulation.num_devices} devices, {how}: "
        f"{seconds(simulation.total_s)} ms a step",
        caption=f"plain sum {seconds(simulation.plain_s)} ms"
        + "".join(
            f"; {reason} {'+' if more_s > 0 else '-'}{seconds(abs(more_s))}"
            for reason, more_s in simulation.more_s.items()
        ),
    )
    for column in ("", "busy\nms", "exposed\nms", "contended\nms", "of the step\nms"):
        table.add_column(column, justify="right" if column else "left")
    for use in simulation.resources:
        exposed = seconds(use.exposed_s) if use.exposed_s else ""
        contended = seconds(use.contended_s) if use.contended_s else ""
        table.add_row(use.name, seconds(use.busy_s), exposed, contended, "")
    table.add_section()
    for cause, cause_s in simulation.critical_s.items():
        table.add_row(cause, "", "", "", seconds(cause_s))
    return table


def simulation_text(simulation: StepSimulation) -> str:
    """`simulation_table` as text."""
    return render(simulation_table(simulation))
