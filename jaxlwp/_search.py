"""Search: the strategy of least cost over a space, under a limit, or with measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlwp._config import Config
from jaxlwp._graph import Layer
from jaxlwp._limit import LayerBytes, LimitedSolution, MemoryLimitError, solve_limited
from jaxlwp._marginals import DenseGraphError, min_marginals
from jaxlwp._memory import memory_costs
from jaxlwp._minmax import MinMaxSolution, minimize_max
from jaxlwp._objective import OBJECTIVES, Objective, PlainSum
from jaxlwp._solve import Solution, solve
from jaxlwp._space import SearchSpace
from jaxlwp._strategy import Strategy
from jaxlwp._tables import Cost, FloatArray


class Timer(Protocol):
    """Measures layers under configs; `jaxlwp.LayerTimer` on the devices at hand."""

    def known_s(self, layer: Layer, config: Config) -> float | None:
        """Measured seconds of forward and backward work, or None."""
        ...

    def measure(
        self,
        pairs: Sequence[tuple[Layer, Config]],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> int:
        """Measure what is not known yet; returns how many programs were run."""
        ...


AnySolution = Solution | LimitedSolution | MinMaxSolution
"""What the search under a plain sum, under a memory limit, and of a largest sum gives."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The strategy found, and the proof.

    Attributes:
      strategy: the strategy.
      cost: its predicted cost.
      solution: choices, lower bound, and the statistics of the search; its costs are in the unit of
        the objective, seconds without what every step has (`CostTables.step_s`).
      space: what was searched.
      objective: what was made least.
    """

    strategy: Strategy
    cost: Cost
    solution: AnySolution = field(repr=False)
    space: SearchSpace = field(repr=False)
    objective: Objective = field(default=OBJECTIVES["sum"], repr=False)

    @property
    def value(self) -> float:
        """What the strategy's objective is: seconds of a step, or bytes of a device."""
        step_s = self.space.tables.step_s if self.objective.unit == "s" else 0.0
        return self.solution.cost_s + step_s

    @property
    def optimal(self) -> bool:
        """Nothing in the whole space costs less, as far as layers' times are what they are."""
        return self.gap == 0

    @property
    def gap(self) -> float:
        """Relative distance between the cost and its proven lower bound; 0 if optimal.

        In a space that is not whole (`SearchSpace.whole`), the bound is that of the whole space:
        `SearchSpace.floor_s`. It is for plain sums of analytic times; for other objectives, and for
        measured times, nothing is proven of what was not looked at, and the gap is 1.
        """
        if self.space.whole:
            return self.solution.gap
        if self.space.measured or not isinstance(self.objective, PlainSum):
            return 1.0
        return max(0.0, 1 - self.space.floor_s / self.value)


def search(
    space: SearchSpace,
    *,
    objective: str | Objective = "sum",
    method: str = "elimination",
    memory_bytes: float | None = None,
    optimizer_slots: float = 1.0,
    time_limit_s: float | None = None,
) -> SearchResult:
    """Find the strategy of least predicted cost.

    Args:
      space: from `price`.
      objective: what to make least: "sum" (the paper's), "overlap" (gradients synchronised behind
        the backward pass), "bytes" (sent by a device), "memory" (of a device), or an `Objective`.
      method: "elimination" (exact, fast) or "exhaustive" (the paper's baseline).
      memory_bytes: of one device; only strategies that fit count, by `MemoryTables.estimate`,
        the sum of `memory_costs`. `parallelize(memory_bytes=...)` also looks at the program.
      optimizer_slots: of the optimizer, for the memory, as in `price`.
      time_limit_s: after so many seconds the best strategy so far is returned, with its gap.

    Raises:
      ValueError: the space is too large for "exhaustive", or every strategy has an infinite cost,
        an unknown objective, or a memory limit with another objective or method.
      MemoryLimitError: nothing fits: the least memory, and which layers hold it.
      TimeoutError: the time limit ended the search before it found a strategy.
    """
    if memory_bytes is not None and method != "elimination":
        raise ValueError(
            f'method is {method!r}: a search with memory_bytes is by "elimination"; leave one out'
        )
    wanted = _objective(objective, memory_bytes)
    limit = _Limit.of(space, memory_bytes, optimizer_slots)
    solution = _solved(space, wanted, limit, method=method, time_limit_s=time_limit_s)
    return SearchResult(
        strategy=space.strategy("search", solution.choices),
        cost=space.tables.evaluate(solution.choices),
        solution=solution,
        space=space,
        objective=wanted,
    )


def _objective(objective: str | Objective, memory_bytes: float | None) -> Objective:
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(
                f"objective: {objective!r} is unknown; give one of {', '.join(OBJECTIVES)}, or an "
                "Objective"
            )
        objective = OBJECTIVES[objective]
    if memory_bytes is not None and not isinstance(objective, PlainSum):
        raise ValueError(
            f"objective: {type(objective).__name__} is given with memory_bytes; a memory limit "
            'goes with "sum": leave one out'
        )
    return objective


# --- measuring no more than the search needs -----------------------------------------------------

OPTIMISM = 0.75
"""What an unmeasured config may take, as a share of its estimated time, for the search to ask.

For layers of which `_KNOWN` configs or more are measured, two standard deviations of how measured
and analytic times differ there, within `_SPREAD`.
"""

_KNOWN = 3
_SPREAD = 0.5, 0.9


def search_measured(
    space: SearchSpace,
    timer: Timer,
    *,
    tolerance: float = 0.0,
    objective: str | Objective = "sum",
    memory_bytes: float | None = None,
    optimizer_slots: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> SearchResult:
    """Find the strategy of least cost under measured times, measuring what may be part of it.

    What is not measured is estimated from what is. The strategy that is then the cheapest is
    measured, and the search repeated, until it rests on measured times alone. Then every config is
    measured whose best strategy would be cheaper still if the config took but a share (`OPTIMISM`)
    of its estimate, those that promise most first, until there is none left. (Under a memory limit,
    or for objectives of several sums, only what the search picks is measured.)

    Args:
      space: from `price`, or with measured times already.
      timer: measures.
      tolerance: share of the cost that a config must promise to save, to measure less.
      objective: as for `search`.
      memory_bytes: as for `search`.
      optimizer_slots: as for `search`.
      progress: called as `progress(what, done, total)`.

    Returns:
      The result; its space holds the measured times, and estimates for the rest.

    Raises:
      ValueError: the timer does not measure what it is asked to.
      MemoryLimitError: nothing fits.
    """
    wanted = _objective(objective, memory_bytes)
    limit = _Limit.of(space, memory_bytes, optimizer_slots)
    plain = limit is None and isinstance(wanted, PlainSum)
    while True:
        found = measured_space(space, timer)
        solution = _solved(found, wanted, limit)
        missing = [
            (n, choice)
            for n, choice in enumerate(solution.choices)
            if not found.measured[n][choice]
        ]
        if not missing and plain:
            asked = _promising(found, solution.cost_s)
            enough_s = solution.cost_s * (1 - tolerance)
            few = max(_FEW, len(space.configs) // 2)
            missing = [(n, choice) for hoped_s, n, choice in asked[:few] if hoped_s < enough_s]
            if asked and not missing:
                solution = _hopeful(solution, asked[0][0])
        if not missing:
            break
        pairs = [(space.graph.layers[n], space.configs[n][choice]) for n, choice in missing]
        timer.measure(pairs, progress)
        if all(timer.known_s(layer, config) is None for layer, config in pairs):
            raise ValueError(
                f"search_measured: {type(timer).__name__} was asked to measure layer "
                f"{pairs[0][0].name} and knows no time of it; give a timer that measures, or "
                "use measured_space for what is known"
            )
    return SearchResult(
        strategy=found.strategy("search", solution.choices),
        cost=found.tables.evaluate(solution.choices),
        solution=solution,
        space=found,
        objective=wanted,
    )


_FEW = 4
"""Pairs of layer and config that are measured at once, at least."""


def _promising(space: SearchSpace, cost_s: float) -> list[tuple[float, int, int]]:
    """What is not measured and might be in a cheaper strategy: hoped-for cost, layer, config.

    The best first. Only the time of the one config is thought to be better than estimated: that all
    are at once is as unlikely as it would be long to find out.
    """
    tables = space.tables
    try:
        best_s = min_marginals(tables.node_costs_s, tables.edges, tables.transfer_s)
    except DenseGraphError:  # what the search picks is measured, no more
        return []
    asked = []
    for n, measured in enumerate(space.measured):
        hoped_s = best_s[n] - (1 - _optimism(space, n)) * tables.compute_s[n]
        asked += [
            (float(hoped_s[c]), n, int(c)) for c in np.flatnonzero(~measured & (hoped_s < cost_s))
        ]
    return sorted(asked)


def _optimism(space: SearchSpace, layer: int) -> float:
    """See `OPTIMISM`."""
    measured = space.measured[layer]
    if measured.sum() < _KNOWN:
        return OPTIMISM
    ratios = space.tables.compute_s[layer][measured] / space.analytic_s[layer][measured]
    return float(np.clip(np.exp(-2 * np.std(np.log(ratios))), *_SPREAD))


def _hopeful(solution: AnySolution, hoped_s: float) -> AnySolution:
    """The solution with what a config that was not measured might save as its gap."""
    return replace(solution, lower_bound_s=max(0.0, hoped_s), optimal=False)


@dataclass(frozen=True)
class _Limit:
    """A memory limit, and what every config of every layer takes of it."""

    names: tuple[str, ...]
    memory: tuple[LayerBytes, ...]
    copied: tuple[NDArray[np.int64], ...]
    limit_bytes: float

    @classmethod
    def of(
        cls, space: SearchSpace, memory_bytes: float | None, optimizer_slots: float
    ) -> _Limit | None:
        """The limit of a search, if there is one."""
        if memory_bytes is None:
            return None
        if not memory_bytes > 0:
            raise ValueError(f"memory_bytes is {memory_bytes}: give a positive number of bytes")
        costs = memory_costs(space.graph, space.configs, space.devices.axis_sizes, optimizer_slots)
        memory = tuple(
            LayerBytes(
                held=c.parameter_bytes + c.optimizer_bytes,
                kept=c.kept_bytes,
                gradient=c.gradient_bytes,
                temporary=c.temporary_bytes,
            )
            for c in costs.layers
        )
        names = tuple(layer.name for layer in space.graph.layers)
        return cls(names, memory, costs.copied_bytes, memory_bytes)

    def named(self, error: MemoryLimitError) -> MemoryLimitError:
        """The error, with the layers that hold most of the least memory."""
        taken = [
            (float(np.asarray(m.held)[c] + np.asarray(m.kept)[c]), name)
            for m, c, name in zip(self.memory, error.choices, self.names, strict=True)
        ]
        most = ", ".join(f"{name} {num_bytes:,.0f}" for num_bytes, name in sorted(taken)[:-4:-1])
        return MemoryLimitError(
            f"{error}. Most of it is held by {most}", error.least_bytes, error.choices
        )


def _solved(
    space: SearchSpace,
    objective: Objective,
    limit: _Limit | None,
    *,
    method: str = "elimination",
    time_limit_s: float | None = None,
) -> AnySolution:
    if limit is not None:
        tables = space.tables
        costs = tables.node_costs_s, tables.edges, tables.transfer_s
        try:
            return solve_limited(
                *costs,
                limit.memory,
                limit.limit_bytes,
                copied=limit.copied,
                time_limit_s=time_limit_s,
            )
        except MemoryLimitError as error:
            raise limit.named(error) from None
    rows = objective.rows(space)
    if len(rows.scale) == 1:
        return solve(*rows.only(), method=method, time_limit_s=time_limit_s)
    if method != "elimination":
        raise ValueError(f'method is {method!r}: objectives of several sums are by "elimination"')
    return minimize_max(rows, time_limit_s=time_limit_s)


def measured_space(space: SearchSpace, timer: Timer) -> SearchSpace:
    """The space with measured times where there are any, the others scaled to match them.

    Args:
      space: from `price`, or with measured times already.
      timer: knows the measured times.
    """
    work = [_Work.of(space, timer, n) for n in range(len(space.configs))]
    return replace(
        space,
        tables=replace(space.tables, compute_s=tuple(w.estimate_s for w in work)),
        measured=tuple(w.measured for w in work),
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
