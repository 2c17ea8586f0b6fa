"""A plan as one page: the network as a graph, and what is known of every layer.

`page_data` makes plain data, `page.html` draws it: one file without network, libraries or build.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlwp.cost import strategy_collectives, use_collectives
from jaxlwp.files import unwritable, write_file
from jaxlwp.graph import Layer
from jaxlwp.mesh import partition_spec
from jaxlwp.optimize import Alternative, Explanation, explain
from jaxlwp.report._plan_table import constants_text, plan_notes, plan_proof, shows_memory
from jaxlwp.report._rows import OUTPUTS, LayerRow, layer_rows
from jaxlwp.report._step_data import step_data
from jaxlwp.solver import Cost
from jaxlwp.space import BASELINES, Collective

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

Data = dict[str, Any]

ALTERNATIVES = 6
"""Configs of a layer that the page has: the best ones, and the plan's own."""

FRAMES = 3
"""Lines of the user's code that the page has of a layer."""

_DATA = "__DATA__"
"""Where the template wants the data."""


def save_page(plan: Plan, path: str | Path) -> None:
    """Write a plan's page in one step.

    Raises:
      OSError: it cannot be written there.
    """
    target = Path(path)
    if problem := unwritable(target):
        raise OSError(f"report: cannot write {target}: {problem}")
    write_file(target, page_html(plan))


def page_html(plan: Plan) -> str:
    """The page as text."""
    template = resources.files("jaxlwp.report").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(_DATA)
    return before + embedded(page_data(plan)) + after


def embedded(data: Data) -> str:
    """JSON that may stand inside a script element, whatever the strings in it.

    Letters beyond ASCII are escaped, and so are those that could end the element or open a comment.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def page_data(plan: Plan) -> Data:
    """All that the page shows, in seconds and bytes of one device and one step."""
    devices = plan.space.devices
    rows = layer_rows(plan, memory=shows_memory(plan))
    layers = [row for row in rows if row.name != OUTPUTS]
    return {
        "strategy": plan.strategy.name,
        "what": "A training step" if plan.trains else "An evaluation",
        "devices": f"{devices.num_devices} x {devices.device_kind}",
        "mesh": [[name, size] for name, size in devices.axis_sizes.items()],
        "proof": plan_proof(plan),
        "notes": plan_notes(plan).splitlines()[1:],
        "rates": devices.source,
        "constants": constants_text(plan),
        "cost": _cost(plan.cost),
        "bytes": sum(row.num_bytes for row in rows),
        "memory": _memory(plan),
        "baselines": _baselines(plan),
        "checked": [[name, _finite(s)] for name, s in plan.checked.items()],
        "checked_by": plan.checked_by,
        "layers": _layers(plan, layers),
        "edges": edge_data(plan),
        "outputs": [_traffic(row.collectives) for row in rows if row.name == OUTPUTS],
        "step": step_data(plan),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cost(cost: Cost) -> Data:
    """Seconds by cause; what is not allowed has none."""
    parts = ("compute", "transfer", "sync", "overhead", "total")
    return {part: _finite(getattr(cost, f"{part}_s")) for part in parts}


def _memory(plan: Plan) -> list[list[Any]]:
    """Parts of a device's memory at its peak, of which it is the sum; none if not asked for."""
    if not shows_memory(plan):
        return []
    memory = plan.memory
    return [
        ["parameters", memory.parameter_bytes],
        ["optimizer's state", memory.optimizer_bytes],
        ["batch", memory.batch_bytes],
        ["kept for the backward pass", memory.kept_bytes],
        ["temporary", memory.temporary_bytes],
    ]


def _baselines(plan: Plan) -> list[Data]:
    """The strategies to compare with, or why one of them is not possible."""
    result: list[Data] = []
    for name in BASELINES:
        try:
            strategy = plan.space.baseline(name)
            cost = plan.space.evaluate(strategy)
        except ValueError as error:
            result.append({"name": name, "problem": str(error)})
            continue
        configs = strategy.for_graph(plan.graph)
        moved = strategy_collectives(plan.graph, configs, plan.space.devices.axis_sizes)
        result.append({"name": name, "cost": _cost(cost), "bytes": sum(c.num_bytes for c in moved)})
    return result


# --- layers ------------------------------------------------------------------------------------


def _layers(plan: Plan, rows: Sequence[LayerRow]) -> list[Data]:
    sizes, measured = plan.space.devices.axis_sizes, plan.space.measured
    choices = plan.space.choices(plan.strategy)
    arguments, explanation = _arguments(plan), _explanation(plan)
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "rule": row.has_rule,
            "config": row.config.describe(sizes),
            "spec": str(partition_spec(row.output)).replace("PartitionSpec", "P"),
            "shape": shape_text(layer.output),
            "source": _source(layer),
            "cost": _cost(row.cost),
            "measured": bool(measured and measured[layer.index][choices[layer.index]]),
            "collectives": _traffic(row.collectives),
            "kept": row.kept_bytes,
            "arguments": arguments[layer.index],
            "alternatives": _alternatives(plan, explanation, row),
        }
        for layer, row in zip(plan.graph.layers, rows, strict=True)
    ]


def _source(layer: Layer) -> list[str]:
    """The user's lines that a layer is from, the innermost first; below this folder if there."""
    sources = (m.equation.source for m in layer.members)
    lines = next((source.lines for source in sources if source is not None and source.lines), ())
    return [line.removeprefix(f"{Path.cwd()}{os.sep}") for line in reversed(lines[-FRAMES:])]


def shape_text(value: Any) -> str:
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _traffic(collectives: Sequence[Collective]) -> list[Data]:
    """How many collectives of a kind over which axes, and their bytes."""
    found: dict[tuple[str, tuple[str, ...], bool], Data] = {}
    for one in collectives:
        entry = found.setdefault(
            (one.kind, one.axes, one.backward),
            {
                "kind": one.kind,
                "axes": list(one.axes),
                "backward": one.backward,
                "count": 0,
                "bytes": 0,
            },
        )
        entry["count"] += 1
        entry["bytes"] += one.num_bytes
    return list(found.values())


def _arguments(plan: Plan) -> list[list[Data]]:
    """The function's arguments that each layer stores, and how they are split."""
    graph, sizes = plan.graph, plan.space.devices.axis_sizes
    result: list[list[Data]] = [[] for _ in graph.layers]
    layouts = plan.lowered.input_layouts()
    for position, (value, name) in enumerate(
        zip(graph.program.inputs, graph.argument_names, strict=True)
    ):
        if value not in graph.owners:
            continue
        info, layout = graph.program.values[value], layouts[position]
        split = math.prod(sizes[axis] for axes in layout for axis in axes)
        result[graph.owners[value][0]].append(
            {
                "name": name,
                "shape": shape_text(info),
                "spec": str(partition_spec(layout)).replace("PartitionSpec", "P"),
                "bytes": math.ceil(math.prod(info.shape) * info.itemsize / split),
                "parameter": position < graph.num_parameters,
            }
        )
    return result


def _explanation(plan: Plan) -> Explanation | None:
    """What other configs would cost, if the search's tables are small enough to say."""
    try:
        return explain(plan.space)
    except ValueError:
        return None


def _alternatives(plan: Plan, explanation: Explanation | None, row: LayerRow) -> list[Data]:
    """The best strategies with other configs of the layer, and with its own, the best first."""
    if explanation is None:
        return []
    ranked = [a for a in explanation.alternatives(row.name) if math.isfinite(a.best_s)]
    own = [a for a in ranked if a.config == row.config]
    shown = ranked[:ALTERNATIVES] + [a for a in own if a not in ranked[:ALTERNATIVES]]
    return [_alternative(plan, a, own=a in own) for a in shown]


def _alternative(plan: Plan, alternative: Alternative, own: bool) -> Data:
    return {
        "config": alternative.config.describe(plan.space.devices.axis_sizes),
        "axes": "; ".join(f"{name}: {', '.join(axes)}" for name, axes in alternative.config.splits),
        "more": alternative.extra_s,
        "own": own,
    }


# --- edges -------------------------------------------------------------------------------------


def edge_data(plan: Plan) -> list[Data]:
    """What flows from one layer to another, and what moving it takes.

    Bytes are counted for each reader; readers that want the same in the same layout share them.
    """
    configs, sizes = plan.strategy.for_graph(plan.graph), plan.space.devices.axis_sizes
    tables, choices = plan.space.tables, plan.space.choices(plan.strategy)
    seconds: dict[tuple[int, int], float] = {}
    for (i, j), table in zip(tables.edges, tables.transfer_s, strict=True):
        seconds[i, j] = seconds.get((i, j), 0.0) + float(table[choices[i], choices[j]])
    found: dict[tuple[int, int], Data] = {}
    for edge in plan.graph.edges:
        pair = edge.source, edge.target
        entry = found.setdefault(
            pair,
            {
                "source": edge.source,
                "target": edge.target,
                "tensors": [],
                "bytes": 0,
                "seconds": seconds.get(pair, 0.0),
            },
        )
        moved = use_collectives(edge.use, configs[edge.source], configs[edge.target], sizes)
        entry["bytes"] += sum(collective.num_bytes for collective in moved)
        text = shape_text(edge.use.info) + (" (argument)" if edge.use.argument else "")
        if text not in entry["tensors"]:
            entry["tensors"].append(text)
    return list(found.values())
