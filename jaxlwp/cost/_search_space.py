"""The search space: a graph, the configs of its layers, and their costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlwp.cost._model import AnalyticCostModel, CostModel
from jaxlwp.cost._problem import Problem
from jaxlwp.cost._tables import MovedTables, build_tables, layer_configs, moved_tables
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.memory import MemoryTables, memory_costs
from jaxlwp.space import Config, Constraints, Strategy


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchSpace(Problem):
    """A priced problem with the program that it is of: it can be measured, bound and run.

    Attributes:
      graph: the computation graph.
      model: what the tables were priced with; None for tables of another origin.
    """

    graph: ComputationGraph
    model: CostModel | None = None

    @functools.cached_property
    def _memory(self) -> MemoryTables:
        return memory_costs(self.graph, self.configs, self.devices.axis_sizes)

    def memory_tables(self, optimizer_slots: float = 1.0) -> MemoryTables:
        """See `Problem`; found when it is first asked for, which takes as long as tracing."""
        return self._memory.for_optimizer(optimizer_slots)

    def moved_tables(self) -> MovedTables:
        """See `Problem`; found when it is asked for."""
        return moved_tables(self.graph, self.configs, self.devices)

    def pairs(self, strategy: Strategy) -> list[tuple[Layer, Config]]:
        """Every layer with its config under a strategy, what a `Timer` measures."""
        return list(zip(self.graph.layers, strategy.for_graph(self.graph), strict=True))


def need_program(place: str, space: Problem) -> SearchSpace:
    """The space, where its program is needed.

    Args:
      place: what needs it, for the message.
      space: any problem.

    Raises:
      ValueError: it is a saved problem, which has none.
    """
    if not isinstance(space, SearchSpace):
        raise ValueError(
            f"{place}: a saved problem has costs and no program, so nothing of it can be measured, "
            "lowered or run; trace the function again, and give the space that price returns (a "
            "strategy found in the saved problem is good there: parallelize(strategy=...))"
        )
    return space


def price(
    graph: ComputationGraph,
    devices: DeviceGraph,
    *,
    model: CostModel | None = None,
    interchangeable: bool = True,
    constraints: Constraints | None = None,
    configs: Sequence[Sequence[Config]] | None = None,
    optimizer_slots: float = 1.0,
) -> SearchSpace:
    """Enumerate and price every config of every layer and edge.

    Args:
      graph: from `trace`.
      devices: mesh axes and rates.
      model: answers the two cost questions, `PaperCostModel` or one's own for instance; analytic
        times from the devices' rates by default.
      interchangeable: mesh axes of one link level are used in one fixed order; False enumerates
        every assignment of axes.
      constraints: what every strategy of the space must keep to.
      configs: the configs of each layer, in place of all that it can have.
      optimizer_slots: arrays like the parameters that the optimizer keeps: 1 for SGD with
        momentum, 2 for Adam. Of no use with a `model`.

    Raises:
      ValueError: constraints that name nothing, or that leave a layer without a config.
    """
    if configs is None:
        configs = layer_configs(graph.layers, devices, interchangeable=interchangeable)
    if constraints:
        configs = constraints.apply(graph, configs, devices.axis_sizes)
    configs = tuple(map(tuple, configs))
    model = model or AnalyticCostModel.of(graph, devices, optimizer_slots)
    tables = build_tables(graph, configs, model)
    return SearchSpace(
        graph=graph,
        devices=devices,
        configs=configs,
        tables=tables,
        model=model,
        constraints=constraints,
    )
