"""Search with measured times that measures no more than it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlwp._progress import Progress
from jaxlwp.cost import SearchSpace, build_tables, need_program
from jaxlwp.graph import Layer
from jaxlwp.optimize._objective import Objective
from jaxlwp.optimize._search import AnySolution, Goal, SearchResult
from jaxlwp.solver import DenseGraphError, FloatArray, min_marginals, solve
from jaxlwp.space import Config


class Timer(Protocol):
    """Measures layers under configs; `jaxlwp.measure.LayerTimer` on the devices at hand."""

    def key(self, layer: Layer, config: Config) -> Hashable:
        """What the time depends on: pairs of one key have one time, and one measurement."""
        ...

    def known_s(self, layer: Layer, config: Config) -> float | None:
        """Measured seconds of forward and backward work, or None."""
        ...

    def measure(
        self,
        pairs: Sequence[tuple[Layer, Config]],
        progress: Progress | None = None,
    ) -> int:
        """Measure what is not known yet; returns how many programs were run."""
        ...

    def confirm(
        self,
        pairs: Sequence[tuple[Layer, Config]],
        progress: Progress | None = None,
    ) -> int:
        """Measure again what is known and not sure; returns how many programs were run.

        The search repeats until none were: in the end every program must be sure.
        """
        ...


OPTIMISM = 0.7
"""What an unmeasured program may take for the search to ask: a share of its analytic time, times
the lowest ratio of measured to analytic time of its layer, where fewer than `KNOWN` are known."""

KNOWN = 4
"""Measured configs of a layer whose lowest ratio is trusted as it is."""

SURE = 0.87
"""The share of its estimate that an unmeasured program may take at most, then."""

TOGETHER = 0.15
"""Share of layers and configs that are measured up to which the search hopes for all others at
once. It is affordable where there are few layers, of many configs."""

AT_MOST = 0.25
"""Share of layers and configs up to which programs are measured that the search does not pick but
hopes for."""

PER_LAYER, LEAST = 3, 20
"""Configs of every layer, and programs in all, that it may measure nevertheless: where there are
few configs, or few programs."""

_FEW = 4
"""Programs that are measured at once, at least: the more, the fewer searches."""


def search_measured(
    space: SearchSpace,
    timer: Timer,
    *,
    tolerance: float = 0.0,
    objective: str | Objective = "sum",
    memory_bytes: float | None = None,
    optimizer_slots: float = 1.0,
    progress: Progress | None = None,
) -> SearchResult[SearchSpace]:
    """Find the strategy of least cost under measured times, measuring what may be part of it.

    What is not measured is estimated from what is. The strategy that is then the cheapest is
    measured, and the search repeated, until it rests on measured times alone. Then every program is
    measured with which some strategy would be cheaper still if it took as little as can be hoped
    (`OPTIMISM`, `SURE`), in all layers that run it at once; those that promise most first, until
    there is none left. While little is measured (`TOGETHER`), so is what would be picked if all
    programs took as little. No more than a quarter is measured for such hopes (`AT_MOST`); what is
    left of them then is the result's gap. (Under a memory limit, or for objectives of several sums,
    only what the search picks is measured.)

    What a search picks was measured too low rather than too high, or it would have picked another.
    So programs of its strategy, and of data parallelism as far as they are measured, are measured
    again, and the search repeated, until it rests on times that are confirmed.

    Args:
      space: from `price`, or with measured times already.
      timer: measures.
      tolerance: share of the cost that a program must promise to save, to measure less.
      objective: as for `search`.
      memory_bytes: as for `search`.
      optimizer_slots: as for `search`.
      progress: called as `progress(what, done, total)`.

    Returns:
      The result; its space holds the measured times, and estimates for the rest.

    Raises:
      ValueError: the timer does not measure what it is asked to, or a saved problem is given.
      MemoryLimitError: nothing fits.
    """
    space = need_program("search_measured", space)
    goal = Goal.of(space, objective, memory_bytes, optimizer_slots)
    while True:
        found = measured_space(space, timer)
        solution, missing = _to_measure(goal, found, timer, tolerance)
        if not missing:
            if timer.confirm(_in_play(space, solution.choices), progress):
                continue
            return goal.result(found, solution)
        pairs = [(space.graph.layers[n], space.configs[n][choice]) for n, choice in missing]
        timer.measure(pairs, progress)
        if all(timer.known_s(layer, config) is None for layer, config in pairs):
            raise ValueError(
                f"search_measured: {type(timer).__name__} was asked to measure layer "
                f"{pairs[0][0].name} and knows no time of it; give a timer that measures, or "
                "use measured_space for what is known"
            )


def _to_measure(
    goal: Goal, space: SearchSpace, timer: Timer, tolerance: float
) -> tuple[AnySolution, list[tuple[int, int]]]:
    """The best strategy so far, and layers and configs to measure for another; none in the end."""
    solution = goal.solve(space)
    picked = enumerate(solution.choices)
    missing = [(n, choice) for n, choice in picked if not space.measured[n][choice]]
    if missing or not goal.plain:
        return solution, missing
    enough_s = solution.cost_s * (1 - tolerance)
    hopes = _hopes(space, timer, solution.cost_s)
    missing = _affordable(space, timer, [hope for hope in hopes if hope.cost_s < enough_s])
    missing = missing or _hoped_together(space, enough_s)
    if hopes and not missing:
        solution = _with_gap(solution, hopes[0].cost_s)
    return solution, missing


def _in_play(space: SearchSpace, choices: Sequence[int]) -> list[tuple[Layer, Config]]:
    """What a strategy and data parallelism run, by layer: of each layer at about the same time."""
    strategies = [space.strategy("search", choices)]
    with contextlib.suppress(ValueError):  # a batch that the devices do not divide
        strategies.append(space.baseline("data"))
    by_layer = zip(*map(space.pairs, strategies), strict=True)
    return [pair for pairs in by_layer for pair in pairs if not pair[0].fused]


@dataclass(frozen=True, order=True)
class _Hope:
    """What a strategy costs if a program that is not measured takes what can be hoped for.

    Attributes:
      cost_s: the cost.
      pairs: layers and configs that run the program.
    """

    cost_s: float
    pairs: list[tuple[int, int]]


def _hopes(space: SearchSpace, timer: Timer, cost_s: float) -> list[_Hope]:
    """The programs that are not measured and may save most, the best first.

    They are few, and of different layers: what these will take tells of the others of their layers.
    One program is thought to be faster than estimated, in all layers that run it (blocks of one
    shape change their splits together or not at all, since every change of layout costs). That
    several are at once is as unlikely as it would be long to find out.
    """
    tables = space.tables
    try:
        best_s = min_marginals(tables.node_costs_s, tables.edges, tables.transfer_s)
    except DenseGraphError:  # what the search picks is measured, no more
        return []
    saved_s = _saved_s(space)
    bounds = [
        (_bound_s(pairs, best_s, saved_s), pairs)
        for pairs in _unmeasured(space, timer, best_s).values()
    ]
    few, hopes = max(_FEW, len(space.configs) // 4), dict[int, _Hope]()
    for bound_s, pairs in sorted(bounds):
        best, layer = sorted(hopes.values())[:few], pairs[0][0]
        worst_s = cost_s if len(best) < few else best[-1].cost_s
        if bound_s >= worst_s:
            break
        if layer in hopes and bound_s >= hopes[layer].cost_s:
            continue
        hope = _Hope(bound_s if len(pairs) == 1 else _cost_with(space, pairs, saved_s), pairs)
        if hope.cost_s < worst_s:
            hopes[layer] = min(hope, hopes.get(layer, hope))
    return sorted(hopes.values())[:few]


def _affordable(space: SearchSpace, timer: Timer, hopes: list[_Hope]) -> list[tuple[int, int]]:
    """A pair of each of the programs that promise most, while few enough are measured."""
    work, layers = _work(space), space.graph.layers
    most = max(AT_MOST * sum(each.size for _, each in work), PER_LAYER * len(work))
    known = [(n, choice) for n, each in work for choice in np.flatnonzero(each)]
    num_pairs = len(known)
    num_programs = len({timer.key(layers[n], space.configs[n][choice]) for n, choice in known})
    pairs = list[tuple[int, int]]()
    for hope in hopes:
        num_pairs, num_programs = num_pairs + len(hope.pairs), num_programs + 1
        if num_pairs > most and num_programs > LEAST:
            break
        pairs.append(hope.pairs[0])
    return pairs


def _work(space: SearchSpace) -> list[tuple[int, NDArray[np.bool_]]]:
    """Layers that can be measured, and which of their configs are; arrays of shape (configs,)."""
    every = zip(space.measured, space.graph.layers, strict=True)
    return [(layer.index, measured) for measured, layer in every if not layer.fused]


def _hoped_together(space: SearchSpace, enough_s: float) -> list[tuple[int, int]]:
    """What is not measured of the cheapest strategy if every program saves what it may.

    Nothing, if it saves too little, or if much is measured already (`TOGETHER`).
    """
    work = [measured for _, measured in _work(space)]
    if sum(each.sum() for each in work) > TOGETHER * sum(each.size for each in work):
        return []
    tables = space.tables
    every = zip(tables.node_costs_s, _saved_s(space), space.measured, strict=True)
    costs_s = [costs - np.where(measured, 0.0, saved) for costs, saved, measured in every]
    solution = solve(costs_s, tables.edges, tables.transfer_s)
    if solution.cost_s >= enough_s:
        return []
    chosen = enumerate(solution.choices)
    return [(n, choice) for n, choice in chosen if not space.measured[n][choice]]


def _unmeasured(
    space: SearchSpace, timer: Timer, best_s: Sequence[FloatArray]
) -> dict[Hashable, list[tuple[int, int]]]:
    """Layers and configs of every program that is not measured, as far as they are allowed."""
    programs: dict[Hashable, list[tuple[int, int]]] = {}
    for n, measured in enumerate(space.measured):
        for choice in np.flatnonzero(~measured & np.isfinite(best_s[n])):
            key = timer.key(space.graph.layers[n], space.configs[n][choice])
            programs.setdefault(key, []).append((n, int(choice)))
    return programs


def _bound_s(
    pairs: Sequence[tuple[int, int]],
    best_s: Sequence[FloatArray],
    saved_s: Sequence[FloatArray],
) -> float:
    """A lower bound of the least cost if a program saves what it may; the cost, for one pair."""
    at_most_s: dict[int, float] = {}
    for n, choice in pairs:
        at_most_s[n] = max(at_most_s.get(n, 0.0), float(saved_s[n][choice]))
    return min(float(best_s[n][choice]) for n, choice in pairs) - sum(at_most_s.values())


def _cost_with(
    space: SearchSpace, pairs: Sequence[tuple[int, int]], saved_s: Sequence[FloatArray]
) -> float:
    """The least cost if all these layers save what they may under these configs."""
    tables = space.tables
    costs_s = [np.array(costs) for costs in tables.node_costs_s]
    for n, choice in pairs:
        costs_s[n][choice] -= saved_s[n][choice]
    return solve(costs_s, tables.edges, tables.transfer_s).cost_s


def _saved_s(space: SearchSpace) -> list[FloatArray]:
    """Seconds that each layer may be hoped to save of its estimate; arrays of shape (configs,)."""
    every = enumerate(space.tables.compute_s)
    return [(1 - _hoped_share(space, n)) * compute_s for n, compute_s in every]


def _hoped_share(space: SearchSpace, layer: int) -> float:
    """Share of its estimate that a program of the layer may be hoped to take."""
    measured = space.measured[layer]
    if not measured.any():
        return OPTIMISM
    ratios = space.tables.compute_s[layer][measured] / space.analytic_s[layer][measured]
    lowest = float(ratios.min() / np.median(ratios))
    return lowest * OPTIMISM if measured.sum() < KNOWN else min(lowest, SURE)


def _with_gap(solution: AnySolution, hoped_s: float) -> AnySolution:
    """The solution with what a program that was not measured might save as its gap."""
    return replace(solution, lower_bound_s=max(0.0, hoped_s), optimal=False)


def measured_space(space: SearchSpace, timer: Timer) -> SearchSpace:
    """The space with measured times where there are any, the others scaled to match them.

    What else depends on how long layers take (`CostModel.behind`) is priced again.

    Args:
      space: from `price`, or with measured times already.
      timer: knows the measured times.
    """
    layers = need_program("measured_space", space).graph.layers
    work = [_Work.of(space, timer, n) for n in range(len(layers))]
    fastest_s = [
        float(each.estimate_s.min())
        for each, layer in zip(work, layers, strict=True)
        if not layer.fused
    ]
    model = space.model.behind(fastest_s) if space.model else None
    tables = space.tables
    if model is not None and model != space.model:
        tables = build_tables(space.graph, space.configs, model)
    return replace(
        space,
        tables=replace(tables, compute_s=tuple(each.estimate_s for each in work)),
        model=model,
        measured=tuple(each.measured for each in work),
        analytic_s=space.analytic_s or space.tables.compute_s,
    )


@dataclass(frozen=True)
class _Work:
    """Times of one layer's work under each of its configs; every array has shape (configs,)."""

    measured: NDArray[np.bool_]
    estimate_s: FloatArray

    @classmethod
    def of(cls, space: SearchSpace, timer: Timer, number: int) -> _Work:
        """Measured times of a layer where there are any, else from its analytic ones."""
        layer, configs = space.graph.layers[number], space.configs[number]
        analytic_s = np.maximum((space.analytic_s or space.tables.compute_s)[number], 1e-9)
        if layer.fused:  # there is nothing to measure alone: passes over memory, as priced
            return cls(np.ones(len(configs), dtype=bool), analytic_s)
        known = [timer.known_s(layer, config) for config in configs]
        measured = np.array([seconds is not None for seconds in known])
        if not measured.any():  # the first guess; what it picks will be measured
            return cls(measured, analytic_s)
        known_s = np.array([seconds or 0.0 for seconds in known])
        ratios = (known_s / analytic_s)[measured]
        return cls(measured, np.where(measured, known_s, float(np.median(ratios)) * analytic_s))
