"""Search: the strategy of least cost over the whole space, by exact elimination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxlwp._config import Config
from jaxlwp._cost import AnalyticCostModel, CostModel, build_tables, layer_configs, temporary_bytes
from jaxlwp._devices import DeviceGraph
from jaxlwp._graph import ComputationGraph
from jaxlwp._solve import Solution, solve
from jaxlwp._strategy import Strategy, baseline, make_strategy
from jaxlwp._tables import Cost, CostTables


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Every strategy of a graph on given devices, priced.

    Attributes:
      graph: the computation graph.
      devices: the device graph.
      configs: the configs of each layer.
      tables: their costs.
    """

    graph: ComputationGraph
    devices: DeviceGraph
    configs: tuple[tuple[Config, ...], ...] = field(repr=False)
    tables: CostTables = field(repr=False)

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

    def baseline(self, name: str) -> Strategy:
        """A baseline strategy; see `jaxlwp.BASELINES`.

        Raises:
          ValueError: an unknown name, or a batch that the devices do not divide.
        """
        return baseline(name, self.graph, self.configs, self.devices.axis_sizes)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The strategy found, and the proof.

    Attributes:
      strategy: the strategy.
      cost: its predicted cost.
      solution: choices, lower bound, and the statistics of the search.
      space: what was searched.
    """

    strategy: Strategy
    cost: Cost
    solution: Solution = field(repr=False)
    space: SearchSpace = field(repr=False)

    @property
    def optimal(self) -> bool:
        """Nothing in the space costs less."""
        return self.solution.optimal

    @property
    def gap(self) -> float:
        """Relative distance between the cost and its proven lower bound; 0 if optimal."""
        return self.solution.gap


def price(
    graph: ComputationGraph,
    devices: DeviceGraph,
    *,
    model: CostModel | None = None,
    interchangeable: bool = True,
    fixed: Mapping[str, Config] | None = None,
) -> SearchSpace:
    """Enumerate and price every config of every layer and edge.

    Args:
      graph: from `trace`.
      devices: mesh axes and rates.
      model: answers the two cost questions; analytic times from the devices' rates by default.
      interchangeable: mesh axes of one link level are used in one fixed order; False enumerates
        every assignment of axes.
      fixed: layer name -> the only config that it may have, as far as the layer can have it.
    """
    configs = layer_configs(graph, devices, interchangeable=interchangeable)
    if fixed:
        configs = tuple(
            (fixed[layer.name].within(layer.dimensions, layer.even, devices.axis_sizes),)
            if layer.name in fixed
            else choices
            for layer, choices in zip(graph.layers, configs, strict=True)
        )
    model = model or AnalyticCostModel(
        devices=devices, temporary_bytes=temporary_bytes(graph, devices.num_devices)
    )
    tables = build_tables(graph, configs, model)
    return SearchSpace(graph=graph, devices=devices, configs=configs, tables=tables)


def search(space: SearchSpace, *, method: str = "elimination") -> SearchResult:
    """Find the strategy of least predicted cost.

    Args:
      space: from `price`.
      method: "elimination" (exact, fast) or "exhaustive" (the paper's baseline).

    Raises:
      ValueError: the graph does not reduce to few enough layers, or the space is too large for
        "exhaustive", or every strategy has an infinite cost.
    """
    tables = space.tables
    solution = solve(tables.node_costs_s, tables.edges, tables.transfer_s, method=method)
    strategy = space.strategy("search", solution.choices)
    return SearchResult(
        strategy=strategy,
        cost=tables.evaluate(solution.choices),
        solution=solution,
        space=space,
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
