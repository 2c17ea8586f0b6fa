"""What plans are shown by, layer by layer: seconds by cause, collectives, memory kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxlwp.cost import Problem, collectives_by_layer
from jaxlwp.solver import Cost
from jaxlwp.space import Collective, Config, Layout, Strategy

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

OUTPUTS = "(outputs)"
"""Stands for the layer of collectives that bring the function's outputs into place."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer of a plan.

    Attributes:
      name: the layer's.
      kind: what it does.
      has_rule: False for an operator that runs whole on every device.
      config: its config.
      output: layout of its last result.
      cost: its predicted seconds, transfers on its incoming edges included.
      collectives: what one device communicates for it in a step, as priced.
      kept_bytes: of a device, for the backward pass; None if the memory was not asked for.
    """

    name: str
    kind: str
    has_rule: bool
    config: Config
    output: Layout
    cost: Cost
    collectives: tuple[Collective, ...]
    kept_bytes: int | None

    @property
    def num_bytes(self) -> int:
        """Operand bytes of one device's collectives."""
        return sum(collective.num_bytes for collective in self.collectives)


def layer_costs(plan: Plan) -> list[Cost]:
    """Predicted seconds of each layer of a plan; see `costs_by_layer`."""
    return costs_by_layer(plan.space, plan.strategy)


def costs_by_layer(space: Problem, strategy: Strategy) -> list[Cost]:
    """Predicted seconds of each layer, transfers on its incoming edges included.

    With what every strategy has of a step (`CostTables.step_s`) they are the strategy's cost.
    """
    tables, choices = space.tables, space.choices(strategy)
    transfer_s = [float(costs[i]) for costs, i in zip(tables.exchange_s, choices, strict=True)]
    for (source, target), costs in zip(tables.edges, tables.transfer_s, strict=True):
        transfer_s[target] += float(costs[choices[source], choices[target]])
    return [
        Cost(
            compute_s=float(compute[i]),
            transfer_s=moved,
            sync_s=float(sync[i]),
            overhead_s=float(besides[i]),
        )
        for compute, moved, sync, besides, i in zip(
            tables.compute_s, transfer_s, tables.sync_s, tables.overhead_s, choices, strict=True
        )
    ]


def layer_rows(plan: Plan, memory: bool = True) -> list[LayerRow]:
    """A row per layer, and one for the outputs if collectives bring them into place.

    Args:
      plan: the plan.
      memory: whether to predict what layers keep, which takes as long as tracing the step.
    """
    configs = plan.strategy.for_graph(plan.graph)
    moved: dict[int | None, list[Collective]] = {}
    for index, collective in collectives_by_layer(
        plan.graph, configs, plan.space.devices.axis_sizes
    ):
        moved.setdefault(index, []).append(collective)
    costs = layer_costs(plan)
    kept = plan.memory.layer_kept_bytes if memory else None
    rows = [
        LayerRow(
            name=layer.name,
            kind=layer.kind,
            has_rule=layer.has_rule,
            config=config,
            output=config.layout(layer.members[-1].signature.results[0]),
            cost=cost,
            collectives=tuple(moved.get(layer.index, ())),
            kept_bytes=kept[layer.index] if kept else None,
        )
        for layer, config, cost in zip(plan.graph.layers, configs, costs, strict=True)
    ]
    return rows + [_outputs(tuple(moved[None]), memory)] if None in moved else rows


def _outputs(collectives: tuple[Collective, ...], memory: bool) -> LayerRow:
    """The row of what no layer reads. Its seconds are not predicted, so they are none."""
    return LayerRow(
        name=OUTPUTS,
        kind="output",
        has_rule=True,
        config=Config(),
        output=(),
        cost=Cost(),
        collectives=collectives,
        kept_bytes=0 if memory else None,
    )
