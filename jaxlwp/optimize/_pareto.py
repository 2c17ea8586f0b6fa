"""Time against memory: the fastest strategies for less and less memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from jaxlwp._progress import Progress, progress_of
from jaxlwp.cost import Problem, SearchSpace
from jaxlwp.memory import Memory, strategy_memory
from jaxlwp.optimize._objective import PeakMemory
from jaxlwp.optimize._search import SearchResult, search
from jaxlwp.solver import LimitedSolution


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A strategy that nothing in the space beats in both time and memory, as far as is proven.

    Attributes:
      result: of the search under the limit.
      limit_bytes: the limit.
      estimated_bytes: what the strategy needs of a device, by the sum of its layers' bytes, which
        is what the search keeps below the limit.
      memory: the same by its program, as compiled for GPUs; None of a saved problem, which has no
        program.
    """

    result: SearchResult[Problem]
    limit_bytes: float
    estimated_bytes: float
    memory: Memory | None = field(repr=False)

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return self.result.cost.total_s


@dataclass(frozen=True, kw_only=True)
class ParetoCurve:
    """Strategies by rising time and falling memory; made by `pareto`.

    Attributes:
      points: the strategies, the fastest first.
    """

    points: tuple[ParetoPoint, ...]

    def __str__(self) -> str:
        """A row per strategy."""
        from jaxlwp.report import pareto_table, render

        return render(pareto_table(self))


def pareto(
    space: Problem,
    *,
    points: int = 8,
    optimizer_slots: float = 1.0,
    time_limit_s: float | None = 10.0,
    progress: Progress | None = None,
) -> ParetoCurve:
    """The fastest strategy for each of several memory limits.

    Limits fall by equal ratios, from what the fastest strategy of all needs to the least that any
    needs. Strategies that two limits share appear once.

    Args:
      space: from `price` or `load_problem`, or `SearchResult.space`.
      points: how many limits, at least 2.
      optimizer_slots: of the optimizer, as in `price`.
      time_limit_s: for each search.
      progress: called as `progress(what, done, total)`.

    Raises:
      ValueError: fewer than 2 points, or no strategy is allowed.
    """
    if points < 2:
        raise ValueError(f"points is {points}: give at least 2, the fastest and the smallest")
    peak = PeakMemory(optimizer_slots).rows(space)
    fastest = search(space)
    most = float(peak.sums(fastest.solution.choices).max())
    least = search(
        space, objective=PeakMemory(optimizer_slots), time_limit_s=time_limit_s
    ).solution.cost_s
    found: list[ParetoPoint] = []
    # A limit that a search met is met by its own result: no rounding may push it below.
    limits = np.geomspace(most, least, points) * (1 + 1e-9)
    with progress_of(progress) as report:
        for n, limit in enumerate(limits.tolist()):
            report("searching under memory limits", n, points)
            if found and found[-1].estimated_bytes <= limit:
                continue  # the strategy before fits here too
            result = search(
                space,
                memory_bytes=limit,
                optimizer_slots=optimizer_slots,
                time_limit_s=time_limit_s,
            )
            assert isinstance(result.solution, LimitedSolution)
            found.append(
                ParetoPoint(
                    result=result,
                    limit_bytes=limit,
                    estimated_bytes=result.solution.peak_bytes,
                    memory=_memory(space, result, optimizer_slots),
                )
            )
    return ParetoCurve(points=tuple(found))


def _memory(space: Problem, result: SearchResult[Problem], optimizer_slots: float) -> Memory | None:
    if not isinstance(space, SearchSpace):
        return None
    configs = result.strategy.for_graph(space.graph)
    memory = strategy_memory(space.graph, configs, space.devices.axis_sizes)
    return replace(memory, optimizer_bytes=int(optimizer_slots * memory.parameter_bytes))
