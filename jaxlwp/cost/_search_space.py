"""The search space: every config of every layer, priced; strategies as indices into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlwp.cost._model import AnalyticCostModel, CostModel
from jaxlwp.cost._tables import build_tables, layer_configs
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.solver import Cost, CostTables, FloatArray
from jaxlwp.space import Config, Constraints, Strategy, baseline, make_strategy


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Every strategy of a graph on given devices, priced.

    Attributes:
      graph: the computation graph.
      devices: the device graph.
      configs: the configs of each layer.
      tables: their costs.
      model: what they were priced with; None for tables of another origin.
      measured: for each layer, shape (configs,), whether `tables.compute_s` is measured; empty if
        all times are analytic.
      analytic_s: for each layer, shape (configs,), the analytic times that measured ones replaced.
      constraints: what every strategy of the space keeps to.
      whole: whether every config of every layer is in it, or only some (`price_around`).
      floor_s: if it is not whole, what no strategy of the whole space is priced below (with
        analytic times), in seconds of a step.
    """

    graph: ComputationGraph
    devices: DeviceGraph
    configs: tuple[tuple[Config, ...], ...] = field(repr=False)
    tables: CostTables = field(repr=False)
    model: CostModel | None = field(default=None, repr=False)
    measured: tuple[NDArray[np.bool_], ...] = field(default=(), repr=False)
    analytic_s: tuple[FloatArray, ...] = field(default=(), repr=False)
    constraints: Constraints | None = field(default=None, repr=False)
    whole: bool = True
    floor_s: float = field(default=0.0, repr=False)

    @property
    def num_measured(self) -> int:
        """How many (layer, config) pairs have a measured time."""
        return sum(int(mask.sum()) for mask in self.measured)

    @property
    def num_pairs(self) -> int:
        """How many (layer, config) pairs there are."""
        return sum(map(len, self.configs))

    def choices(self, strategy: Strategy) -> tuple[int, ...]:
        """Index of each layer's config.

        Raises:
          ValueError: the strategy is for another model or mesh, or uses a config outside the
            space.
        """
        check_mesh(strategy, self.devices.axis_sizes)
        result = []
        configs = strategy.for_graph(self.graph)
        for layer, config, known in zip(self.graph.layers, configs, self.configs, strict=True):
            if config not in known:
                text = config.describe(self.devices.axis_sizes)
                raise ValueError(
                    f"Strategy {strategy.name!r}: layer {layer.name} has config {text}, which is "
                    f"not among its {len(known)} allowed configs: a split may not exceed a "
                    "dimension's size, and mesh axes are used in the order of the mesh"
                )
            result.append(known.index(config))
        return tuple(result)

    def evaluate(self, strategy: Strategy) -> Cost:
        """Predicted seconds of one training step, decomposed.

        Raises:
          ValueError: as `choices`.
        """
        return self.tables.evaluate(self.choices(strategy))

    def strategy(self, name: str, choices: Sequence[int]) -> Strategy:
        """A strategy from config indices."""
        configs = [known[i] for known, i in zip(self.configs, choices, strict=True)]
        return make_strategy(name, self.graph, configs, self.devices.axis_sizes)

    def pairs(self, strategy: Strategy) -> list[tuple[Layer, Config]]:
        """Every layer with its config under a strategy, what a `Timer` measures."""
        return list(zip(self.graph.layers, strategy.for_graph(self.graph), strict=True))

    def baseline(self, name: str) -> Strategy:
        """A baseline strategy; see `jaxlwp.BASELINES`.

        Raises:
          ValueError: an unknown name, or a batch that the devices do not divide.
        """
        return baseline(name, self.graph, self.configs, self.devices.axis_sizes)


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


def restrict(space: SearchSpace, constraints: Constraints) -> SearchSpace:
    """The part of a space that keeps to constraints, with the prices that it has.

    Args:
      space: from `price`.
      constraints: what is left must keep to them, and to those of the space.

    Raises:
      ValueError: constraints that name nothing, that leave a layer without a config, or that pin a
        layer to a config outside the space.
    """
    configs = constraints.apply(space.graph, space.configs, space.devices.axis_sizes)
    numbers = []
    for layer, known, kept in zip(space.graph.layers, space.configs, configs, strict=True):
        place = {config: n for n, config in enumerate(known)}
        if not all(config in place for config in kept):
            text = "; ".join(config.describe(space.devices.axis_sizes) for config in kept)
            raise ValueError(
                f"constraints: layer {layer.name} is pinned to {text}, which is not in the space; "
                "give the constraints to price, in place of restrict"
            )
        numbers.append(np.array([place[config] for config in kept]))

    def part(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        return tuple(array[n] for array, n in zip(arrays, numbers, strict=True)) if arrays else ()

    tables = space.tables
    return replace(
        space,
        configs=configs,
        constraints=constraints,
        measured=part(space.measured),
        analytic_s=part(space.analytic_s),
        tables=replace(
            tables,
            compute_s=part(tables.compute_s),
            sync_s=part(tables.sync_s),
            exchange_s=part(tables.exchange_s),
            overhead_s=part(tables.overhead_s),
            transfer_s=tuple(
                table[np.ix_(numbers[i], numbers[j])]
                for (i, j), table in zip(tables.edges, tables.transfer_s, strict=True)
            ),
        ),
    )


def check_mesh(strategy: Strategy, axis_sizes: dict[str, int]) -> None:
    """Check that a strategy is for the mesh at hand.

    Raises:
      ValueError: its mesh axes differ.
    """
    if strategy.axis_sizes != axis_sizes:
        raise ValueError(
            f"Strategy {strategy.name!r} is for mesh axes {strategy.axis_sizes}, the devices have "
            f"{axis_sizes}; search again, or give the mesh that it was made for"
        )
