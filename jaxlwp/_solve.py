"""The search for the cheapest strategy, on numbers alone: no layers, no devices, no JAX.

The problem: one config for each layer, such that the layers' costs plus the edges' costs are
least. `solve` has two exact methods. "elimination" is the algorithm of Jia et al. (ICML 2018,
section 5), in three phases:

1. Eliminate and record: `_eliminate`. Edge elimination (`_connect`) adds up parallel edges.
   Node elimination (`_eliminate_node`) drops a layer with at most two neighbours, by the
   minimum over its configs: two neighbours get an edge between them (`_min_plus`), one gets the
   minimum added to its own costs, and a layer with none just waits for phase 3. The paper
   eliminates layers with one in-edge and one out-edge; direction does not matter to a sum, and
   layers with one neighbour or none are the same minimum over fewer tables. So is a layer with
   one config (a sum of scalars: a weight penalty joins all layers by them), however many
   neighbours it has: each gets what its edge costs.
2. Enumerate what is left: `_depth_first`. The K remaining layers: two for every network of
   treewidth two, so for all of the paper's.
3. Undo in reverse order: `_undo`. Each eliminated layer takes its best config, given those of
   its neighbours, which are known by then.

"exhaustive" is `_depth_first` on the whole problem: the paper's baseline.

Nothing depends on hash order or on a clock: where costs tie, the first config wins, and the same
input always gives the same choices. A sum of costs that overflows is infinite: not allowed.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlwp._tables import FloatArray, check_costs, check_edges

# Entries of one block of partial sums: 512 KiB, half of a common L2 cache.
_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The strategy that a search found, and what is known of it.

    Two solutions are equal if all but their wall times are.

    Attributes:
        choices: per layer, the index of its config.
        cost_s: the strategy's cost in seconds, summed anew from the tables given.
        lower_bound_s: no strategy costs less; the same as `cost_s` if `optimal`.
        optimal: whether the search proved that nothing is cheaper, to rounding.
        method: the method that found it.
        wall_s: how long the search took, in seconds.
        nodes_eliminated: how many node eliminations were done.
        edges_eliminated: how many edge eliminations were done.
        enumerated: how many combinations of configs were enumerated.
        remaining: K, how many layers they were combinations of.
    """

    choices: tuple[int, ...]
    cost_s: float
    lower_bound_s: float
    optimal: bool
    method: str
    wall_s: float = field(compare=False)
    nodes_eliminated: int
    edges_eliminated: int
    enumerated: int
    remaining: int

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound_s <= self.cost_s < math.inf:
            raise ValueError(
                f"Solution.lower_bound_s is {self.lower_bound_s} and cost_s {self.cost_s}: a "
                "lower bound must be from 0 to the cost, and the cost finite; check both."
            )

    @property
    def gap(self) -> float:
        """The share of `cost_s` that a better strategy could save at most; 0.0 if optimal."""
        if self.optimal or self.cost_s == 0:
            return 0.0
        return (self.cost_s - self.lower_bound_s) / self.cost_s


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Checked input: C_l is the number of configs of layer l."""

    node_costs: tuple[FloatArray, ...]  # per layer, shape (C_l,)
    edges: tuple[tuple[int, int], ...]
    edge_costs: tuple[FloatArray, ...]  # per edge (i, j), shape (C_i, C_j)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a method returns."""

    choices: tuple[int, ...]
    nodes_eliminated: int
    edges_eliminated: int
    enumerated: int
    remaining: int


@dataclass(frozen=True, kw_only=True)
class _NodeElimination:
    """One eliminated layer, with just what choosing its config later needs."""

    layer: int
    costs: FloatArray  # shape (C_layer,), at the time of the elimination
    tables: tuple[tuple[int, FloatArray], ...]  # (neighbour, shape (C_layer, C_neighbour))


def solve(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
    *,
    method: str = "elimination",
    enumerate_limit: int = 1_000_000,
) -> Solution:
    """Finds one config per layer such that the sum of all costs is least.

    Example:
        Two layers of two configs. Each likes its config 0, but the pair (0, 0) is not allowed:

        >>> inf = float("inf")
        >>> solution = solve([[1, 5], [1, 3]], [(0, 1)], [[[inf, 0], [0, 0]]])
        >>> solution.choices, solution.cost_s, solution.optimal
        ((0, 1), 4.0, True)

    Args:
        node_costs: per layer, shape (C_l,), the seconds of each of its configs.
        edges: pairs (i, j) of different layer indices; parallel edges are legal.
        edge_costs: per edge (i, j), shape (C_i, C_j), the seconds of each pair of configs.
            Infinity, here and in `node_costs`, marks what is not allowed.
        method: "elimination", the paper's algorithm, or "exhaustive", depth-first search over
            all configs of all layers, the paper's baseline. Both are exact.
        enumerate_limit: the most combinations of configs to enumerate: of the layers that
            elimination leaves if these are more than two, or of all layers ("exhaustive").

    Returns:
        An optimal solution. Among strategies that cost the same, always the same one.

    Raises:
        ValueError: the method is unknown, a shape or an index does not fit, a cost is NaN or
            negative, more combinations than `enumerate_limit` remain, or no strategy is allowed.
    """
    start = time.perf_counter()
    search = _METHODS.get(method)
    if search is None:
        known = ", ".join(f'"{name}"' for name in _METHODS)
        raise ValueError(f"method is {method!r}: it must be one of {known}; choose one of these.")
    problem = _check_problem(node_costs, edges, edge_costs)
    with np.errstate(over="ignore"):
        found = search(problem, enumerate_limit)
    cost_s = _total(problem, found.choices)
    if cost_s == math.inf:
        raise ValueError(
            f"every strategy of these {len(problem.node_costs)} layers costs inf, so none is "
            "allowed: each layer and each edge has a finite cost, but no choice of configs has "
            "only finite ones; allow more configs, or more pairs of configs on the edges."
        )
    return Solution(
        choices=found.choices,
        cost_s=cost_s,
        lower_bound_s=cost_s,
        optimal=True,
        method=method,
        wall_s=time.perf_counter() - start,
        nodes_eliminated=found.nodes_eliminated,
        edges_eliminated=found.edges_eliminated,
        enumerated=found.enumerated,
        remaining=found.remaining,
    )


def _check_problem(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
) -> _Problem:
    """The input as float64 arrays, not copied where they are; ValueError as `solve` says."""
    if len(node_costs) == 0:
        raise ValueError("node_costs is empty: give one array of costs for each layer.")
    if len(edges) != len(edge_costs):
        raise ValueError(
            f"edge_costs has {len(edge_costs)} entries for {len(edges)} edges: it must have one "
            "2-D array for each edge; add the missing ones or drop the surplus."
        )
    nodes = tuple(check_costs(f"node_costs[{n}]", c, (None,)) for n, c in enumerate(node_costs))
    pairs = check_edges(edges, len(nodes))
    tables = tuple(
        check_costs(f"edge_costs[{n}], edge {i} -> {j},", costs, (nodes[i].size, nodes[j].size))
        for n, ((i, j), costs) in enumerate(zip(pairs, edge_costs, strict=True))
    )
    _check_allowed([f"layer {n}: node_costs[{n}]" for n in range(len(nodes))], nodes)
    _check_allowed([f"edge {i} -> {j}: edge_costs[{n}]" for n, (i, j) in enumerate(pairs)], tables)
    return _Problem(node_costs=nodes, edges=pairs, edge_costs=tables)


def _check_allowed(places: Sequence[str], arrays: Sequence[FloatArray]) -> None:
    """ValueError if one array alone already rules out every strategy."""
    for place, costs in zip(places, arrays, strict=True):
        if costs.min() == math.inf:
            raise ValueError(
                f"{place} has only inf entries, so every strategy costs inf: something must be "
                "allowed; give at least one of them a finite cost."
            )


def _total(problem: _Problem, choices: Sequence[int]) -> float:
    """The cost of a strategy in seconds, summed from the input in the input's order."""
    total = 0.0
    for costs, choice in zip(problem.node_costs, choices, strict=True):
        total += float(costs[choice])
    for (i, j), table in zip(problem.edges, problem.edge_costs, strict=True):
        total += float(table[choices[i], choices[j]])
    return total


# The paper's algorithm ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """The graph while it shrinks, at most one edge between two layers; its lists are mutated.

    `tables[i][j]`, shape (C_i, C_j), and `tables[j][i]` are the same edge and share memory.
    """

    costs: list[FloatArray]
    tables: list[dict[int, FloatArray]]


def _solve_by_elimination(problem: _Problem, enumerate_limit: int) -> _Found:
    graph = _Graph(costs=list(problem.node_costs), tables=[{} for _ in problem.node_costs])
    merged = sum(
        _connect(graph, i, j, table)
        for (i, j), table in zip(problem.edges, problem.edge_costs, strict=True)
    )
    records, more_merged = _eliminate(graph)
    eliminated = {record.layer for record in records}
    rest = [layer for layer in range(len(graph.costs)) if layer not in eliminated]
    core = _subproblem(graph, rest)
    if len(rest) > 2:  # one or two are no more work than an elimination
        _check_limit(core, enumerate_limit, f"{len(rest)} layers remain after elimination")
    known = dict(zip(rest, _depth_first(core), strict=True))
    return _Found(
        choices=_undo(records, known),
        nodes_eliminated=len(records),
        edges_eliminated=merged + more_merged,
        enumerated=_combinations(core),
        remaining=len(rest),
    )


def _connect(graph: _Graph, i: int, j: int, table: FloatArray) -> int:
    """Adds the edge i -> j; on an edge that is there it is an edge elimination: returns 1."""
    parallel = j in graph.tables[i]
    if parallel:
        table = graph.tables[i][j] + table
    graph.tables[i][j] = table
    graph.tables[j][i] = table.T
    return int(parallel)


def _eliminate(graph: _Graph) -> tuple[list[_NodeElimination], int]:
    """Node elimination until two layers remain, or none has one config or two neighbours at most.

    Fewest neighbours first, then the least work, then the lowest index. A layer's place in the
    queue changes when a neighbour goes; it is queued again then, and the old entry is stale.

    Returns:
        The records, in the order of elimination, and how many edge eliminations came with them.
    """
    queue = [_priority(graph, layer) for layer in range(len(graph.costs))]
    heapq.heapify(queue)
    records: list[_NodeElimination] = []
    gone: set[int] = set()
    merged = 0
    while queue and len(graph.costs) - len(gone) > 2:
        entry = heapq.heappop(queue)
        layer = entry[-1]
        if layer in gone or entry != _priority(graph, layer):
            continue
        if entry[0] > 2:
            break
        record, count = _eliminate_node(graph, layer)
        records.append(record)
        gone.add(layer)
        merged += count
        for neighbour, _ in record.tables:
            heapq.heappush(queue, _priority(graph, neighbour))
    return records, merged


def _priority(graph: _Graph, layer: int) -> tuple[int, int, int]:
    """(neighbours to choose for, sums that eliminating the layer would take, index)."""
    sizes = [graph.costs[n].size for n in graph.tables[layer]]
    bound = len(sizes) if graph.costs[layer].size > 1 else 0  # one config binds no neighbour
    return bound, math.prod(sizes) * graph.costs[layer].size, layer


def _eliminate_node(graph: _Graph, layer: int) -> tuple[_NodeElimination, int]:
    """Takes a layer with at most two neighbours, or with one config, out of the graph.

    Returns:
        The record for `_undo`, and 1 if an edge elimination came with it, else 0.
    """
    costs, tables = graph.costs[layer], graph.tables[layer]
    ends = sorted(tables)
    record = _NodeElimination(
        layer=layer, costs=costs, tables=tuple((end, tables[end]) for end in ends)
    )
    for end in ends:
        del graph.tables[end][layer]
    if len(ends) == 2 and costs.size > 1:
        first, last = ends
        table = _min_plus(tables[first].T + costs, tables[last])
        return record, _connect(graph, first, last, table)
    for end in ends:
        graph.costs[end] = graph.costs[end] + np.min(costs[:, None] + tables[end], axis=0)
    return record, 0


def _min_plus(left: FloatArray, right: FloatArray) -> FloatArray:
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


def _subproblem(graph: _Graph, layers: Sequence[int]) -> _Problem:
    """What is left of the graph, its layers numbered anew in the order of `layers`."""
    number = {layer: n for n, layer in enumerate(layers)}
    pairs = [(i, j) for i in layers for j in sorted(graph.tables[i]) if i < j]
    return _Problem(
        node_costs=tuple(graph.costs[layer] for layer in layers),
        edges=tuple((number[i], number[j]) for i, j in pairs),
        edge_costs=tuple(graph.tables[i][j] for i, j in pairs),
    )


def _undo(records: Sequence[_NodeElimination], known: dict[int, int]) -> tuple[int, ...]:
    """Chooses the eliminated layers' configs, last eliminated first.

    Args:
        records: the eliminations in the order they were done.
        known: layer -> config, of the layers that were left.

    Returns:
        The config of every layer.
    """
    choices = dict(known)
    for record in reversed(records):
        costs = record.costs
        for neighbour, table in record.tables:
            costs = costs + table[:, choices[neighbour]]
        choices[record.layer] = int(np.argmin(costs))
    return tuple(choices[layer] for layer in range(len(choices)))


# Enumeration ----------------------------------------------------------------------------------


def _solve_exhaustively(problem: _Problem, enumerate_limit: int) -> _Found:
    layers = len(problem.node_costs)
    _check_limit(problem, enumerate_limit, f'method "exhaustive" has {layers} layers')
    return _Found(
        choices=_depth_first(problem),
        nodes_eliminated=0,
        edges_eliminated=0,
        enumerated=_combinations(problem),
        remaining=layers,
    )


def _combinations(problem: _Problem) -> int:
    return math.prod(costs.size for costs in problem.node_costs)


def _check_limit(problem: _Problem, limit: int, what: str) -> None:
    """ValueError if the problem has more combinations of configs than the limit."""
    combinations = _combinations(problem)
    if combinations > limit:
        raise ValueError(
            f"{what}, with {combinations:,} combinations of configs to enumerate: this must be "
            f"at most enumerate_limit={limit:,}; give these layers fewer configs, or raise "
            "enumerate_limit if you can wait (about 10 ns per combination)."
        )


def _depth_first(problem: _Problem) -> tuple[int, ...]:
    """Depth-first search over all configs of all layers, nothing pruned: the first optimum.

    The outer layers are searched one config at a time. The inner ones, as many of the last
    layers as fit a block, are one flat axis P of all their combinations, in numpy.
    """
    sizes = [costs.size for costs in problem.node_costs]
    outer = next(n for n in range(len(sizes)) if _fits(sizes[n:]))
    inner = _all_combinations(sizes[outer:])
    best_s, best = math.inf, (0,) * len(sizes)
    for prefix, costs in _descend(problem, inner, (), _inner_costs(problem, inner)):
        first = int(np.argmin(costs))
        if costs[first] < best_s:
            best_s, best = float(costs[first]), (*prefix, *(int(c) for c in inner[:, first]))
    return best


def _fits(sizes: Sequence[int]) -> bool:
    return len(sizes) == 1 or math.prod(sizes) <= _BLOCK


def _all_combinations(sizes: Sequence[int]) -> NDArray[np.intp]:
    """Shape (layers, P): the configs of all P combinations, the last layer's fastest."""
    flat = np.arange(math.prod(sizes))
    strides = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    return np.stack([flat // stride % n for stride, n in zip(strides, sizes, strict=True)])


def _inner_costs(problem: _Problem, inner: NDArray[np.intp]) -> FloatArray:
    """Shape (P,): the costs of the inner layers, and of the edges among them."""
    outer = len(problem.node_costs) - len(inner)
    costs = np.zeros(inner.shape[1])
    for own, configs in zip(problem.node_costs[outer:], inner, strict=True):
        costs += own[configs]
    for (i, j), table in zip(problem.edges, problem.edge_costs, strict=True):
        if min(i, j) >= outer:
            costs += table[inner[i - outer], inner[j - outer]]
    return costs


def _descend(
    problem: _Problem, inner: NDArray[np.intp], prefix: tuple[int, ...], costs: FloatArray
) -> Iterator[tuple[tuple[int, ...], FloatArray]]:
    """Extends `prefix`, the configs of the first layers, to all the outer layers in every way.

    Args:
        problem: the layers and edges.
        inner: shape (inner layers, P), all combinations of the inner layers' configs.
        prefix: the configs of the first layers.
        costs: shape (P,), the cost of the prefix and the inner layers, for each combination.

    Yields:
        The configs of all outer layers, and the P costs with them.
    """
    layer, outer = len(prefix), len(problem.node_costs) - len(inner)
    if layer == outer:
        yield prefix, costs
        return
    for config in range(problem.node_costs[layer].size):
        more = costs + problem.node_costs[layer][config]
        for (i, j), table in zip(problem.edges, problem.edge_costs, strict=True):
            if layer not in (i, j):
                continue
            row, other = (table[config], j) if layer == i else (table[:, config], i)
            if other < layer:
                more += row[prefix[other]]
            elif other >= outer:
                more += row[inner[other - outer]]
        yield from _descend(problem, inner, (*prefix, config), more)


_METHODS: dict[str, Callable[[_Problem, int], _Found]] = {
    "elimination": _solve_by_elimination,
    "exhaustive": _solve_exhaustively,
}
