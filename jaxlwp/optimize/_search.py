"""Search: the strategy of least cost over a space, or of least cost under a memory limit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Generic, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxlwp.cost import AnyProblem, Problem
from jaxlwp.optimize._objective import OBJECTIVES, Objective, PlainSum
from jaxlwp.solver import (
    Cost,
    LayerBytes,
    LimitedSolution,
    MemoryLimitError,
    MinMaxSolution,
    Solution,
    minimize_max,
    solve,
    solve_limited,
)
from jaxlwp.space import Strategy

FORMAT_VERSION = 1

AnySolution = Solution | LimitedSolution | MinMaxSolution
"""What the search under a plain sum, under a memory limit, and of a largest sum gives."""


_Searched = TypeVar("_Searched", bound=Problem, covariant=True)


@dataclass(frozen=True, kw_only=True)
class SearchResult(Generic[_Searched]):
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
    space: _Searched = field(repr=False)
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

        Of `search_measured`, the bound is what one program that was not measured may be hoped to
        make of the cost: not proven.

        In a space that is not whole (`SearchSpace.whole`), the bound is that of the whole space:
        `SearchSpace.floor_s`. It is for plain sums of analytic times; for other objectives, and for
        measured times, nothing is proven of what was not looked at, and the gap is 1.
        """
        if self.space.whole:
            return self.solution.gap
        if self.space.measured or not isinstance(self.objective, PlainSum):
            return 1.0
        return max(0.0, 1 - self.space.floor_s / self.value)

    def to_json(self) -> str:
        """As JSON text.

        Keys: `format_version`, `strategy` (as in strategy files, with what it is predicted to
        take), `value` (of the objective) and its `unit` ("s" or "bytes"), `optimal`, `gap`, and
        `baselines` (name -> predicted seconds by cause).
        """
        content = {
            "format_version": FORMAT_VERSION,
            "strategy": json.loads(self.strategy.to_json()),
            "value": self.value,
            "unit": self.objective.unit,
            "optimal": self.optimal,
            "gap": self.gap,
            "baselines": {
                name: {
                    cause: seconds if math.isfinite(seconds) else None
                    for cause, seconds in other.record.predicted_s.items()
                }
                for name, other in self.space.baselines().items()
            },
        }
        return json.dumps(content, indent=2, allow_nan=False)


def search(
    space: AnyProblem,
    *,
    objective: str | Objective = "sum",
    method: str = "elimination",
    memory_bytes: float | None = None,
    optimizer_slots: float = 1.0,
    time_limit_s: float | None = None,
    work_limit: float | None = None,
) -> SearchResult[AnyProblem]:
    """Find the strategy of least predicted cost.

    Args:
      space: from `price`, or from a file (`jaxlwp.cost.load_problem`).
      objective: what to make least: "sum" (the paper's), "overlap" (gradients synchronised behind
        the backward pass), "bytes" (sent by a device), "memory" (of a device), or an `Objective`.
      method: "elimination" (exact, fast) or "exhaustive" (the paper's baseline).
      memory_bytes: of one device; only strategies that fit count, by `MemoryTables.estimate`,
        the sum of layers' bytes. `parallelize(memory_bytes=...)` also looks at the program.
      optimizer_slots: of the optimizer, for the memory, as in `price`.
      time_limit_s: after so many seconds the best strategy so far is returned, with its gap.
      work_limit: the same after so much work, as for `solve`: the same result on every machine.

    Raises:
      ValueError: the space is too large for "exhaustive", or every strategy has an infinite cost,
        an unknown objective, or a memory limit with another objective or method.
      MemoryLimitError: nothing fits: the least memory, and which layers hold it.
      TimeoutError: a limit ended the search before it found a strategy.
    """
    if memory_bytes is not None and method != "elimination":
        raise ValueError(
            f'method is {method!r}: a search with memory_bytes is by "elimination"; leave one out'
        )
    goal = Goal.of(space, objective, memory_bytes, optimizer_slots)
    solution = goal.solve(space, method=method, time_limit_s=time_limit_s, work_limit=work_limit)
    return goal.result(space, solution)


class _Limits(TypedDict):
    """What ends a search early."""

    time_limit_s: float | None
    work_limit: float | None


@dataclass(frozen=True)
class Goal:
    """What a search makes least, and the memory limit that it keeps, if any."""

    objective: Objective
    limit: _Limit | None

    @classmethod
    def of(
        cls,
        space: Problem,
        objective: str | Objective,
        memory_bytes: float | None,
        optimizer_slots: float,
    ) -> Goal:
        """The goal of a search with these arguments; raises ValueError as `search`."""
        wanted = _objective(objective, memory_bytes)
        return cls(wanted, _Limit.of(space, memory_bytes, optimizer_slots))

    @property
    def plain(self) -> bool:
        """Whether it is the plain sum without a limit, of which there are min-marginals."""
        return self.limit is None and isinstance(self.objective, PlainSum)

    def solve(
        self,
        space: Problem,
        *,
        method: str = "elimination",
        time_limit_s: float | None = None,
        work_limit: float | None = None,
    ) -> AnySolution:
        """The best strategy of a space, whatever of it is measured."""
        limits: _Limits = {"time_limit_s": time_limit_s, "work_limit": work_limit}
        if self.limit is not None:
            return self.limit.solve(space, limits)
        rows = self.objective.rows(space)
        if len(rows.scale) == 1:
            return solve(*rows.only(), method=method, **limits)
        if method != "elimination":
            raise ValueError(
                f'method is {method!r}: objectives of several sums are by "elimination"'
            )
        return minimize_max(rows, **limits)

    def result(self, space: AnyProblem, solution: AnySolution) -> SearchResult[AnyProblem]:
        """The result of a search of the space."""
        return SearchResult(
            strategy=space.strategy("search", solution.choices),
            cost=space.tables.evaluate(solution.choices),
            solution=solution,
            space=space,
            objective=self.objective,
        )


def _objective(objective: str | Objective, memory_bytes: float | None) -> Objective:
    if isinstance(objective, str) or not hasattr(objective, "rows"):
        if objective not in tuple(OBJECTIVES):
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


@dataclass(frozen=True)
class _Limit:
    """A memory limit, and what every config of every layer takes of it."""

    names: tuple[str, ...]
    memory: tuple[LayerBytes, ...]
    copied: tuple[NDArray[np.int64], ...]
    limit_bytes: float

    @classmethod
    def of(
        cls, space: Problem, memory_bytes: float | None, optimizer_slots: float
    ) -> _Limit | None:
        """The limit of a search, if there is one."""
        if memory_bytes is None:
            return None
        if not memory_bytes > 0:
            raise ValueError(f"memory_bytes is {memory_bytes}: give a positive number of bytes")
        costs = space.memory_tables(optimizer_slots)
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

    def solve(self, space: Problem, limits: _Limits) -> LimitedSolution:
        """The best strategy that fits; raises MemoryLimitError as `search`."""
        tables = space.tables
        try:
            return solve_limited(
                tables.node_costs_s,
                tables.edges,
                tables.transfer_s,
                self.memory,
                self.limit_bytes,
                copied=self.copied,
                **limits,
            )
        except MemoryLimitError as error:
            raise self._named(error) from None

    def _named(self, error: MemoryLimitError) -> MemoryLimitError:
        """The error, with the layers that hold most of the least memory."""
        taken = [
            (float(np.asarray(m.held)[c] + np.asarray(m.kept)[c]), name)
            for m, c, name in zip(self.memory, error.choices, self.names, strict=True)
        ]
        most = ", ".join(f"{name} {num_bytes:,.0f}" for num_bytes, name in sorted(taken)[:-4:-1])
        return MemoryLimitError(
            f"{error}. Most of it is held by {most}",
            error.least_bytes,
            error.choices,
            error.lower_bound_bytes,
        )
