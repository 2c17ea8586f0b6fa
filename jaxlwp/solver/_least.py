"""The least bytes that any strategy takes, on numbers alone: no layers, no devices, no JAX.

What is there at a step's peak is the larger of two sums, but for the largest temporary (`Bytes`).
Given a range in which the largest temporary lies, it is bounded by two plain sums: with the range's
lower end in place of the temporary, over the configs that stay below its upper end. The largest of
two sums is what `_minmax` makes least; its strategies are candidates. Ranges whose bound is below
the best candidate are halved.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlwp.solver._minmax import Rows, explore
from jaxlwp.solver._problem import Problem
from jaxlwp.solver._tables import FloatArray

_CLOSE = 1e-9
"""Relative distance at which a bound meets the best strategy: rounding."""


@dataclass(frozen=True)
class Bytes:
    """Sums that the limit applies to: per layer, shape (configs,).

    `copied` is per edge (i, j), shape (configs of i, configs of j).
    """

    with_kept: tuple[FloatArray, ...]
    with_gradient: tuple[FloatArray, ...]
    temporary: tuple[FloatArray, ...]
    edges: tuple[tuple[int, int], ...]
    copied: tuple[FloatArray, ...]

    def sums(self, choices: Sequence[int]) -> tuple[float, float, float]:
        """Held, kept and copied; held and gradients; largest temporary."""
        kept = math.fsum(
            itertools.chain(
                (b[c] for b, c in zip(self.with_kept, choices, strict=True)),
                (
                    table[choices[i], choices[j]]
                    for (i, j), table in zip(self.edges, self.copied, strict=True)
                ),
            )
        )
        gradient = math.fsum(b[c] for b, c in zip(self.with_gradient, choices, strict=True))
        return kept, gradient, max(b[c] for b, c in zip(self.temporary, choices, strict=True))

    def peak(self, choices: Sequence[int]) -> float:
        """Bytes of a strategy."""
        kept, gradient, temporary = self.sums(choices)
        return float(max(kept + temporary, gradient))


@dataclass(frozen=True, kw_only=True)
class Least:
    """The strategy of least bytes that was found.

    Attributes:
      choices: the strategy.
      peak_bytes: what it takes.
      lower_bound_bytes: no strategy takes less; the same if that is proven.
      work: what the search took, in the units of `Solution.work`.
    """

    choices: tuple[int, ...]
    peak_bytes: float
    lower_bound_bytes: float
    work: int

    @property
    def proven(self) -> bool:
        """No strategy takes less, to rounding."""
        return self.lower_bound_bytes == self.peak_bytes


@dataclass(frozen=True, order=True)
class _Range:
    """Bounds what strategies take whose largest temporary is in a range.

    Attributes:
      lower: none takes less bytes.
      low: the least of them, as a position among all temporaries' sizes.
      high: the largest of them.
      met: where the temporary of the strategy lies that the bound is of.
    """

    lower: float
    low: int
    high: int
    met: int


def least_bytes(
    problem: Problem,
    bytes_: Bytes,
    *,
    time_limit_s: float = math.inf,
    work_limit: float = math.inf,
) -> Least:
    """Finds the allowed strategy that takes the least bytes, whatever it costs.

    Args:
      problem: costs; those that are infinite are not allowed.
      bytes_: of its layers and edges.
      time_limit_s: after so many seconds the best strategy so far is returned, with its bound; one
        is always looked for.
      work_limit: the same after so much work, in the units of `Solution.work`.

    Raises:
      ValueError: no strategy is allowed.
    """
    search = _Search(problem, bytes_, time.perf_counter() + time_limit_s, work_limit)
    ranges = [search.whole]
    queue: list[_Range] = []
    while True:
        for low, high in ranges:
            bounded = search.bound(low, high)
            if bounded is not None and bounded.lower < search.best * (1 - _CLOSE):
                heapq.heappush(queue, bounded)
        if search.best == math.inf:
            raise ValueError(
                "no strategy is allowed: every one has an infinite cost, whatever memory it takes; "
                "allow more configs, or more pairs of configs on the edges"
            )
        least = min(queue, default=None)
        if least is None or least.lower >= search.best * (1 - _CLOSE):
            lower = search.best
            break
        if search.ended or least.met <= least.low:  # nothing to halve: its two sums are not solved
            lower = least.lower
            break
        heapq.heappop(queue)
        middle = (least.low + least.met + 1) // 2
        ranges = [(least.low, middle - 1), (middle, least.high)]
    return Least(
        choices=search.choices,
        peak_bytes=search.best,
        lower_bound_bytes=lower,
        work=search.work,
    )


class _Search:
    """The best strategy so far, and how to bound a range of largest temporaries."""

    def __init__(self, problem: Problem, bytes_: Bytes, deadline: float, work_limit: float) -> None:
        self.problem, self.bytes = problem, bytes_
        self.deadline, self.work_limit = deadline, work_limit
        self.levels = np.unique(np.concatenate(bytes_.temporary))
        self.choices: tuple[int, ...] = ()
        self.best = math.inf
        self.work = 0

    @property
    def whole(self) -> tuple[int, int]:
        """All that the largest temporary may be, as positions among the sizes."""
        allowed = zip(self.bytes.temporary, self.problem.node_costs, strict=True)
        least = max(float(t[costs < math.inf].min()) for t, costs in allowed)
        return int(np.searchsorted(self.levels, least)), len(self.levels) - 1

    @property
    def ended(self) -> bool:
        """The search has taken what it may take."""
        return self.work > self.work_limit or time.perf_counter() > self.deadline

    def bound(self, low: int, high: int) -> _Range | None:
        """Bound a range, and keep the strategy that was met; None if nothing better is in it."""
        names = [
            np.flatnonzero((t <= self.levels[high]) & (costs < math.inf))
            for t, costs in zip(self.bytes.temporary, self.problem.node_costs, strict=True)
        ]
        if not all(n.size for n in names):
            return None
        # The first search has to come to some strategy.
        left_s, left = self.deadline - time.perf_counter(), self.work_limit - self.work
        found = explore(
            self._rows(names, float(self.levels[low])),
            below=self.best,
            time_limit_s=max(left_s, 0.0) if left_s < math.inf else None,
            work_limit=max(left, 0.0) if left < math.inf else None,
        )
        self.work += found.work
        if not found.choices:
            return _Range(found.lower, low, high, low) if found.lower < self.best else None
        choices = tuple(int(n[c]) for n, c in zip(names, found.choices, strict=True))
        peak = self.bytes.peak(choices)
        if peak < self.best:
            self.best, self.choices = peak, choices
        met = int(np.searchsorted(self.levels, self.bytes.sums(choices)[2]))
        return _Range(found.lower, low, high, met)

    def _rows(self, names: Sequence[np.ndarray], temporary: float) -> Rows:
        """The two sums over some configs of each layer, a temporary added to the first."""
        kept, gradient = (
            [array[n] for array, n in zip(arrays, names, strict=True)]
            for arrays in (self.bytes.with_kept, self.bytes.with_gradient)
        )
        kept[0] = kept[0] + temporary
        count = len(names)
        return Rows(
            terms=(tuple(kept), tuple(gradient)),
            weights=(
                np.array([np.ones(count), np.zeros(count)]),
                np.array([np.zeros(count), np.ones(count)]),
            ),
            edges=self.problem.edges,
            tables=tuple(
                np.where(costs < math.inf, copied, math.inf)[np.ix_(names[i], names[j])]
                for (i, j), costs, copied in zip(
                    self.problem.edges, self.problem.edge_costs, self.bytes.copied, strict=True
                )
            ),
            scale=np.array([1.0, 0.0]),
        )
