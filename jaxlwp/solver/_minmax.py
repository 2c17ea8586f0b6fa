"""Search for the strategy whose largest of several sums is least, on numbers alone.

Some objectives are no plain sum: a step whose gradient synchronisation hides behind the backward
pass ends when the last of several chains of work ends, and memory is what there is at the worst of
several moments. Each chain, or moment, is a sum with weights of its own (`Rows`).

Branch and bound. A weighted mean of the sums, with weights that add up to one, is never above the
largest: the least mean is one plain search (`solve`), and bounds what every strategy costs
(Lagrangian duality). The weights come from cutting planes (Kelley); the strategies that they meet
are candidates. Configs whose bound is above the best candidate are dropped, and what is left is
split by the layer in which the candidates differ.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlwp.solver._linear import linprog
from jaxlwp.solver._marginals import DenseGraphError, min_marginals
from jaxlwp.solver._problem import BoundedSolution
from jaxlwp.solver._solve import solve
from jaxlwp.solver._tables import FloatArray

_PLANES = 30
"""Most cutting planes of one bound."""

_PARTS = 400
"""Most parts of the space that are bounded, unless a limit is given."""

PROGRAM_WORK = 1_000_000
"""What a linear program of prices or weights takes, in the units of `Solution.work`, about."""

_CLOSE = 1e-9
"""Relative distance at which a bound meets the best strategy: rounding."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Several sums over the same strategy; the largest is what the strategy costs.

    Sum k of choices c is the sum over terms t and layers n of `weights[t][k, n] * terms[t][n][c_n]`
    plus the sum over edges e = (i, j) of `tables[e][c_i, c_j]`.

    Attributes:
      terms: for each term, for each layer, shape (configs,).
      weights: for each term, shape (sums, layers).
      edges: pairs of layers.
      tables: per edge (i, j), shape (configs of i, configs of j), in every sum; zeros are legal.
      scale: of the tables, for each sum, shape (sums,).
    """

    terms: tuple[tuple[FloatArray, ...], ...]
    weights: tuple[FloatArray, ...]
    edges: tuple[tuple[int, int], ...]
    tables: tuple[FloatArray, ...]
    scale: FloatArray

    def sums(self, choices: Sequence[int]) -> FloatArray:
        """Every sum of a strategy."""
        moved = math.fsum(
            table[choices[i], choices[j]]
            for (i, j), table in zip(self.edges, self.tables, strict=True)
        )
        total = self.scale * moved if moved < math.inf else np.full(len(self.scale), math.inf)
        for term, weights in zip(self.terms, self.weights, strict=True):
            chosen = np.array([a[c] for a, c in zip(term, choices, strict=True)])
            if np.isinf(chosen).any():  # not allowed, whatever its weight
                return np.full(len(self.scale), math.inf)
            total = total + weights @ chosen
        return total

    def only(self) -> tuple[list[FloatArray], tuple[tuple[int, int], ...], list[FloatArray]]:
        """Costs of layers, edges and their costs, where there is one sum."""
        nodes, tables = self.mean(np.ones(1), [np.arange(a.size) for a in self.terms[0]])
        return nodes, self.edges, tables

    def mean(
        self, share: FloatArray, names: Sequence[np.ndarray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Costs of layers and edges in a weighted mean of the sums, of some configs only."""
        shares = [share @ weights for weights in self.weights]
        nodes = [
            sum(
                (_scaled(s[n], term[n][kept]) for s, term in zip(shares, self.terms, strict=True)),
                start=np.zeros(len(kept)),
            )
            for n, kept in enumerate(names)
        ]
        scale = float(share @ self.scale)
        tables = [
            _scaled(scale, table[np.ix_(names[i], names[j])])
            for (i, j), table in zip(self.edges, self.tables, strict=True)
        ]
        return nodes, tables


def _scaled(factor: float, costs: FloatArray) -> FloatArray:
    """The costs times a factor; what is not allowed stays so if the factor is 0."""
    return factor * costs if factor else np.where(np.isinf(costs), np.inf, 0.0)


@dataclass(frozen=True, kw_only=True)
class MinMaxSolution(BoundedSolution):
    """The strategy found whose largest sum is least; its cost is that sum.

    Attributes:
      bounded: how many parts of the space were bounded.
    """

    bounded: int


_Names = tuple[np.ndarray, ...]


def minimize_max(
    rows: Rows, *, time_limit_s: float | None = None, work_limit: float | None = None
) -> MinMaxSolution:
    """Finds the choices whose largest sum is least.

    Args:
      rows: the sums.
      time_limit_s: after so many seconds the best strategy so far is returned, with its bound;
        without any limit, the search ends after a fixed number of bounds.
      work_limit: the same after so much work, in the units of `solve`.

    Raises:
      ValueError: no strategy is allowed.
    """
    start = time.perf_counter()
    found = explore(rows, time_limit_s=time_limit_s, work_limit=work_limit)
    if found.best == math.inf:
        raise ValueError("no strategy is allowed: every one has an infinite sum; allow more")
    return MinMaxSolution(
        choices=found.choices,
        cost_s=found.best,
        lower_bound_s=found.lower,
        optimal=found.lower == found.best,
        wall_s=time.perf_counter() - start,
        bounded=found.bounded,
    )


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What is known of strategies whose largest sum is below a given one.

    Attributes:
      choices: the best of them that was met; empty if none was.
      best: its largest sum, or the one given.
      lower: no strategy's largest sum is less; `best` if nothing better is left.
      bounded: how many parts of the space were bounded.
      work: what that took, in the units of `Solution.work`.
    """

    choices: tuple[int, ...]
    best: float
    lower: float
    bounded: int
    work: int


def explore(
    rows: Rows,
    *,
    below: float = math.inf,
    time_limit_s: float | None = None,
    work_limit: float | None = None,
) -> Explored:
    """Searches for the least largest sum, as far as it is below a given one.

    Args:
      rows: the sums.
      below: strategies that do not stay below are of no interest.
      time_limit_s: as for `minimize_max`.
      work_limit: likewise.
    """
    start = time.perf_counter()
    search = _Search(rows, best=below)
    root = tuple(np.arange(array.size) for array in rows.terms[0])
    deadline = start + (math.inf if time_limit_s is None else time_limit_s)
    most_work = math.inf if work_limit is None else work_limit
    most_parts = _PARTS if time_limit_s is None and work_limit is None else math.inf
    queue: list[tuple[float, int, _Names]] = []
    number = itertools.count()
    parts, floor = [root], 0.0
    while True:
        for names in parts:
            lower, left = search.bound(names, floor)
            if left is not None:
                heapq.heappush(queue, (lower, next(number), left))
        best = search.best
        floor = min(queue[0][0], best) if queue else best
        spent = search.bounded >= most_parts or search.work > most_work
        if floor >= best * (1 - _CLOSE) or spent or time.perf_counter() > deadline:
            break
        parts = search.split(heapq.heappop(queue)[2])
    return Explored(
        choices=search.choices,
        best=search.best,
        lower=search.best if floor >= search.best * (1 - _CLOSE) else max(floor, 0.0),
        bounded=search.bounded,
        work=search.work,
    )


@dataclass
class _Search:
    """The best strategy so far, and how to bound a part of the space."""

    rows: Rows
    choices: tuple[int, ...] = ()
    best: float = math.inf
    bounded: int = 0
    work: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def bound(self, names: _Names, floor: float) -> tuple[float, _Names | None]:
        """A lower bound of a part, and the configs left in it: None if nothing better is there."""
        self.bounded += 1
        count = len(self.rows.scale)
        share = np.full(count, 1 / count)
        best_share, lower = share, floor
        planes: list[FloatArray] = []
        for _ in range(_PLANES):
            choices = self._cheapest(share, names)
            if choices is None:
                return math.inf, None
            sums = self.offer(choices)
            value = float(share @ sums)
            if value > lower:
                lower, best_share = value, share
            if lower >= self.best * (1 - _CLOSE):
                return lower, None
            planes.append(sums)
            most, share = _shares(planes)
            if most - lower <= 1e-7 * abs(most):
                break
        left = self._promising(best_share, names)
        if left is not None and all(len(n) == 1 for n in left):
            self.offer(tuple(int(n[0]) for n in left))
            left = None
        return lower, left

    def offer(self, choices: tuple[int, ...]) -> FloatArray:
        """Keep a strategy if it is the best so far; its sums."""
        sums = self.rows.sums(choices)
        self.seen.append(choices)
        if sums.max() < self.best:
            self.best, self.choices = float(sums.max()), choices
        return sums

    def _cheapest(self, share: FloatArray, names: _Names) -> tuple[int, ...] | None:
        nodes, tables = self.rows.mean(share, names)
        try:
            found = solve(nodes, self.rows.edges, tables)
        except ValueError:  # what is left is not allowed together
            return None
        self.work += found.work + PROGRAM_WORK
        return tuple(int(n[c]) for n, c in zip(names, found.choices, strict=True))

    def _promising(self, share: FloatArray, names: _Names) -> _Names | None:
        """The configs that may be in a strategy better than the best so far."""
        nodes, tables = self.rows.mean(share, names)
        try:
            marginals = min_marginals(nodes, self.rows.edges, tables)
        except DenseGraphError:
            return names
        left = tuple(
            n[marginal < self.best * (1 - _CLOSE)]
            for n, marginal in zip(names, marginals, strict=True)
        )
        return left if all(len(n) for n in left) else None

    def split(self, names: _Names) -> list[_Names]:
        """Two parts that together are the whole, apart in what recent candidates disagree on."""
        kept = [set(n.tolist()) for n in names]
        inside = [
            choices
            for choices in self.seen[-2 * _PLANES :]
            if all(c in n for c, n in zip(choices, kept, strict=True))
        ][-8:]
        variety = [
            (len({choices[n] for choices in inside}), len(kept[n])) if len(kept[n]) > 1 else (0, 0)
            for n in range(len(names))
        ]
        layer = max(range(len(names)), key=lambda n: variety[n])
        values = inside[-1][layer] if inside else int(names[layer][0])
        mask = names[layer] == values
        return [
            (*names[:layer], names[layer][chosen], *names[layer + 1 :]) for chosen in (mask, ~mask)
        ]


def _shares(planes: Sequence[FloatArray]) -> tuple[float, FloatArray]:
    """The shares at which the lowest of the planes is highest, and how high."""
    rows = np.array(planes)
    scale = max(float(np.abs(rows).max()), 1e-300)
    count = rows.shape[1]
    found = linprog(
        np.concatenate([[-1.0], np.zeros(count)]),
        A_ub=np.hstack([np.ones((len(rows), 1)), -rows / scale]),
        b_ub=np.zeros(len(rows)),
        A_eq=np.concatenate([[0.0], np.ones(count)])[None],
        b_eq=[1.0],
        bounds=[(None, None), *[(0, 1)] * count],
    )
    share = np.maximum(found.x[1:], 0)
    return float(found.x[0]) * scale, share / share.sum()
