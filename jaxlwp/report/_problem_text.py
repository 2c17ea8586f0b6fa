"""Problems, what is found in them, and two strategies beside each other, as tables that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from jaxlwp.cost import SavedProblem
from jaxlwp.report._rows import costs_by_layer
from jaxlwp.report._tables import num_bytes, render, seconds
from jaxlwp.report._widths import Cells, fitting, left_out_note, table_of, terminal_width, wrapped
from jaxlwp.solver import Cost

if TYPE_CHECKING:
    from jaxlwp.cost import Problem
    from jaxlwp.optimize import SearchResult

_WORDS = ("layer", "kind", "config", "dimensions", "strategy")
_TIMES = ("compute\nms", "transfer\nms", "sync\nms")


def problem_text(problem: Problem, width: int | None = None) -> str:
    """Layers, how many configs they have, and what the baselines cost.

    Args:
      problem: the problem.
      width: of the text, in columns; that of the terminal by default.
    """
    width = width or terminal_width()
    layers = problem.graph.layers
    cells: Cells = {
        "layer": [layer.name for layer in layers],
        "kind": [layer.kind for layer in layers],
        "dimensions": [
            " ".join(f"{name}={max(sizes)}" for name, sizes in layer.dimensions.items())
            for layer in layers
        ],
        "configs": [f"{len(known):,}" for known in problem.configs],
        "fastest\nms alone": [seconds(float(s.min())) for s in problem.tables.node_costs_s],
    }
    if problem.measured:
        cells["measured"] = [f"{int(mask.sum()):,}" for mask in problem.measured]
    parts = _fitted(cells, width, ("fastest\nms alone", "kind"), ("dimensions",))
    known = {name: problem.evaluate(s) for name, s in problem.baselines().items()}
    return render(
        Group(
            Text(_problem_title(problem)),
            *parts,
            *_costs_table(known, None),
            Text("\n".join(_problem_notes(problem))),
        ),
        width,
    )


def result_text(
    result: SearchResult[Problem],
    beside: Mapping[str, Cost] | None = None,
    width: int | None = None,
) -> str:
    """What a search found in a problem: a row per layer, and other strategies beside it.

    Args:
      result: of the search.
      beside: what other strategies cost, besides the baselines, by what to call them.
      width: of the text, in columns; that of the terminal by default.
    """
    width = width or terminal_width()
    problem, strategy = result.space, result.strategy
    sizes = problem.devices.axis_sizes
    configs = strategy.for_graph(problem.graph)
    costs = costs_by_layer(problem, strategy)
    cells: Cells = {
        "layer": [layer.name for layer in problem.graph.layers],
        "kind": [layer.kind for layer in problem.graph.layers],
        "config": [config.describe(sizes) for config in configs],
        "compute\nms": [seconds(cost.compute_s) for cost in costs],
        "transfer\nms": [seconds(cost.transfer_s) for cost in costs],
        "sync\nms": [seconds(cost.sync_s) for cost in costs],
    }
    parts = _fitted(cells, width, ("kind", "sync\nms", "transfer\nms"), ("config",))
    known = {name: problem.evaluate(other) for name, other in problem.baselines().items()}
    known |= beside or {}
    proof = "optimal" if result.optimal else f"within {result.gap:.1%}"
    title = f"{_on_devices(problem)}: predicted {seconds(result.cost.total_s)} ms a step"
    if result.objective.unit == "bytes":
        title += f", {num_bytes(result.value)} of each device"
    notes = Text("\n".join(_problem_notes(problem)))
    return render(
        Group(
            Text(f"strategy {strategy.name} on {title}, {proof}"),
            *parts,
            *_costs_table({strategy.name: result.cost, **known}, result.cost.total_s),
            notes,
        ),
        width,
    )


def _fitted(
    cells: Cells, width: int, left_out: tuple[str, ...], configs: tuple[str, ...]
) -> list[RenderableType]:
    """A table, and a line below it if columns are left out."""
    shown = fitting(cells, width, left_out, configs=configs)
    notes = [Text(note) for note in left_out_note(cells, shown, width)]
    return [table_of(wrapped(shown, width, configs), _WORDS), *notes]


def _costs_table(costs: Mapping[str, Cost], best_s: float | None) -> list[RenderableType]:
    """A row per strategy; none if there is nothing to compare."""
    finite = {name: cost for name, cost in costs.items() if math.isfinite(cost.total_s)}
    if not finite:
        return []
    cells: Cells = {
        "strategy": list(finite),
        "step\nms": [seconds(cost.total_s) for cost in finite.values()],
        "compute\nms": [seconds(cost.compute_s) for cost in finite.values()],
        "transfer\nms": [seconds(cost.transfer_s) for cost in finite.values()],
        "sync\nms": [seconds(cost.sync_s) for cost in finite.values()],
        "besides\nms": [seconds(cost.overhead_s) for cost in finite.values()],
    }
    if best_s:
        cells["slower"] = [f"{cost.total_s / best_s:.2f}x" for cost in finite.values()]
    return [table_of(cells, _WORDS)]


def _on_devices(problem: Problem) -> str:
    devices = problem.devices
    return f"{devices.num_devices} x {devices.device_kind} {devices.axis_sizes}"


def _problem_title(problem: Problem) -> str:
    return (
        f"{len(problem.configs):,} layers, {len(problem.tables.edges):,} edges, "
        f"{problem.num_pairs:,} (layer, config) on {_on_devices(problem)}"
    )


def _problem_notes(problem: Problem) -> list[str]:
    """Where the costs are from, and what they leave open."""
    notes = [f"rates: {problem.devices.source}"]
    if problem.measured and problem.num_measured < problem.num_pairs:
        notes.append(
            f"layers measured: {problem.num_measured:,} of {problem.num_pairs:,} (layer, config); "
            "the other times are estimates from these"
        )
    elif problem.measured:
        notes.append("layers measured: all")
    if problem.constraints is not None:
        notes.append("under the constraints given")
    if not problem.whole:
        notes.append("not the whole space: the configs around its optimum")
    if isinstance(problem, SavedProblem):
        made = ", ".join(f"{name} {version}" for name, version in problem.versions.items())
        notes.append(f"saved by {made}; digest of the program {problem.graph.digest}")
    return notes
