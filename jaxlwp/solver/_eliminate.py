"""Variable elimination: the exact minimum over any graph, by min-plus products of cost tables.

Taking a layer out of the graph leaves a table over its neighbours: for each of their configs, the
least that the layer and what hangs on it cost (`eliminate`). The paper's node elimination is the
case of two neighbours, and its edge elimination is adding a table to one that is there. With more
neighbours the tables have more axes; `plan_order` picks an order that keeps them small and says
beforehand what they take. What each elimination saw is kept in a `Bucket`, from which the choices
are read in reverse order (`best_choices`).

Numbers only: no layers, no devices, no JAX.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlwp.solver._problem import Problem
from jaxlwp.solver._tables import FloatArray

# Entries of one block of partial sums: 512 KiB, half of a common L2 cache.
_BLOCK = 1 << 16

Scope = tuple[int, ...]
"""Layers in ascending order: the axes of a table."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Costs and tables, at most one for each set of layers; while it shrinks, both are mutated.

    Attributes:
        costs: per layer, shape (C_l,), seconds.
        factors: per layer, the tables over it and others: scope -> an axis for each layer of it.
    """

    costs: list[FloatArray]
    factors: list[dict[Scope, FloatArray]]

    def add(self, scope: Scope, table: FloatArray) -> int:
        """Adds a table; returns 1 if it went into one that was there: an edge elimination."""
        if len(scope) == 1:
            self.costs[scope[0]] = self.costs[scope[0]] + table
            return 0
        present = self.factors[scope[0]].get(scope)
        if present is not None:
            table = present + table
        for layer in scope:
            self.factors[layer][scope] = table
        return int(present is not None)

    def scopes(self) -> list[Scope]:
        """The scopes of all tables."""
        return [scope for n, near in enumerate(self.factors) for scope in near if scope[0] == n]

    def total(self, choices: Sequence[int]) -> float:
        """The cost of a strategy in seconds."""
        total = sum(float(costs[c]) for costs, c in zip(self.costs, choices, strict=True))
        for n, near in enumerate(self.factors):
            for scope, table in near.items():
                if scope[0] == n:
                    total += float(table[tuple(choices[m] for m in scope)])
        return total


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One eliminated layer, with just what choosing its config later needs.

    Attributes:
        layer: the layer.
        costs: shape (C_layer,), its own costs at the time of the elimination.
        factors: the tables over it and layers that are eliminated later.
    """

    layer: int
    costs: FloatArray
    factors: tuple[tuple[Scope, FloatArray], ...]

    def given(self, choices: Sequence[int]) -> FloatArray:
        """Shape (C_layer,): the cost of each config, given the others' in `choices`."""
        costs = self.costs
        for scope, table in self.factors:
            if len(scope) == 2:
                a, b = scope
                costs = costs + (table[:, choices[b]] if a == self.layer else table[choices[a]])
            else:
                index = tuple(slice(None) if n == self.layer else choices[n] for n in scope)
                costs = costs + table[index]
        return costs


@dataclass(frozen=True, kw_only=True)
class Order:
    """An elimination order, and what following it takes.

    Attributes:
        layers: every layer, the first eliminated first.
        near: for each of them, its neighbours when it is eliminated.
        width: the most neighbours that a layer has when it is eliminated.
        sums: how many sums of costs are compared.
        entries: how many entries the largest table made has.
    """

    layers: tuple[int, ...]
    near: tuple[tuple[int, ...], ...]
    width: int
    sums: int
    entries: int

    @classmethod
    def of(
        cls,
        layers: Sequence[int],
        near: Sequence[Collection[int]],
        sizes: Sequence[int],
    ) -> Order:
        """The order of `layers`, with configs as in `sizes`; of one, a layer makes no table."""
        width, total, largest = 0, 0, 0
        for layer, others in zip(layers, near, strict=True):
            if sizes[layer] > 1:
                entries = math.prod([sizes[n] for n in others])
                width = max(width, len(others))
                total, largest = total + entries * sizes[layer], max(largest, entries)
        return cls(
            layers=tuple(layers),
            near=tuple(tuple(others) for others in near),
            width=width,
            sums=total,
            entries=largest,
        )


def make_graph(problem: Problem) -> tuple[Graph, int]:
    """The problem as a graph without parallel edges, and how many edges were merged."""
    graph = Graph(costs=list(problem.node_costs), factors=[{} for _ in problem.node_costs])
    merged = 0
    for (i, j), table in zip(problem.edges, problem.edge_costs, strict=True):
        merged += graph.add((i, j), table) if i < j else graph.add((j, i), table.T)
    return graph, merged


def restricted(graph: Graph, keep: Sequence[NDArray[np.intp]]) -> Graph:
    """A graph with fewer configs.

    Args:
        graph: tables of two layers each.
        keep: per layer, the indices of the configs that stay, ascending.
    """
    fewer = [len(k) < len(costs) for k, costs in zip(keep, graph.costs, strict=True)]
    factors: list[dict[Scope, FloatArray]] = [{} for _ in keep]
    for v, present in enumerate(graph.factors):
        for (a, b), table in present.items():
            if a == v:
                if fewer[a] or fewer[b]:
                    table = table.take(keep[a], axis=0).take(keep[b], axis=1)
                factors[a][a, b] = factors[b][a, b] = table
    return Graph(costs=[c[k] for c, k in zip(graph.costs, keep, strict=True)], factors=factors)


def subgraph(graph: Graph, layers: Sequence[int]) -> Graph:
    """The graph of the given layers alone, numbered anew in their order; tables of two layers."""
    number = {layer: n for n, layer in enumerate(layers)}
    part = Graph(costs=[graph.costs[layer] for layer in layers], factors=[{} for _ in layers])
    for layer in layers:
        for (a, b), table in graph.factors[layer].items():
            if a == layer and b in number:
                part.add((number[a], number[b]), table)
    return part


def connected(graph: Graph, layers: set[int]) -> list[list[int]]:
    """The connected parts of the given layers, ascending, the part of the first layer first."""
    parts: list[list[int]] = []
    left = set(layers)
    while left:
        todo = [min(left)]
        part = set(todo)
        while todo:
            near = {n for scope in graph.factors[todo.pop()] for n in scope} & layers - part
            part |= near
            todo.extend(near)
        parts.append(sorted(part))
        left -= part
    return parts


# The order --------------------------------------------------------------------------------------


def plan_order(sizes: Sequence[int], scopes: Iterable[Scope], good_enough: int = 1 << 21) -> Order:
    """A good elimination order: the least work first; fewest new edges first where that is less.

    Args:
        sizes: per layer, how many configs it has.
        scopes: the layers of each table.
        good_enough: as many sums are taken without trying a second rule.
    """
    around = _neighbours(sizes, scopes)
    order = _greedy_order(sizes, [set(near) for near in around], _least_work)
    if order.width <= 2 or order.sums <= good_enough:
        return order
    other = _greedy_order(sizes, around, _least_fill)
    return other if other.sums < order.sums else order


def plan_sparse(sizes: Sequence[int], scopes: Iterable[Scope]) -> list[int]:
    """The layers that can be eliminated while they have at most two neighbours, in order."""
    around = _neighbours(sizes, scopes)
    layers: list[int] = []
    queue = [n for n, near in enumerate(around) if len(near) <= 2]
    gone: set[int] = set()
    while queue:
        layer = queue.pop(0)
        if layer in gone:
            continue
        gone.add(layer)
        layers.append(layer)
        near = sorted(around[layer])
        for n in near:
            around[n] = (around[n] | around[layer]) - {n, layer}
        queue.extend(n for n in near if len(around[n]) <= 2)
    return layers


def _neighbours(sizes: Sequence[int], scopes: Iterable[Scope]) -> list[set[int]]:
    around: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for layer in scope:
            around[layer].update(scope)
    for layer, near in enumerate(around):
        near.discard(layer)
    return around


_Rule = Callable[[Sequence[int], Sequence[set[int]], int], tuple[int, ...]]


def _least_work(sizes: Sequence[int], around: Sequence[set[int]], layer: int) -> tuple[int, ...]:
    """(one if it has more than one neighbour, sums that eliminating the layer takes, index)."""
    near = around[layer]
    if sizes[layer] == 1:  # binds no neighbours: each gets what its edge costs
        return 0, 1, layer
    return int(len(near) > 1), math.prod([sizes[n] for n in near]) * sizes[layer], layer


def _least_fill(sizes: Sequence[int], around: Sequence[set[int]], layer: int) -> tuple[int, ...]:
    """(pairs of neighbours that are not neighbours yet, sums, index)."""
    near = around[layer]
    missing = sum(len(near) - 1 - len(near & around[n]) for n in near) // 2
    return (0 if sizes[layer] == 1 else missing, *_least_work(sizes, around, layer)[1:])


def _greedy_order(sizes: Sequence[int], around: list[set[int]], rule: _Rule) -> Order:
    """Eliminates the layer that `rule` puts first until none is left; `around` is used up.

    A layer's place in the queue changes when its neighbours do; it is queued again then, and the
    old entry is stale.
    """
    current = [rule(sizes, around, layer) for layer in range(len(sizes))]
    queue = list(current)
    heapq.heapify(queue)
    layers: list[int] = []
    met: list[set[int]] = []
    while queue:
        entry = heapq.heappop(queue)
        layer = entry[-1]
        if entry is not current[layer]:
            continue
        near = around[layer]
        current[layer] = ()
        layers.append(layer)
        met.append(near)
        for n in near:
            if sizes[layer] > 1:
                around[n] |= near
                around[n].discard(n)
            around[n].discard(layer)
        touched = near
        if rule is _least_fill:  # the neighbours' neighbours miss fewer pairs now
            touched = near.union(*(around[n] for n in near))
        for n in sorted(touched):
            current[n] = rule(sizes, around, n)
            heapq.heappush(queue, current[n])
    return Order.of(layers, met, sizes)


# Elimination ------------------------------------------------------------------------------------


def eliminate(
    graph: Graph, layers: Iterable[int], check: Callable[[], None] = lambda: None
) -> tuple[list[Bucket], float, int]:
    """Takes the layers out of the graph one after the other; `graph` is used up.

    Args:
        graph: the graph.
        layers: all or some of its layers, in order.
        check: called before each elimination; whatever it raises ends the work.

    Returns:
        A bucket for each layer; the least cost of those parts of the graph that are gone; and how
        many edge eliminations came with it.
    """
    buckets: list[Bucket] = []
    constant, merged = 0.0, 0
    for layer in layers:
        check()
        costs, factors = graph.costs[layer], graph.factors[layer]
        bucket = Bucket(layer=layer, costs=costs, factors=tuple(factors.items()))
        buckets.append(bucket)
        for scope, _ in bucket.factors:
            for n in scope:
                del graph.factors[n][scope]
        if not bucket.factors:
            constant += float(costs.min())
        elif costs.size == 1:
            constant += float(costs[0])
            for scope, table in bucket.factors:
                rest = tuple(n for n in scope if n != layer)
                merged += graph.add(rest, np.take(table, 0, axis=scope.index(layer)))
        else:
            merged += graph.add(*message(bucket))
    return buckets, constant, merged


def best_choices(buckets: Sequence[Bucket], choices: list[int]) -> list[int]:
    """Chooses the eliminated layers' configs, last eliminated first.

    Args:
        buckets: the eliminations in the order they were done.
        choices: per layer, its config; those of layers eliminated are filled in.

    Returns:
        `choices`.
    """
    for bucket in reversed(buckets):
        choices[bucket.layer] = int(np.argmin(bucket.given(choices)))
    return choices


def message(bucket: Bucket) -> tuple[Scope, FloatArray]:
    """The least over the layer's configs of its costs and tables, as a table over the others.

    Its tables are added up in two groups first, each over fewer layers than the result, so that
    only one sum is left for each combination of configs: a min-plus product of the two.
    """
    layer, costs, factors = bucket.layer, bucket.costs, bucket.factors
    if len(factors) == 1 and len(factors[0][0]) == 2:
        (a, b), table = factors[0]
        return (
            ((b,), min_plus_vector(costs, table))
            if a == layer
            else ((a,), min_plus_vector(costs, table.T))
        )
    if len(factors) == 2 and len(factors[0][0]) == len(factors[1][0]) == 2:
        (n, left), (m, right) = sorted(
            ((a, table.T) if b == layer else (b, table) for (a, b), table in factors),
            key=lambda item: item[0],
        )
        return (n, m), min_plus(left.T + costs, right)
    return _message_of_many(bucket)


def _message_of_many(bucket: Bucket) -> tuple[Scope, FloatArray]:
    """`message` for tables of any number of axes."""
    layer = bucket.layer
    sizes = {n: size for scope, t in bucket.factors for n, size in zip(scope, t.shape, strict=True)}
    left, right = _two_groups(bucket, sizes)
    scopes = [{n for scope, _ in group for n in scope} - {layer} for group in (left, right)]
    out = tuple(sorted(scopes[0] | scopes[1]))
    if not right:
        total = sum_of((layer, *out), left, sizes, bucket.costs)
        return out, np.min(total, axis=0)
    shared = tuple(n for n in out if n in scopes[0] and n in scopes[1])
    one = tuple(n for n in out if n not in scopes[1])
    two = tuple(n for n in out if n not in scopes[0])
    shapes = [tuple(sizes[n] for n in part) for part in (shared, one, two)]
    s, p, q = (math.prod(shape) for shape in shapes)
    first = sum_of((layer, *shared, *one), left, sizes, bucket.costs)
    second = sum_of((layer, *shared, *two), right, sizes, None)
    table = _min_plus_shared(first.reshape(-1, s, p), second.reshape(-1, s, q))
    axes = (*shared, *one, *two)
    table = table.reshape(*shapes[0], *shapes[1], *shapes[2])
    return out, table.transpose([axes.index(n) for n in out])


_Factors = list[tuple[Scope, FloatArray]]


def _two_groups(bucket: Bucket, sizes: Mapping[int, int]) -> tuple[_Factors, _Factors]:
    """The tables in two groups over as few combinations as may be; the second may be empty."""
    groups: tuple[_Factors, _Factors] = ([], [])
    scopes: list[set[int]] = [{bucket.layer}, {bucket.layer}]
    # The largest first: what fits into a group's layers costs nothing more there.
    for scope, table in sorted(bucket.factors, key=lambda f: (-f[1].size, f[0])):
        growth = [math.prod(sizes[n] for n in group.union(scope)) for group in scopes]
        if scopes[0].issuperset(scope) or (not scopes[1].issuperset(scope) and not groups[0]):
            choice = 0
        else:
            choice = int(scopes[1].issuperset(scope) or growth[1] < growth[0])
        groups[choice].append((scope, table))
        scopes[choice].update(scope)
    if scopes[1] >= scopes[0]:
        groups, scopes = (groups[1], groups[0]), [scopes[1], scopes[0]]
    if scopes[0] >= scopes[1]:
        return groups[0] + groups[1], []
    return groups


def sum_of(
    axes: Scope, factors: _Factors, sizes: Mapping[int, int], costs: FloatArray | None
) -> FloatArray:
    """The tables' sum over `axes`, the eliminated layer's first, plus its own costs if given."""
    total = np.zeros([sizes[n] for n in axes])
    if costs is not None:
        total += costs.reshape(-1, *[1] * (len(axes) - 1))
    for scope, table in factors:
        total += aligned(scope, table, axes)
    return total


def aligned(scope: Scope, table: FloatArray, axes: Scope) -> FloatArray:
    """A view of the table with one axis for each of `axes`, of length 1 where it has none."""
    present = [n for n in axes if n in scope]
    table = table.transpose([scope.index(n) for n in present])
    return table.reshape([table.shape[present.index(n)] if n in scope else 1 for n in axes])


def min_plus(left: FloatArray, right: FloatArray) -> FloatArray:
    """The min-plus product: out[u, w] = min over v of left[u, v] + right[v, w].

    Shapes (U, V) and (V, W) give (U, W). The sums are made in blocks (v, u, w) that stay in
    the cache, with v outermost: a minimum over the first axis is element-wise and vectorises.
    16 of v to a block, for long enough runs of both, and rows of u to fill it, was the fastest
    of a dozen layouts measured from 5 to 216 configs: 1 to 2 ns a sum.
    """
    rows = max(1, _BLOCK // (16 * right.shape[1]))
    depth = max(1, _BLOCK // (min(rows, left.shape[0]) * right.shape[1]))
    right = np.ascontiguousarray(right)[:, None, :]
    out = np.empty((left.shape[0], right.shape[2]))
    for r in range(0, out.shape[0], rows):
        part = np.ascontiguousarray(left[r : r + rows].T)[:, :, None]
        best = np.min(part[:depth] + right[:depth], axis=0, out=out[r : r + rows])
        for d in range(depth, right.shape[0], depth):
            sums = part[d : d + depth] + right[d : d + depth]
            np.minimum(best, np.min(sums, axis=0), out=best)
    return out


def min_plus_vector(left: FloatArray, right: FloatArray) -> FloatArray:
    """The min-plus product of a vector: out[w] = min over v of left[v] + right[v, w].

    Shapes (V,) and (V, W) give (W,).
    """
    if right.size <= 2 * _BLOCK:
        least: FloatArray = np.minimum.reduce(left[:, None] + right)  # np.min takes 2 us more
        return least
    step = max(1, _BLOCK // right.shape[1])
    parts = (
        np.min(left[r : r + step, None] + right[r : r + step], axis=0)
        for r in range(0, right.shape[0], step)
    )
    return functools.reduce(np.minimum, parts)


def _min_plus_shared(left: FloatArray, right: FloatArray) -> FloatArray:
    """Min-plus products, one for each combination of the layers that both tables have.

    Shapes (V, S, P) and (V, S, Q) give (S, P, Q). Where a product fills a block they are made one
    by one, else as many at once as fill one.
    """
    _, shared, p = left.shape
    q = right.shape[2]
    out = np.empty((shared, p, q))
    if shared == 1 or left.shape[0] * p * q >= _BLOCK:
        for s in range(shared):
            out[s] = min_plus(left[:, s].T, right[:, s])
        return out
    step = max(1, _BLOCK // (left.shape[0] * p * q))
    for s in range(0, shared, step):
        sums = left[:, s : s + step, :, None] + right[:, s : s + step, None, :]
        np.min(sums, axis=0, out=out[s : s + step])
    return out
