"""Explanations from the same tables: the best strategy with each config, and the k best of all.

Both rest on what elimination leaves behind (`_eliminate.Bucket`). Read in reverse order, a bucket
says what the best completion costs with each config of its layer, given the configs of its
neighbours that are eliminated later. `k_best` follows these costs down from several places at once;
`min_marginals` carries what the rest of the graph costs down to each bucket's layers.

Numbers only: no layers, no devices, no JAX.
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jaxlwp.solver._eliminate import (
    Bucket,
    Scope,
    aligned,
    eliminate,
    make_graph,
    plan_order,
    sum_of,
)
from jaxlwp.solver._problem import Problem, check_problem
from jaxlwp.solver._tables import FloatArray

_ENTRIES_LIMIT = 1 << 26
"""Entries of a table that may be made: 512 MiB."""


class DenseGraphError(ValueError):
    """A table would exceed memory: only searches that need no such tables are possible."""


@dataclass(frozen=True, kw_only=True)
class RankedChoices:
    """One of the cheapest strategies.

    Attributes:
        choices: per layer, the index of its config.
        cost_s: what the strategy costs in seconds, summed from the tables given.
    """

    choices: tuple[int, ...]
    cost_s: float


def min_marginals(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
) -> tuple[FloatArray, ...]:
    """For every layer and config, what the best strategy that uses it costs: exactly, to rounding.

    Examples:
        Both layers would rather have config 0, but not together:

        >>> inf = float("inf")
        >>> min_marginals([[1, 5], [1, 3]], [(0, 1)], [[[inf, 0], [0, 0]]])
        (array([4., 6.]), array([6., 4.]))

    Args:
        node_costs: as for `jaxlwp.solve`.
        edges: as for `jaxlwp.solve`.
        edge_costs: as for `jaxlwp.solve`.

    Returns:
        Per layer, shape (C_l,), seconds; inf for a config that no allowed strategy has. The least
        of each is the optimum.

    Raises:
        ValueError: the input is malformed, as for `jaxlwp.solve`; no strategy is allowed; or the
            graph is so dense that a table would exceed memory.
    """
    problem = check_problem(node_costs, edges, edge_costs)
    with np.errstate(over="ignore"):
        buckets = _buckets(problem)
        result = _downward(problem, buckets)
    _check_optimum(problem, float(result[0].min()))
    return tuple(result)


def k_best(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
    k: int,
) -> tuple[RankedChoices, ...]:
    """The k cheapest strategies, the cheapest first.

    Examples:
        >>> [(s.choices, s.cost_s) for s in k_best([[1, 5], [0, 2]], [], [], 3)]
        [((0, 0), 1.0), ((0, 1), 3.0), ((1, 0), 5.0)]

    Args:
        node_costs: as for `jaxlwp.solve`.
        edges: as for `jaxlwp.solve`.
        edge_costs: as for `jaxlwp.solve`.
        k: how many, at least 1.

    Returns:
        All different, by rising cost; fewer than k if fewer are allowed.

    Raises:
        ValueError: `k` is less than 1, or as for `min_marginals`.
    """
    if k < 1:
        raise ValueError(f"k is {k}: it must be 1 or more, the number of strategies wanted.")
    problem = check_problem(node_costs, edges, edge_costs)
    with np.errstate(over="ignore"):
        found = _follow(_buckets(problem), k)
    ranked = [RankedChoices(choices=tuple(c), cost_s=problem.total(c)) for c in found]
    ranked = [r for r in ranked if r.cost_s < math.inf]
    _check_optimum(problem, ranked[0].cost_s if ranked else math.inf)
    return tuple(sorted(ranked, key=lambda r: r.cost_s))


def _buckets(problem: Problem) -> list[Bucket]:
    """All layers eliminated.

    Raises:
        ValueError: a table would be too large.
    """
    graph, _ = make_graph(problem)
    order = plan_order([costs.size for costs in graph.costs], graph.scopes())
    entries = order.entries * max(costs.size for costs in graph.costs)
    if entries > _ENTRIES_LIMIT:
        raise DenseGraphError(
            f"the graph is too dense: a table over {order.width + 1} layers with up to {entries:,} "
            f"entries would be made, of at most {_ENTRIES_LIMIT:,}; give its layers fewer configs."
        )
    return eliminate(graph, order.layers)[0]


def _check_optimum(problem: Problem, cost_s: float) -> None:
    if cost_s == math.inf:
        raise ValueError(
            f"every strategy of these {len(problem.node_costs)} layers costs inf, so none is "
            "allowed; allow more configs, or more pairs of configs on the edges."
        )


# Min-marginals ----------------------------------------------------------------------------------


def _downward(problem: Problem, buckets: Sequence[Bucket]) -> list[FloatArray]:
    """The min-marginals of all layers, from the last bucket to the first.

    A bucket's table, over its layer and the neighbours N that it was eliminated with, gets what
    everything else costs given N: the least of the table of the bucket that its message went to,
    less the message, which is in there.
    """
    sizes = {n: costs.size for n, costs in enumerate(problem.node_costs)}
    place = {bucket.layer: n for n, bucket in enumerate(buckets)}
    near = [
        tuple(sorted({n for scope, _ in bucket.factors for n in scope} - {bucket.layer}))
        for bucket in buckets
    ]
    # A layer of one config sends no message over all its neighbours; all such go first.
    parents = [
        min(place[n] for n in others) if others and sizes[bucket.layer] > 1 else None
        for bucket, others in zip(buckets, near, strict=True)
    ]
    waiting = collections.Counter(parents)
    alone = [float(b.costs.min()) for b in buckets if not b.factors and sizes[b.layer] > 1]
    single = math.fsum(float(b.costs[0]) for b in buckets if sizes[b.layer] == 1)
    optimum = math.fsum(alone) + single
    result = [np.full(1, optimum) for _ in buckets]
    tables: dict[int, FloatArray] = {}
    for at in reversed(range(len(buckets))):
        bucket, parent = buckets[at], parents[at]
        if sizes[bucket.layer] == 1:
            continue
        axes = (bucket.layer, *near[at])
        table = sum_of(axes, list(bucket.factors), sizes, bucket.costs)
        message = np.min(table, axis=0)
        if parent is None:
            table += optimum - float(message) if message < math.inf else 0.0
        else:
            whole = _least(tables[parent], (buckets[parent].layer, *near[parent]), near[at])
            rest = np.zeros_like(message)
            table += np.subtract(whole, message, out=rest, where=message < math.inf)
            waiting[parent] -= 1
            if not waiting[parent]:
                del tables[parent]
        result[bucket.layer] = _least(table, axes, (bucket.layer,))
        if waiting[at]:
            tables[at] = table
    return result


def _least(table: FloatArray, axes: Scope, kept: Scope) -> FloatArray:
    """The least over all axes but `kept`, which come in ascending order."""
    table = np.min(table, axis=tuple(n for n, layer in enumerate(axes) if layer not in kept))
    left = tuple(layer for layer in axes if layer in kept)
    return aligned(left, table, kept)


# The k best -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A strategy that leaves another one at one bucket, and is best from there on.

    Attributes:
        choices: per layer, its config, right for the buckets above.
        at: the bucket.
        configs: its layer's configs, by rising cost.
        costs: what the best strategy with each of them costs, given `choices`.
        rank: which of them this strategy has.
    """

    choices: tuple[int, ...]
    at: int
    configs: tuple[int, ...]
    costs: tuple[float, ...]
    rank: int


def _follow(buckets: Sequence[Bucket], k: int) -> list[list[int]]:
    """The k best strategies, in order: Lawler's partition, with the exact cost of each part.

    The strategies that follow a known one up to some bucket, and there take another config, are
    one part; the best of each part is known without a search.
    """
    found: list[list[int]] = []
    choices, queue = [0] * len(buckets), list[tuple[float, int, _Turn]]()
    turned, count = len(buckets), 0
    optimum = math.fsum(float(b.costs.min()) for b in buckets if not b.factors)
    cost_s = optimum + math.fsum(
        float(b.costs[0]) for b in buckets if b.factors and b.costs.size == 1
    )
    while True:
        for at in reversed(range(turned)):
            turn = _turn(buckets[at], at, choices, cost_s, k)
            choices[buckets[at].layer] = turn.configs[0]
            count = _push(queue, turn, count)
        found.append(choices)
        if len(found) == k or not queue:
            return found
        cost_s, _, turn = heapq.heappop(queue)
        count = _push(queue, turn, count)
        choices, turned = list(turn.choices), turn.at
        choices[buckets[turned].layer] = turn.configs[turn.rank]


def _turn(bucket: Bucket, at: int, choices: Sequence[int], cost_s: float, k: int) -> _Turn:
    """The best at a bucket, and what else there is; `cost_s` is what the best costs in all."""
    given = bucket.given(choices)
    order = np.argsort(given, kind="stable")[: k + 1]
    extra = given[order] - given[order[0]] if given[order[0]] < math.inf else given[order]
    return _Turn(
        choices=tuple(choices),
        at=at,
        configs=tuple(order.tolist()),
        costs=tuple((cost_s + extra).tolist()),
        rank=0,
    )


def _push(queue: list[tuple[float, int, _Turn]], turn: _Turn, count: int) -> int:
    """Queues the next best config of a turn, if there is one; counts what was queued."""
    rank = turn.rank + 1
    if rank == len(turn.configs) or turn.costs[rank] == math.inf:
        return count
    following = _Turn(
        choices=turn.choices, at=turn.at, configs=turn.configs, costs=turn.costs, rank=rank
    )
    heapq.heappush(queue, (turn.costs[rank], count, following))
    return count + 1
