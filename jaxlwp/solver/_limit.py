"""Search under a memory limit, on numbers alone: no layers, no devices, no JAX.

Bytes are sums over layers, and over edges (what is kept of a tensor that is laid out anew), but for
the largest temporary: what is there at a step's peak is

    sum(held) + max(sum(kept) + sum(copied) + max(temporary), sum(gradient))

Branch and bound (`solve_limited`). The limit's two sums enter the costs with a price per byte each
(Lagrangian relaxation): the cheapest strategy at these prices, less the price of the limit, bounds
every strategy that fits. Prices come from cutting planes (Kelley). Strategies met on the way that
fit are kept; configs that cannot fit, or whose bound (min-marginal) is above the best, are dropped.
What is left is split: by the bytes of the layer whose configs decide about fitting, or by the
largest temporary. Where nothing that fits is met at once, the strategy that takes the least bytes
is searched for (`_least`): either it fits, or nothing does.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from jaxlwp.solver._least import Bytes, Least, least_bytes
from jaxlwp.solver._linear import linprog
from jaxlwp.solver._marginals import DenseGraphError, min_marginals
from jaxlwp.solver._minmax import PROGRAM_WORK
from jaxlwp.solver._problem import BoundedSolution, Problem, check_problem
from jaxlwp.solver._solve import solve
from jaxlwp.solver._tables import FloatArray

_ROUNDS = 20
"""Most cutting planes of one bound."""

_CLOSE = 1e-9
"""Relative distance at which a bound meets the best strategy: rounding."""

_HIGHEST_PRICE = 1e6
"""Of all bytes of the limit, in costs of the cheapest strategy."""


@dataclass(frozen=True, kw_only=True)
class LimitedSolution(BoundedSolution):
    """The cheapest strategy found that fits; its lower bound holds for all that fit.

    Attributes:
      peak_bytes: the strategy's bytes, by the formula of the module.
      bounded: how many parts of the space were bounded.
    """

    peak_bytes: float
    bounded: int


class MemoryLimitError(ValueError):
    """No strategy fits.

    Attributes:
      least_bytes: of the strategy that takes least, as far as is known.
      choices: that strategy.
      lower_bound_bytes: no strategy takes less than that: `least_bytes` if the search for them was
        not ended early, 0 if nothing is known.
    """

    def __init__(
        self,
        message: str,
        least_bytes: float,
        choices: tuple[int, ...],
        lower_bound_bytes: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.least_bytes, self.choices = least_bytes, choices
        self.lower_bound_bytes = lower_bound_bytes


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer under each of its configs; every array has shape (configs,).

    Attributes:
      held: there all the time: parameters, optimizer state.
      kept: for the backward pass.
      gradient: of the parameters.
      temporary: while the layer runs.
    """

    held: ArrayLike
    kept: ArrayLike
    gradient: ArrayLike
    temporary: ArrayLike


@dataclass(frozen=True)
class _Part:
    """A part of the space: which configs each layer may have, and the least largest temporary."""

    names: tuple[np.ndarray, ...]
    temporary: float
    lower_s: float = 0.0


def solve_limited(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
    memory: Sequence[LayerBytes],
    limit_bytes: float,
    *,
    copied: Sequence[ArrayLike] | None = None,
    time_limit_s: float | None = None,
    work_limit: float | None = None,
) -> LimitedSolution:
    """Finds the cheapest of all strategies whose peak fits into a memory.

    Args:
      node_costs: as for `jaxlwp.solve`.
      edges: as for `jaxlwp.solve`.
      edge_costs: as for `jaxlwp.solve`.
      memory: per layer.
      limit_bytes: of one device.
      copied: per edge (i, j), shape (configs of i, configs of j), bytes kept besides; zeros if
        not given.
      time_limit_s: after so many seconds the best strategy so far is returned, with its bound.
      work_limit: the same with work in the units of `solve`: a limit that gives the same result on
        every machine.

    Raises:
      MemoryLimitError: nothing fits, or nothing that fits was found in time.
      ValueError: as `jaxlwp.solve`, or bytes that do not fit the layers' configs.
    """
    start = time.perf_counter()
    problem = check_problem(node_costs, edges, edge_costs)
    search = _Search(problem, _checked(problem, memory, copied), float(limit_bytes))
    root = _Part(tuple(np.arange(c.size) for c in problem.node_costs), 0.0)
    queue: list[tuple[float, int, list[_Part]]] = []
    number = itertools.count()
    deadline = start + (math.inf if time_limit_s is None else time_limit_s)
    most_work = math.inf if work_limit is None else work_limit
    least: Least | None = None
    parts, lower_s = [root], 0.0
    while True:
        for part in parts:
            bounded = search.bound(part)
            if bounded is not None:
                heapq.heappush(queue, (bounded[0], next(number), bounded[1]))
        if search.cost_s == math.inf and least is None:
            # Nothing fits so far. What takes least tells whether anything does, and may be a start.
            limits = deadline - time.perf_counter(), most_work - search.work
            least = search.look_for_least(*limits, proven=not queue)
        lower_s = min(queue[0][0], search.cost_s) if queue else search.cost_s
        ended = time.perf_counter() > deadline or search.work > most_work
        if lower_s >= search.cost_s * (1 - _CLOSE) or ended:
            break
        _, _, parts = heapq.heappop(queue)
    if search.cost_s == math.inf and least is not None:
        raise _too_little(search.limit, least, proven=not queue)
    if lower_s >= search.cost_s * (1 - _CLOSE):
        lower_s = search.cost_s
    return LimitedSolution(
        choices=search.choices,
        cost_s=search.cost_s,
        lower_bound_s=lower_s,
        peak_bytes=search.bytes.peak(search.choices),
        optimal=lower_s == search.cost_s,
        wall_s=time.perf_counter() - start,
        bounded=search.bounded,
    )


def _checked(
    problem: Problem, memory: Sequence[LayerBytes], copied: Sequence[ArrayLike] | None
) -> Bytes:
    if len(memory) != len(problem.node_costs):
        raise ValueError(
            f"memory has {len(memory)} entries for {len(problem.node_costs)} layers: give one each"
        )
    arrays: dict[str, list[FloatArray]] = {}
    for n, (layer, costs) in enumerate(zip(memory, problem.node_costs, strict=True)):
        for name in ("held", "kept", "gradient", "temporary"):
            values = np.asarray(getattr(layer, name), dtype=np.float64)
            if values.shape != costs.shape or not np.all((values >= 0) & np.isfinite(values)):
                raise ValueError(
                    f"memory[{n}].{name} must be {costs.size} finite numbers of at least 0, one "
                    f"for each config; it is {values!r}"
                )
            arrays.setdefault(name, []).append(values)
    if copied is None:
        copied = [np.zeros_like(table) for table in problem.edge_costs]
    if len(copied) != len(problem.edges):
        raise ValueError(
            f"copied has {len(copied)} entries for {len(problem.edges)} edges: give one each"
        )
    between = [np.asarray(table, dtype=np.float64) for table in copied]
    for n, (values, costs) in enumerate(zip(between, problem.edge_costs, strict=True)):
        if values.shape != costs.shape or not np.all((values >= 0) & np.isfinite(values)):
            raise ValueError(
                f"copied[{n}] must be finite numbers of at least 0 of shape {costs.shape}, one for "
                f"each pair of configs; it is {values!r}"
            )
    held = arrays["held"]
    return Bytes(
        tuple(h + k for h, k in zip(held, arrays["kept"], strict=True)),
        tuple(h + g for h, g in zip(held, arrays["gradient"], strict=True)),
        tuple(arrays["temporary"]),
        problem.edges,
        tuple(between),
    )


def _too_little(limit_bytes: float, least: Least, *, proven: bool) -> MemoryLimitError:
    """The error that tells the least bytes, or what is known of them."""
    needs = f"the strategy that takes least needs {least.peak_bytes:,.0f} bytes"
    if not least.proven:
        needs = (
            f"the strategy that takes least of those found needs {least.peak_bytes:,.0f} bytes, "
            f"and none takes less than {least.lower_bound_bytes:,.0f}"
        )
    return MemoryLimitError(
        f"memory limit: {limit_bytes:,.0f} bytes, but {needs}"
        f"{'; no strategy fits' if proven else ''}; use more devices, a smaller batch, or a "
        "higher limit",
        least.peak_bytes,
        least.choices,
        least.lower_bound_bytes,
    )


@dataclass
class _Search:
    """The best strategy so far, and how to bound a part of the space."""

    problem: Problem
    bytes: Bytes
    limit: float
    choices: tuple[int, ...] = ()
    cost_s: float = math.inf
    bounded: int = 0
    work: int = 0

    def offer(self, choices: Sequence[int]) -> bool:
        """Keep a strategy if it fits and is the best so far; whether it fits."""
        if self.bytes.peak(choices) > self.limit:
            return False
        cost_s = self.problem.total(choices)
        if cost_s < self.cost_s:
            self.choices, self.cost_s = tuple(choices), cost_s
        return True

    def look_for_least(self, time_limit_s: float, work_limit: float, *, proven: bool) -> Least:
        """Find the strategy that takes the least bytes, and keep it if it fits.

        Args:
          time_limit_s: of that search.
          work_limit: likewise.
          proven: it is known that no strategy fits.

        Raises:
          MemoryLimitError: no strategy fits.
        """
        least = least_bytes(
            self.problem, self.bytes, time_limit_s=time_limit_s, work_limit=work_limit
        )
        self.work += least.work
        if not self.offer(least.choices) and (proven or least.lower_bound_bytes > self.limit):
            raise _too_little(self.limit, least, proven=True)
        return least

    def bound(self, part: _Part) -> tuple[float, list[_Part]] | None:
        """A lower bound of a part, and what it splits into; None if nothing better is in it."""
        fitting = self._fitting(part)
        if fitting is None:
            return None
        self.bounded += 1
        part = fitting
        planes: list[tuple[float, float, float]] = []  # cost, and bytes above the limit
        seen: list[tuple[int, ...]] = []
        prices, best_s, best_prices = (0.0, 0.0), -math.inf, (0.0, 0.0)
        for _ in range(_ROUNDS):
            choices = self._cheapest(part, prices)
            if choices is None:
                return None
            kept, gradient, _ = self.bytes.sums(choices)
            over = kept + part.temporary - self.limit, gradient - self.limit
            cost_s = self.problem.total(choices)
            value_s = cost_s + sum(p * o for p, o in zip(prices, over, strict=True))
            if value_s > best_s:
                best_s, best_prices = value_s, prices
            fits = self.offer(choices)
            if best_s >= self.cost_s * (1 - _CLOSE) or (fits and prices == (0.0, 0.0)):
                return None
            planes.append((cost_s, *over))
            seen.append(choices)
            most_s, prices = self._prices(planes)
            if most_s - best_s <= 1e-6 * abs(most_s):
                break
        names = self._promising(part, best_prices, best_s)
        part = replace(part, names=names, lower_s=max(best_s, part.lower_s))
        return part.lower_s, self._split(part, seen)

    def _fitting(self, part: _Part) -> _Part | None:
        """Without configs that fit with no other layers' configs; None if that leaves nothing."""
        names, temporary = part.names, part.temporary
        while True:
            count = sum(map(len, names))
            if any(len(n) == 0 for n in names):
                return None
            own = [
                [array[n] for array, n in zip(arrays, names, strict=True)]
                for arrays in (
                    self.bytes.with_kept,
                    self.bytes.with_gradient,
                    self.bytes.temporary,
                )
            ]
            kept, gradient = (math.fsum(a.min() for a in arrays) for arrays in own[:2])
            temporary = max(temporary, *(float(a.min()) for a in own[2]))
            keep = [
                (kept + k - k.min() + np.maximum(t, temporary) <= self.limit)
                & (gradient + g - g.min() <= self.limit)
                for k, g, t in zip(*own, strict=True)
            ]
            names = tuple(n[mask] for n, mask in zip(names, keep, strict=True))
            if sum(map(len, names)) == count:
                return replace(part, names=names, temporary=temporary)

    def _priced(
        self, part: _Part, prices: tuple[float, float]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Costs of the part's layers and edges, bytes included at their prices."""
        nodes = [
            costs[n] + prices[0] * kept[n] + prices[1] * gradient[n]
            for costs, kept, gradient, n in zip(
                self.problem.node_costs,
                self.bytes.with_kept,
                self.bytes.with_gradient,
                part.names,
                strict=True,
            )
        ]
        tables = []
        for (i, j), table, copied in zip(
            self.problem.edges, self.problem.edge_costs, self.bytes.copied, strict=True
        ):
            block = np.ix_(part.names[i], part.names[j])
            tables.append(table[block] + prices[0] * copied[block] if prices[0] else table[block])
        return nodes, tables

    def _cheapest(self, part: _Part, prices: tuple[float, float]) -> tuple[int, ...] | None:
        nodes, tables = self._priced(part, prices)
        try:
            found = solve(nodes, self.problem.edges, tables)
        except ValueError:  # what is left is not allowed together
            return None
        self.work += found.work + PROGRAM_WORK
        return tuple(int(n[c]) for n, c in zip(part.names, found.choices, strict=True))

    def _prices(
        self, planes: Sequence[tuple[float, float, float]]
    ) -> tuple[float, tuple[float, float]]:
        """The prices at which the lowest of the planes is highest, and how high."""
        scale_s = max(max(abs(cost_s) for cost_s, *_ in planes), 1e-300)
        scale = max(self.limit, 1.0)
        rows = [[1.0, -kept / scale, -gradient / scale] for _, kept, gradient in planes]
        found = linprog(
            [-1.0, 0.0, 0.0],
            A_ub=rows,
            b_ub=[cost_s / scale_s for cost_s, *_ in planes],
            bounds=[(None, None), (0, _HIGHEST_PRICE), (0, _HIGHEST_PRICE)],
        )
        height, kept, gradient = found.x
        return height * scale_s, (kept * scale_s / scale, gradient * scale_s / scale)

    def _promising(
        self, part: _Part, prices: tuple[float, float], value_s: float
    ) -> tuple[np.ndarray, ...]:
        """The configs that may be in a strategy better than the best so far."""
        if self.cost_s == math.inf:
            return part.names
        nodes, tables = self._priced(part, prices)
        try:
            marginals = min_marginals(nodes, self.problem.edges, tables)
        except DenseGraphError:
            return part.names
        constant_s = min(m.min() for m in marginals) - value_s  # the price of the limit
        return tuple(
            n[marginal - constant_s < self.cost_s]
            for n, marginal in zip(part.names, marginals, strict=True)
        )

    def _split(self, part: _Part, seen: Sequence[tuple[int, ...]]) -> list[_Part]:
        """Two parts that together are the whole."""
        if any(len(n) == 0 for n in part.names):
            return []
        left = [set(n.tolist()) for n in part.names]
        inside = [c for c in seen if all(x in n for x, n in zip(c, left, strict=True))]
        over = [c for c in inside if self.bytes.peak(c) > self.limit]
        if over:
            largest = self.bytes.sums(over[-1])[2]
            kept, gradient, _ = self.bytes.sums(over[-1])
            if largest > part.temporary and max(kept + part.temporary, gradient) <= self.limit:
                below = tuple(
                    n[self.bytes.temporary[layer][n] < largest]
                    for layer, n in enumerate(part.names)
                )
                return [replace(part, names=below), replace(part, temporary=largest)]
        weights = [
            kept[n] + gradient[n]
            for kept, gradient, n in zip(
                self.bytes.with_kept, self.bytes.with_gradient, part.names, strict=True
            )
        ]
        layer = self._decisive(part, weights, inside)
        low, high = weights[layer].min(), weights[layer].max()
        if low == high:  # bytes decide nothing any more: split by config
            layer = max(range(len(weights)), key=lambda n: len(part.names[n]))
            if len(part.names[layer]) == 1:
                return []
            mask = np.arange(len(part.names[layer])) < len(part.names[layer]) // 2
        else:
            mask = weights[layer] <= (low + high) / 2
        return [
            replace(
                part,
                names=(
                    *part.names[:layer],
                    part.names[layer][chosen],
                    *part.names[layer + 1 :],
                ),
            )
            for chosen in (mask, ~mask)
        ]

    def _decisive(
        self, part: _Part, weights: Sequence[FloatArray], seen: Sequence[tuple[int, ...]]
    ) -> int:
        """The layer whose bytes differ most between strategies that fit and that do not."""
        spans = [float(w.max() - w.min()) for w in weights]
        if len(seen) > 1:
            each = [
                [
                    self.bytes.with_kept[n][c[n]] + self.bytes.with_gradient[n][c[n]]
                    for c in seen[-2:]
                ]
                for n in range(len(weights))
            ]
            differences = [
                float(abs(a - b)) if span else 0.0 for (a, b), span in zip(each, spans, strict=True)
            ]
            if max(differences) > 0:
                return differences.index(max(differences))
        return spans.index(max(spans))
