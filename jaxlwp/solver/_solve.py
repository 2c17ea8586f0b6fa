"""The search for the cheapest strategy, on numbers alone: no layers, no devices, no JAX.

The problem: one config for each layer, such that the layers' costs plus the edges' costs are
least. Method "elimination" takes what is enough, in this order:

1. Where variable elimination (`_eliminate`) is quick, it is all: node and edge elimination of Jia
   et al. (ICML 2018, section 5), for layers with any number of neighbours.
2. Message passing (`_bound`) bounds what every strategy costs, and every strategy with a given
   config, and finds good strategies as it goes. If the bound meets the best strategy, that one is
   optimal; else configs whose bound is above it are dropped.
3. What is left is eliminated if its tables are not too large.
4. Otherwise layers with at most two neighbours are eliminated, and branch and bound (`_branch`)
   searches the rest, each connected part on its own.

"exhaustive" is `_exhaustive` on the whole problem: the paper's baseline.

Nothing depends on hash order, and on a clock only where a time limit ends the search (a limit of
work ends it at the same place on every machine): where costs tie, the first config wins, and the
same input always gives the same choices. Bounds are compared with an allowance for rounding. A sum
of costs that overflows is infinite: not allowed.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jaxlwp.solver import _exhaustive
from jaxlwp.solver._bound import Bounded, Report, elimination_work, sweep_work, tighten
from jaxlwp.solver._branch import branch
from jaxlwp.solver._eliminate import (
    Graph,
    Order,
    best_choices,
    connected,
    eliminate,
    make_graph,
    plan_order,
    plan_sparse,
    restricted,
    subgraph,
)
from jaxlwp.solver._problem import BoundedSolution, Problem, check_problem

_DIRECT_SWEEPS = 8
"""Elimination that takes no more than so many sweeps of message passing is done at once."""

_SUMS_LIMIT = 1 << 31
"""Sums of costs that elimination may compare, about 3 s; with more it is branch and bound."""

_ENTRIES_LIMIT = 1 << 25
"""Entries of a table that elimination may make: 256 MiB."""


@dataclass(frozen=True, kw_only=True)
class Solution(BoundedSolution):
    """The strategy that a search found, and what is known of it.

    Its cost is summed anew from the tables given; if it is optimal, that is its lower bound too.

    Attributes:
        method: the method that found it.
        nodes_eliminated: how many node eliminations were done.
        edges_eliminated: how many edge eliminations were done.
        width: the most neighbours that a layer had when it was eliminated.
        configs_dropped: how many configs bounds showed to be in no better strategy.
        enumerated: how many combinations of configs were enumerated or, branching, bounded.
        remaining: K, how many layers they were combinations of.
        work: what the search took, in units of one sum of two costs, about.
    """

    method: str
    nodes_eliminated: int
    edges_eliminated: int
    width: int
    configs_dropped: int
    enumerated: int
    remaining: int
    work: int = 0


class _LimitError(Exception):
    """The limit of time, or of work, is over; never leaves this module."""


@dataclass(kw_only=True)
class _Progress:
    """What a search knows so far; a search that is interrupted leaves it behind."""

    problem: Problem
    deadline: float = math.inf
    work_limit: float = math.inf
    work: int = 0
    choices: tuple[int, ...] = ()
    cost_s: float = math.inf
    lower_bound_s: float = 0.0
    nodes_eliminated: int = 0
    edges_eliminated: int = 0
    width: int = 0
    configs_dropped: int = 0
    enumerated: int = 0
    remaining: int = 0

    def offer(self, choices: Sequence[int]) -> None:
        """Keeps a strategy if it is the best so far."""
        cost_s = self.problem.total(choices)
        if cost_s < self.cost_s:
            self.choices, self.cost_s = tuple(choices), cost_s

    def bound(self, lower_bound_s: float, work: int) -> None:
        """Keeps a lower bound if it is the best so far; see `spend`."""
        self.lower_bound_s = max(self.lower_bound_s, lower_bound_s)
        self.spend(work)

    def spend(self, work: int) -> None:
        """Counts work that was or will be done; ends the search if that is more than it may do."""
        self.work += work
        if self.work > self.work_limit:
            raise _LimitError
        self.check()

    def check(self) -> None:
        """Looks at the clock."""
        if time.perf_counter() > self.deadline:
            raise _LimitError


def solve(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
    *,
    method: str = "elimination",
    time_limit_s: float | None = None,
    work_limit: float | None = None,
    enumerate_limit: int = 1_000_000,
) -> Solution:
    """Finds one config per layer such that the sum of all costs is least.

    Examples:
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
        method: "elimination" (with bounds, and branching where the graph is too dense), or
            "exhaustive", depth-first search over all configs of all layers, the paper's baseline.
            Both are exact.
        time_limit_s: after so many seconds (and the step under way) the search ends with the best
            strategy and bound that it has; None for no limit. So does Ctrl-C.
        work_limit: the same after so much work, in units of one sum of two costs (a nanosecond or
            two): a limit that gives the same result on every machine. "exhaustive" has
            `enumerate_limit` instead.
        enumerate_limit: the most combinations of configs that "exhaustive" may enumerate.

    Returns:
        An optimal solution; or, if it was ended before that was proven, one with a gap. Among
        strategies that cost the same, always the same one.

    Raises:
        ValueError: the method is unknown, a shape or an index does not fit, a cost is NaN or
            negative, a limit is, "exhaustive" has more combinations than `enumerate_limit`, or no
            strategy is allowed.
        TimeoutError: a limit ended the search before it found an allowed strategy.
    """
    start = time.perf_counter()
    search = _METHODS.get(method)
    if search is None:
        known = ", ".join(f'"{name}"' for name in _METHODS)
        raise ValueError(f"method is {method!r}: it must be one of {known}; choose one of these.")
    if time_limit_s is not None and not time_limit_s >= 0:
        raise ValueError(
            f"time_limit_s is {time_limit_s}: it must be 0 s or more; give None for no limit."
        )
    if work_limit is not None and not work_limit >= 0:
        raise ValueError(f"work_limit is {work_limit}: it must be 0 or more; give None for none.")
    problem = check_problem(node_costs, edges, edge_costs)
    if method == "exhaustive":
        _check_limit(problem, enumerate_limit)
    progress = _Progress(
        problem=problem,
        deadline=start + (math.inf if time_limit_s is None else time_limit_s),
        work_limit=math.inf if work_limit is None else work_limit,
    )
    ended = False
    with np.errstate(over="ignore"):
        try:
            search(progress)
        except (_LimitError, KeyboardInterrupt) as reason:
            ended = True
            _give_up(progress, reason)
    if progress.cost_s == math.inf:
        raise ValueError(
            f"every strategy of these {len(problem.node_costs)} layers costs inf, so none is "
            "allowed: each layer and each edge has a finite cost, but no choice of configs has "
            "only finite ones; allow more configs, or more pairs of configs on the edges."
        )
    lower_bound_s = min(progress.lower_bound_s, progress.cost_s) if ended else progress.cost_s
    return Solution(
        choices=progress.choices,
        cost_s=progress.cost_s,
        lower_bound_s=lower_bound_s,
        optimal=not ended or lower_bound_s == progress.cost_s,
        method=method,
        wall_s=time.perf_counter() - start,
        nodes_eliminated=progress.nodes_eliminated,
        edges_eliminated=progress.edges_eliminated,
        width=progress.width,
        configs_dropped=progress.configs_dropped,
        enumerated=progress.enumerated,
        remaining=progress.remaining,
        work=progress.work,
    )


def _give_up(progress: _Progress, reason: BaseException) -> None:
    """Makes the best of a search that was ended: raises if it has found no strategy."""
    problem = progress.problem
    progress.offer([int(np.argmin(costs)) for costs in problem.node_costs])
    if progress.cost_s == math.inf:
        if isinstance(reason, KeyboardInterrupt):
            raise reason
        raise TimeoutError(
            "the limit of the search (time_limit_s, work_limit) is over, and no allowed strategy "
            "is found yet: most pairs of configs cost inf; give the search more, or allow more."
        )
    least = (float(costs.min()) for costs in (*problem.node_costs, *problem.edge_costs))
    progress.lower_bound_s = max(progress.lower_bound_s, math.fsum(least) * (1 - 1e-12))


# Elimination, bounds and branching --------------------------------------------------------------


def _solve_by_elimination(progress: _Progress) -> None:
    graph, progress.edges_eliminated = make_graph(progress.problem)
    order = _plan(graph)
    if _fits(order) and elimination_work(order) <= _DIRECT_SWEEPS * sweep_work(graph):
        progress.offer(_eliminate_all(progress, graph, order))
        return
    first = [int(np.argmin(costs)) for costs in graph.costs]
    _solve_dense(progress, Bounded(graph, first, progress.offer), order, progress.bound)


def _plan(graph: Graph) -> Order:
    return plan_order([costs.size for costs in graph.costs], graph.scopes())


def _fits(order: Order) -> bool:
    return order.sums <= _SUMS_LIMIT and order.entries <= _ENTRIES_LIMIT


def _eliminate_all(progress: _Progress, graph: Graph, order: Order) -> list[int]:
    """The best strategy of a graph, which is used up."""
    progress.spend(elimination_work(order))
    buckets, _, merged = eliminate(graph, order.layers, progress.check)
    progress.nodes_eliminated += len(buckets)
    progress.edges_eliminated += merged
    progress.width = max(progress.width, order.width)
    return best_choices(buckets, [0] * len(order.layers))


def _solve_dense(progress: _Progress, bounded: Bounded, order: Order, report: Report) -> None:
    """Bounds first; then elimination, parts on their own, or branching: the first that will do.

    Args:
        progress: counts what is done.
        bounded: the graph; the best strategy is offered to it.
        order: an elimination order of it.
        report: called with lower bounds and work; ends the search by raising.
    """
    order = tighten(bounded, order, report)
    progress.configs_dropped += bounded.dropped
    if bounded.closed:
        return
    graph = restricted(bounded.graph, bounded.names)
    order = order if _fits(order) else _plan(graph)
    if _fits(order):
        bounded.offer(bounded.named(_eliminate_all(progress, graph, order)))
        return
    sparse = plan_sparse([costs.size for costs in graph.costs], graph.scopes())
    parts = connected(graph, set(range(len(graph.costs))).difference(sparse))
    if sparse or len(parts) > 1:
        _solve_parts(progress, bounded, graph, sparse, report)
        return
    progress.remaining += len(graph.costs)
    progress.enumerated += branch(
        bounded.relaxation,
        upper_s=lambda: bounded.upper_s - bounded.slack_s,
        offer=lambda choices: bounded.offer(bounded.named(choices)),
        lower=lambda lower_s, work: report(min(lower_s, bounded.upper_s) - bounded.slack_s, work),
    )


def _solve_parts(
    progress: _Progress,
    whole: Bounded,
    graph: Graph,
    sparse: Sequence[int],
    report: Report,
) -> None:
    """Eliminates the layers `sparse`, and solves each connected part of the rest.

    Args:
        progress: counts what is done.
        whole: the graph before configs were dropped; the best strategy is offered to it.
        graph: what is left of it; used up.
        sparse: layers of at most two neighbours each, in the order of their elimination.
        report: called with lower bounds of the whole, and work.
    """
    choices = [int(np.searchsorted(n, c)) for n, c in zip(whole.names, whole.best, strict=True)]
    buckets, constant, merged = eliminate(graph, sparse, progress.check)
    progress.nodes_eliminated += len(buckets)
    progress.edges_eliminated += merged
    progress.width = max(progress.width, 2)
    parts = connected(graph, set(range(len(graph.costs))).difference(sparse))

    def offer(layers: Sequence[int], part: Sequence[int]) -> None:
        for layer, choice in zip(layers, part, strict=True):
            choices[layer] = choice
        whole.offer(whole.named(best_choices(buckets, list(choices))))

    offer((), ())  # the eliminated layers' best, given what is known of the others
    bounds = [
        Bounded(
            subgraph(graph, layers),
            [choices[layer] for layer in layers],
            functools.partial(offer, layers),
        )
        for layers in parts
    ]
    for n, part in enumerate(bounds):

        def of_whole(lower_s: float, work: int, n: int = n) -> None:
            others = (other.lower_s for m, other in enumerate(bounds) if m != n)
            report(constant + math.fsum(others) + lower_s, work)

        _solve_dense(progress, part, _plan(part.graph), of_whole)
        part.lower_s = max(part.lower_s, part.upper_s - part.slack_s)


def _solve_exhaustively(progress: _Progress) -> None:
    def offer(choices: Sequence[int]) -> None:
        progress.offer(choices)
        progress.check()

    progress.enumerated = _exhaustive.combinations(progress.problem)
    progress.remaining = len(progress.problem.node_costs)
    _exhaustive.depth_first(progress.problem, offer)


def _check_limit(problem: Problem, limit: int) -> None:
    """ValueError if there are more combinations of configs than the limit."""
    combinations = _exhaustive.combinations(problem)
    if combinations > limit:
        raise ValueError(
            f'method "exhaustive" has {len(problem.node_costs)} layers, with {combinations:,} '
            f"combinations of configs to enumerate: this must be at most enumerate_limit={limit:,};"
            " give these layers fewer configs, or raise enumerate_limit if you can wait (about "
            "10 ns per combination)."
        )


_METHODS: dict[str, Callable[[_Progress], None]] = {
    "elimination": _solve_by_elimination,
    "exhaustive": _solve_exhaustively,
}
