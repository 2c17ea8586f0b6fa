"""Spaces too large to price whole: hundreds of devices, several link levels.

A layer on 4096 devices in three link levels has a million configs, and an edge their square. Here
the space grows around the optimum instead. It begins with configs that split one dimension over
each link level. It is priced and searched exactly; then every layer gets the configs that are a
move of mesh axes away from its own config in the optimum, and from those of its neighbours in the
graph, the ones that cost least on their own. That is repeated until the optimum changes no more.

The result is a `SearchSpace` like any other: exactly the best of what was looked at. What the rest
of the whole space might hold is bounded from below (`SearchSpace.floor_s`), so that the gap is
stated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxlwp._progress import Progress
from jaxlwp.cost import AnalyticCostModel, SearchSpace, price
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.optimize._floor import floor_s
from jaxlwp.optimize._objective import Objective
from jaxlwp.optimize._search import search
from jaxlwp.solver import DenseGraphError, MemoryLimitError, min_marginals
from jaxlwp.space import DIMENSIONS, Config, Constraints

MOST_CONFIGS = 24
"""Configs of a layer that a round keeps."""

ROUNDS = 8
"""Most rounds."""

_WORK_LIMIT = 1e10
"""For the search of one round: some ten seconds."""

_GAIN = 1e-4
"""A round that saves less, relatively, is the last."""


WHOLE_CONFIGS = 130
"""Configs of a convolution up to which a space is priced whole: 16 devices, 2 hosts of 4; in three
dimensions, 8 devices."""

WHOLE_PAIRS = 1_000_000
"""Pairs of configs on all edges up to which a space is priced whole in any case."""


def is_large(graph: ComputationGraph, devices: DeviceGraph) -> bool:
    """Whether pricing the whole space would take long: minutes for a deep network."""
    most = max((len(layer.dimensions) for layer in graph.layers), default=0)
    counts = (math.comb(len(group) + most, most) for group in devices.axis_groups)
    configs = math.prod(counts)
    return configs > WHOLE_CONFIGS and configs**2 * len(graph.edges) > WHOLE_PAIRS


def price_around(
    graph: ComputationGraph,
    devices: DeviceGraph,
    *,
    constraints: Constraints | None = None,
    objective: str | Objective = "sum",
    memory_bytes: float | None = None,
    optimizer_slots: float = 1.0,
    most_configs: int = MOST_CONFIGS,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> SearchSpace:
    """Price the part of a large space that is around its optimum.

    Args:
      graph: from `trace`.
      devices: mesh axes and rates.
      constraints: what every strategy of the space must keep to.
      objective: as for `search`.
      memory_bytes: as for `search`.
      optimizer_slots: as for `price`.
      most_configs: how many configs of a layer are kept in each round.
      rounds: how many rounds at most; 1 for the configs to begin with, which baselines use.
      progress: called as `progress(what, done, total)`.

    Raises:
      ValueError: as `price`.
    """
    growth = _Growth(graph, devices, constraints, optimizer_slots, most_configs)
    candidates = [growth.possible(layer, growth.seeds()) for layer in graph.layers]
    best = math.inf
    for number in range(rounds):
        if progress is not None:
            progress("searching around the optimum", number, rounds)
        space = growth.priced(growth.cheapest(candidates))
        if number == rounds - 1:
            break
        try:
            found = search(
                space,
                objective=objective,
                memory_bytes=memory_bytes,
                optimizer_slots=optimizer_slots,
                work_limit=_WORK_LIMIT,
            )
            choices, value = found.solution.choices, found.value
        except MemoryLimitError as error:  # what takes least leads to what fits
            choices, value = error.choices, math.inf
        gained = value == math.inf or best - value > _GAIN * value
        best = min(best, value)
        if not gained and number > 1:
            break
        candidates = growth.around(space, choices)
    return replace(space, whole=False, floor_s=floor_s(graph, growth.model))


@dataclass
class _Growth:
    """What all rounds share: the model, and what layers cost under configs met before."""

    graph: ComputationGraph
    devices: DeviceGraph
    constraints: Constraints | None
    optimizer_slots: float
    most_configs: int
    costs: dict[str, dict[Config, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = AnalyticCostModel.of(self.graph, self.devices, self.optimizer_slots)
        self.keys = [
            f"{layer.key} {self.model.kernels[layer.index : layer.index + 1]}"
            for layer in self.graph.layers
        ]
        self.near: list[set[int]] = [set() for _ in self.graph.layers]
        for edge in self.graph.edges:
            self.near[edge.source].add(edge.target)
            self.near[edge.target].add(edge.source)
        self.names = [
            name
            for name in DIMENSIONS
            if any(name in layer.dimensions for layer in self.graph.layers)
        ]

    def seeds(self) -> list[Config]:
        """Every link level's axes on one dimension, or on none."""
        groups = self.devices.axis_groups
        return [
            Config.of(_joined(zip(choice, groups, strict=True)))
            for choice in itertools.product((None, *self.names), repeat=len(groups))
        ]

    def possible(self, layer: Layer, patterns: Iterable[Config]) -> list[Config]:
        """The patterns as far as a layer can have them, and what it is pinned to."""
        sizes = self.devices.axis_sizes
        if self.constraints is not None:
            groups = self.devices.axis_groups
            pinned = self.constraints.pinned(self.graph, layer, groups, sizes)
            patterns = (*patterns, *pinned)
        found = (p.within(layer.dimensions, layer.even, sizes) for p in patterns)
        return list(dict.fromkeys(found))

    def own_s(self, number: int, configs: Sequence[Config]) -> list[float]:
        """Seconds of a layer alone under each config."""
        known = self.costs.setdefault(self.keys[number], {})
        new = [config for config in configs if config not in known]
        if new:
            costs = self.model.layer(self.graph.layers[number], new)
            total = costs.compute_s + costs.exchange_s + costs.sync_s + costs.overhead_s
            known.update(zip(new, total.tolist(), strict=True))
        return [known[config] for config in configs]

    def cheapest(self, candidates: Sequence[Sequence[Config]]) -> list[tuple[Config, ...]]:
        """The configs of each layer that cost least on their own, and those of the baselines."""
        result = []
        if self.constraints is not None:
            sizes = self.devices.axis_sizes
            candidates = self.constraints.apply(self.graph, candidates, sizes)
        for number, (layer, configs) in enumerate(zip(self.graph.layers, candidates, strict=True)):
            own = self.own_s(number, configs)
            order = sorted(range(len(configs)), key=own.__getitem__)
            kept = [configs[n] for n in order[: self.most_configs]]
            result.append(tuple(dict.fromkeys((*kept, *self.baselines(layer)))))
        return result

    def baselines(self, layer: Layer) -> list[Config]:
        """What the baselines need: one dimension over all axes, and none."""
        axes = tuple(axis for group in self.devices.axis_groups for axis in group)
        return self.possible(layer, [Config(), *(Config.of({d: axes}) for d in self.names)])

    def priced(self, configs: Sequence[tuple[Config, ...]]) -> SearchSpace:
        """The space of these configs."""
        return price(
            self.graph,
            self.devices,
            model=self.model,
            constraints=self.constraints,
            configs=configs,
        )

    def around(self, space: SearchSpace, choices: Sequence[int]) -> list[list[Config]]:
        """Configs to look at next: near those of the optimum, and those good in some strategy."""
        tables = space.tables
        try:
            best_s = min_marginals(tables.node_costs_s, tables.edges, tables.transfer_s)
        except DenseGraphError:  # the next best sign of a good config: what it costs alone
            best_s = tables.node_costs_s
        chosen = [known[c] for known, c in zip(space.configs, choices, strict=True)]
        moved: dict[Config, list[Config]] = {
            config: list(self.moves(config)) for config in dict.fromkeys(chosen)
        }
        result = []
        for number, layer in enumerate(self.graph.layers):
            order = np.argsort(best_s[number], kind="stable")[: self.most_configs // 2]
            patterns = [space.configs[number][n] for n in order]
            for config in dict.fromkeys(chosen[n] for n in (number, *sorted(self.near[number]))):
                patterns += [config, *moved[config]]
            result.append(self.possible(layer, patterns))
        return result

    def moves(self, config: Config) -> Iterator[Config]:
        """Configs in which some axes of one link level split another dimension, or none."""
        places = (None, *self.names)
        groups = [list(group) for group in self.devices.axis_groups]
        counts = [
            [sum(axis in group for axis in config.axes(name)) for name in self.names]
            for group in groups
        ]
        for g, group in enumerate(groups):
            spare = len(group) - sum(counts[g])
            have: dict[str | None, int] = dict(zip(self.names, counts[g], strict=True))
            have[None] = spare
            for source, target in itertools.permutations(places, 2):
                for number in sorted({1, have[source] // 2, have[source]} - {0}):
                    if number > have[source]:
                        continue
                    new = [list(c) for c in counts]
                    for name, change in ((source, -number), (target, number)):
                        if name is not None:
                            new[g][self.names.index(name)] += change
                    yield Config.of(
                        _joined(
                            (name, axes)
                            for row, axes_of in zip(new, groups, strict=True)
                            for name, axes in _handed_out(self.names, row, axes_of)
                        )
                    )


def _handed_out(
    names: Sequence[str], counts: Sequence[int], group: Sequence[str]
) -> Iterator[tuple[str, Sequence[str]]]:
    """The axes of a group in order, so many to each dimension."""
    start = 0
    for name, count in zip(names, counts, strict=True):
        yield name, group[start : start + count]
        start += count


def _joined(parts: Iterable[tuple[str | None, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """Axes by dimension, slowest level first."""
    result: dict[str, tuple[str, ...]] = {}
    for name, axes in parts:
        if name is not None:
            result[name] = (*result.get(name, ()), *axes)
    return result
