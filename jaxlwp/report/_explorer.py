"""A plan's graph as a file that Model Explorer opens.

The format is that of https://github.com/google-ai-edge/model-explorer (`graph_builder.py`): a
collection of graphs, nodes in namespaces, edges named at the node that they enter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlwp.files import write_file
from jaxlwp.mesh import partition_spec
from jaxlwp.report._page import edge_data, shape_text
from jaxlwp.report._plan_table import shows_memory
from jaxlwp.report._rows import OUTPUTS, LayerRow, layer_rows
from jaxlwp.report._tables import num_bytes, seconds

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

Data = dict[str, Any]

COLOURS = ("#A8D8F4", "#F4CE80", "#80CDB8", "#F8F1A0", "#80B8D8", "#EAAE80", "#E5BBD2")
"""Of configs, the most frequent first: Okabe and Ito's, lighter, so that black text is read."""
IDLE = "#DDDDDD"
"""Of layers that are not split."""


def save_model_explorer(plan: Plan, path: str | Path) -> None:
    """Write a plan's graph for Model Explorer, in one step.

    Nodes are layers, inside their modules, coloured by config; each has its sharding, seconds by
    cause, bytes and memory. Edges that move bytes between devices are an overlay of their own.

    Args:
      plan: the plan.
      path: of the file, such as "plan.json"; `model-explorer plan.json` opens it.

    Raises:
      OSError: it cannot be written there.
    """
    write_file(Path(path), json.dumps(model_explorer_data(plan), allow_nan=False))


def model_explorer_data(plan: Plan) -> Data:
    """The file's content, a graph collection."""
    rows = [row for row in layer_rows(plan, memory=shows_memory(plan)) if row.name != OUTPUTS]
    edges = edge_data(plan)
    devices = plan.space.devices
    colours = _colours(rows)
    nodes = [
        _node(plan, index, row, [e for e in edges if e["target"] == index], colours)
        for index, row in enumerate(rows)
    ]
    graph = {
        "id": f"{plan.strategy.name} on {devices.num_devices} x {devices.device_kind}",
        "nodes": nodes,
        "groupNodeAttributes": {
            "": {
                "strategy": plan.strategy.name,
                "mesh": ", ".join(f"{name}={size}" for name, size in devices.axis_sizes.items()),
                "rates": devices.source,
                "step, predicted": _ms(plan.cost.total_s),
                "sent by a device": num_bytes(sum(row.num_bytes for row in rows)),
            }
        },
        "tasksData": {"edgeOverlaysDataListLeftPane": [_moved(edges)]},
    }
    return {"label": "jaxlwp plan", "graphs": [graph]}


def _colours(rows: Sequence[LayerRow]) -> dict[str, str]:
    """Of each config, by its splits."""
    counts: dict[str, int] = {}
    for row in rows:
        key = str(row.config.splits)
        counts[key] = counts.get(key, 0) + 1 if row.config.splits else 0
    ordered = sorted(counts, key=lambda key: -counts[key])
    return {
        key: COLOURS[n % len(COLOURS)] if counts[key] else IDLE for n, key in enumerate(ordered)
    }


def _node(
    plan: Plan, index: int, row: LayerRow, into: Sequence[Data], colours: dict[str, str]
) -> Data:
    namespace, _, label = row.name.rpartition("/")
    cost = row.cost
    attributes = {
        "operator": row.kind,
        "config": row.config.describe(plan.space.devices.axis_sizes),
        "time": _ms(cost.total_s),
        "compute": _ms(cost.compute_s),
        "transfer": _ms(cost.transfer_s),
        "sync": _ms(cost.sync_s),
        "besides": _ms(cost.overhead_s),
        "sent by a device": num_bytes(row.num_bytes),
    }
    if row.kept_bytes is not None:
        attributes["kept for the backward pass"] = num_bytes(row.kept_bytes)
    output = {
        "tensor_shape": shape_text(plan.graph.layers[index].output),
        "sharding": str(partition_spec(row.output)),
    }
    return {
        "id": str(index),
        "label": label,
        "namespace": namespace,
        "attrs": _pairs(attributes),
        "incomingEdges": [
            {
                "sourceNodeId": str(edge["source"]),
                "sourceNodeOutputId": "0",
                "targetNodeInputId": str(n),
            }
            for n, edge in enumerate(into)
        ],
        "inputsMetadata": [
            {
                "id": str(n),
                "attrs": _pairs(
                    {
                        "tensors": ", ".join(edge["tensors"]),
                        "moved by a device": num_bytes(edge["bytes"]),
                    }
                ),
            }
            for n, edge in enumerate(into)
        ],
        "outputsMetadata": [{"id": "0", "attrs": _pairs(output)}],
        "style": {"backgroundColor": colours[str(row.config.splits)]},
    }


def _ms(value: float) -> str:
    return f"{seconds(value)} ms"


def _pairs(values: dict[str, str]) -> list[Data]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _moved(edges: Sequence[Data]) -> Data:
    """The edges that move bytes, as an overlay."""
    return {
        "type": "edge_overlays",
        "name": "jaxlwp",
        "overlays": [
            {
                "name": "moved between devices",
                "edgeColor": "#b3261e",
                "edges": [
                    {
                        "sourceNodeId": str(edge["source"]),
                        "targetNodeId": str(edge["target"]),
                        "label": num_bytes(edge["bytes"]),
                    }
                    for edge in edges
                    if edge["bytes"]
                ],
            }
        ],
    }
