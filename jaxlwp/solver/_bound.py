"""Lower bounds by message passing: what any strategy costs at least, overall and with each config.

The dual of the linear relaxation is ascended by sequential tree-reweighted message passing
(Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", 2006). A sweep
goes through the layers in one direction. Each layer adds what came in to its own costs, keeps none
of it and hands it on in equal shares over the edges ahead: the least over its configs of share plus
edge cost, as a function of the config at the other end. The least of what is handed on is owed by
every strategy: these constants add up to the bound, which sweeps in turn never lower. What a layer
holds when its turn comes, plus all constants elsewhere, bounds every strategy that has it in that
config, so configs whose bound is above the cost of a known strategy can go (`restrict`).

On chains two sweeps are exact. On costs of sharding the bound mostly meets the best strategy.

All costs are finite here: `make_relaxation` cuts what is above the cost of a known strategy.
Numbers only: no layers, no devices, no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlwp.solver._eliminate import Graph, Order, min_plus_vector, restricted
from jaxlwp.solver._tables import FloatArray


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """The costs, and the messages, which sweeps change.

    Attributes:
        costs: per layer, shape (C_l,).
        tables: per layer and neighbour n, shape (C_l, C_n).
        messages: per layer and neighbour, shape (C_l,): what the neighbour handed on last.
        owed: per layer, the constant of the edges over which the last sweep handed on to it.
        kept: per layer, the constant that the last sweep left with it.
    """

    costs: list[FloatArray]
    tables: list[dict[int, FloatArray]]
    messages: list[dict[int, FloatArray]]
    owed: list[float]
    kept: list[float]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep found.

    Attributes:
        lower_s: no strategy costs less.
        bounds: per layer, shape (C_l,): no strategy with that config costs less.
        choices: a strategy: each layer's best config, given those before it in the sweep and what
            came in from those ahead.
    """

    lower_s: float
    bounds: list[FloatArray]
    choices: list[int]


def make_relaxation(graph: Graph, cap_s: float) -> Relaxation:
    """The relaxation of a graph whose tables are over two layers each.

    Args:
        graph: the graph.
        cap_s: costs above it are cut to it. If some strategy costs as much, none that costs less
            is changed, and bounds stay bounds.
    """
    layers = range(len(graph.costs))
    tables: list[dict[int, FloatArray]] = [{} for _ in layers]
    for layer in layers:
        for (a, b), table in graph.factors[layer].items():
            if a == layer:
                table = _cut(table, cap_s)
                tables[a][b], tables[b][a] = table, table.T
    return Relaxation(
        costs=[_cut(costs, cap_s) for costs in graph.costs],
        tables=tables,
        messages=[{n: np.zeros(graph.costs[v].size) for n in tables[v]} for v in layers],
        owed=[0.0] * len(layers),
        kept=[0.0] * len(layers),
    )


def _cut(costs: FloatArray, cap_s: float) -> FloatArray:
    return np.minimum(costs, cap_s) if costs.max() > cap_s else costs


def sweep(relaxation: Relaxation, forward: bool) -> Sweep:
    """One sweep through all layers; directions must take turns, forward first."""
    r = relaxation
    count = len(r.costs)
    done, waiting, kept = 0.0, math.fsum(r.owed), math.fsum(r.kept)
    owed = [0.0] * count
    bounds, choices = [np.empty(0)] * count, [0] * count
    for v in range(count) if forward else range(count - 1, -1, -1):
        messages, tables = r.messages[v], r.tables[v]
        here = guess = r.costs[v]
        ahead = []
        for n, incoming in messages.items():
            here = here + incoming
            if (n > v) == forward:
                ahead.append(n)
                guess = guess + incoming
            else:
                guess = guess + r.tables[n][v][choices[n]]
        kept -= r.kept[v]
        bounds[v] = here + (done + waiting + kept)
        waiting -= r.owed[v]
        choices[v] = int(guess.argmin())
        share = 1.0 / max(len(ahead), len(messages) - len(ahead), 1)
        r.kept[v] = 0.0
        if share * len(ahead) < 1:
            r.kept[v] = float(here.min()) * (1 - share * len(ahead))
            done += r.kept[v]
        here = here * share
        for n in ahead:
            message = min_plus_vector(here - messages[n], tables[n])
            least = float(np.minimum.reduce(message))
            message -= least
            r.messages[n][v] = message
            owed[n] += least
            done += least
    r.owed[:] = owed
    return Sweep(lower_s=done, bounds=bounds, choices=choices)


def restrict(relaxation: Relaxation, keep: Sequence[NDArray[np.intp]]) -> None:
    """Drops configs; constants stay what they were, and are bounds still.

    Args:
        relaxation: changed.
        keep: per layer, the indices of the configs that stay, ascending.
    """
    r = relaxation
    fewer = [len(k) < len(costs) for k, costs in zip(keep, r.costs, strict=True)]
    for v, index in enumerate(keep):
        if fewer[v]:
            r.costs[v] = r.costs[v][index]
            r.messages[v] = {n: message[index] for n, message in r.messages[v].items()}
        for n, table in r.tables[v].items():
            if n > v and (fewer[v] or fewer[n]):
                table = table.take(index, axis=0).take(keep[n], axis=1)
                r.tables[v][n], r.tables[n][v] = table, table.T


def reparametrised(relaxation: Relaxation) -> tuple[list[FloatArray], list[dict[int, FloatArray]]]:
    """The costs with all messages in, and the tables with them taken out: the same sums.

    Returns:
        As `Relaxation.costs` and `Relaxation.tables`; entries may be negative.
    """
    r = relaxation
    costs = [sum(m.values(), start=c) for c, m in zip(r.costs, r.messages, strict=True)]
    tables: list[dict[int, FloatArray]] = [{} for _ in costs]
    for v, near in enumerate(r.tables):
        for n, table in near.items():
            if n > v:
                table = table - r.messages[v][n][:, None] - r.messages[n][v]
                tables[v][n], tables[n][v] = table, table.T
    return costs, tables


def descend(relaxation: Relaxation, choices: list[int]) -> list[int]:
    """Changes one layer's config at a time, to the best given its neighbours', while it helps."""
    choices = list(choices)
    for _ in range(len(choices)):
        before = list(choices)
        for v, tables in enumerate(relaxation.tables):
            costs = relaxation.costs[v]
            for n in tables:
                costs = costs + relaxation.tables[n][v][choices[n]]
            best = int(costs.argmin())
            if costs[best] < costs[choices[v]]:
                choices[v] = best
        if choices == before:
            break
    return choices


# Bounds of a graph, and what they leave of it ---------------------------------------------------

# What things take, in units of one sum of two costs (about 1.2 ns).
_EDGE_WORK = 6_000  # handing a message over one edge, and a layer's turn, besides its sums
_LAYER_WORK = 20_000  # eliminating a layer, besides its sums

Report = Callable[[float, int], None]
"""Called with a lower bound, and with the work that it took or that comes next, in the same units;
ends the search by raising."""

_PATIENCE = 100
"""Rounds that elimination may take to be preferred where two have dropped no config."""

_ROUNDS_LIMIT = 200
"""Pairs of sweeps at most."""


def sweep_work(graph: Graph) -> int:
    """What a sweep takes, in units of one sum of two costs."""
    scopes = graph.scopes()
    sums = sum(graph.costs[i].size * graph.costs[j].size for i, j in scopes)
    return sums + _EDGE_WORK * (len(scopes) + len(graph.costs))


def elimination_work(order: Order) -> int:
    """What elimination takes, in the same unit."""
    return order.sums + _LAYER_WORK * len(order.layers)


class Bounded:
    """A graph under message passing: what is left of its configs, and what is known; mutable.

    Attributes:
        graph: as it was given; its tables are over two layers each.
        relaxation: of what is left of it.
        names: per layer, shape (C,): the configs that are left, as they are numbered in `graph`.
        bounds: per layer, shape (C,): no strategy with that config costs less.
        lower_s: no strategy costs less.
        upper_s: what `best` costs; if that is not allowed, more than any strategy that is.
        slack_s: an allowance for rounding, in sums of the graph's costs.
        best: the best known strategy, in `graph`'s numbers.
    """

    def __init__(
        self, graph: Graph, first: Sequence[int], found: Callable[[Sequence[int]], None]
    ) -> None:
        """No sweeps yet.

        Args:
            graph: the graph.
            first: a strategy.
            found: called with every strategy that is better than those before.
        """
        self.graph = graph
        self._found = found
        self.best = list(first)
        self.upper_s = math.inf
        self.lower_s = 0.0
        self.names = [np.arange(costs.size) for costs in graph.costs]
        self.bounds = [np.zeros(costs.size) for costs in graph.costs]
        self.offer(first)
        self.upper_s = min(self.upper_s, _most(graph))
        self._relax()

    def _relax(self) -> None:
        """Starts message passing on costs no larger than `upper_s`."""
        self.cap_s = self.upper_s
        terms = len(self.graph.costs) + len(self.graph.scopes())
        self.slack_s = 4 * terms * float(np.finfo(float).eps) * self.cap_s
        self.relaxation = make_relaxation(restricted(self.graph, self.names), self.cap_s)

    @property
    def closed(self) -> bool:
        """No strategy is better than `best`, to rounding."""
        return self.lower_s >= self.upper_s - self.slack_s

    @property
    def dropped(self) -> int:
        """How many configs are dropped."""
        left = sum(len(names) for names in self.names)
        return sum(costs.size for costs in self.graph.costs) - left

    def named(self, choices: Sequence[int]) -> list[int]:
        """A strategy of what is left, in `graph`'s numbers."""
        return [int(n[c]) for n, c in zip(self.names, choices, strict=True)]

    def offer(self, choices: Sequence[int]) -> None:
        """Keeps a strategy, in `graph`'s numbers, if it is the best so far."""
        cost_s = self.graph.total(choices)
        if cost_s < self.upper_s:
            self.best, self.upper_s = list(choices), cost_s
            self._found(choices)

    def round(self, improve: bool) -> None:
        """Two sweeps, there and back; with `improve`, coordinate descent from what they find."""
        for forward in (True, False):
            swept = sweep(self.relaxation, forward)
            self.lower_s = max(self.lower_s, swept.lower_s)
            self.bounds = [np.maximum(a, b) for a, b in zip(self.bounds, swept.bounds, strict=True)]
            before = self.upper_s
            self.offer(self.named(swept.choices))
            if self.closed:
                return
        if improve or self.upper_s < before:
            self.offer(self.named(descend(self.relaxation, swept.choices)))
        if self.upper_s * 1e3 < self.cap_s:  # too coarse for its rounding: start again
            self._relax()

    def drop(self) -> bool:
        """Drops the configs that no better strategy has, if they are a tenth; whether it did."""
        limit = self.upper_s + self.slack_s
        keep = [np.flatnonzero(bounds <= limit) for bounds in self.bounds]
        if sum(map(len, keep)) > 0.9 * sum(map(len, self.names)) or not all(map(len, keep)):
            return False
        self.names = [names[k] for names, k in zip(self.names, keep, strict=True)]
        self.bounds = [bounds[k] for bounds, k in zip(self.bounds, keep, strict=True)]
        restrict(self.relaxation, keep)
        return True


def _most(graph: Graph) -> float:
    """More than any allowed strategy costs, from the sum of the largest finite costs."""
    tables = [*graph.costs, *(graph.factors[s[0]][s] for s in graph.scopes())]
    largest = sum(float(np.max(t, initial=0.0, where=t < math.inf)) for t in tables)
    # Costs so large that their sum overflows are not allowed either.
    return min(2 * largest or 1.0, float(np.finfo(float).max) / (8 * len(tables)))


def tighten(bounded: Bounded, order: Order, report: Report) -> Order:
    """Message passing, as long as it pays, against elimination of what it leaves.

    Args:
        bounded: the graph.
        order: in which its layers would be eliminated.
        report: called after each round.

    Returns:
        The order, and what following it takes now.
    """
    spent, step = 0, 2 * sweep_work(bounded.graph)
    left = elimination_work(order)
    for n in range(_ROUNDS_LIMIT):
        before = bounded.lower_s
        bounded.round(improve=n & (n + 1) == 0)  # after 1, 2, 4, 8 ... rounds
        report(bounded.lower_s - bounded.slack_s, step)
        if bounded.closed:
            return order
        if bounded.drop():
            order = Order.of(order.layers, order.near, [len(names) for names in bounded.names])
            left = elimination_work(order)
        spent += step
        gained, gap = bounded.lower_s - before, bounded.upper_s - bounded.lower_s
        hopeless = n == 1 and not bounded.dropped and gap > 0.05 * bounded.upper_s
        stalled = n > 1 and gained < 0.02 * gap
        spent_enough = spent > 2 * left and gained < gap  # a gap that halves soon closes
        if left <= step or spent_enough or (hopeless and left < _PATIENCE * step) or stalled:
            break
    return order
