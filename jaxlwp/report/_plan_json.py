"""A plan as JSON, for scripts: what `jaxlwp plan --json` writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlwp.optimize import Explanation, ParetoCurve
from jaxlwp.report._plan_table import plan_proof
from jaxlwp.report._rows import LayerRow, layer_rows
from jaxlwp.solver import Cost

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

FORMAT_VERSION = 1


def plan_json(
    plan: Plan,
    *,
    model: str,
    batch: int,
    explanation: Explanation | None = None,
    explained: Sequence[str] = (),
    curve: ParetoCurve | None = None,
) -> str:
    """A plan as JSON text; seconds and bytes are those of one device and one step.

    Keys: `format_version`, `model`, `batch`, `devices`, `device_kind`, `mesh` (axis -> size),
    `rates` (where they are from), `proof` ("optimal", or how far from it), `cost` (seconds by
    cause), `memory` (bytes by part, and `peak_bytes`), `layers` (a list: `name`, `kind`, `splits`,
    `config`, `cost`, `collective_bytes`, `kept_bytes`), `strategy` (what `--save` writes); where
    they are asked for `why` (layer -> its configs, the best first) and `curve`.

    Args:
      plan: the plan.
      model: its name.
      batch: examples in the batch.
      explanation: what other configs would cost.
      explained: the layers whose other configs are told.
      curve: time against memory.
    """
    devices = plan.space.devices
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "batch": batch,
        "devices": devices.num_devices,
        "device_kind": devices.device_kind,
        "mesh": devices.axis_sizes,
        "rates": devices.source,
        "proof": plan_proof(plan),
        "cost": _cost(plan.cost),
        "memory": _memory(plan.memory),
        "layers": [_layer(row, devices.axis_sizes) for row in layer_rows(plan, memory=True)],
        "strategy": json.loads(plan.recorded.to_json()),
    }
    if explanation is not None:
        content["why"] = {name: _configs(explanation, name) for name in explained}
    if curve is not None:
        content["curve"] = [
            {
                "seconds": point.seconds,
                "memory": _memory(point.memory),
                "strategy": json.loads(point.result.strategy.to_json()),
            }
            for point in curve.points
        ]
    return json.dumps(content, indent=2, allow_nan=False)


def _cost(cost: Cost) -> dict[str, float | None]:
    """Seconds by cause; None for what is not allowed."""
    parts = ("compute_s", "transfer_s", "sync_s", "overhead_s", "total_s")
    return {part: _finite(getattr(cost, part)) for part in parts}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _memory(memory: Any) -> dict[str, int]:
    parts = dataclasses.asdict(memory)
    del parts["layer_kept_bytes"]
    return {**parts, "peak_bytes": memory.peak_bytes}


def _layer(row: LayerRow, axis_sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "splits": dict(row.config.splits),
        "config": row.config.describe(axis_sizes),
        "cost": _cost(row.cost),
        "collective_bytes": row.num_bytes,
        "kept_bytes": row.kept_bytes,
    }


def _configs(explanation: Explanation, layer: str) -> list[dict[str, Any]]:
    sizes = explanation.space.devices.axis_sizes
    return [
        {
            "config": each.config.describe(sizes),
            "splits": dict(each.config.splits),
            "best_s": _finite(each.best_s),
        }
        for each in explanation.alternatives(layer)
    ]
