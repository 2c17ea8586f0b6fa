"""Exhaustive search, the baseline of Jia et al. (ICML 2018): depth first, nothing pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxlwp.solver._problem import Problem
from jaxlwp.solver._tables import FloatArray

# Entries of one block of partial sums: 512 KiB, half of a common L2 cache.
_BLOCK = 1 << 16


def combinations(problem: Problem) -> int:
    """How many strategies there are."""
    return math.prod(costs.size for costs in problem.node_costs)


def depth_first(problem: Problem, offer: Callable[[Sequence[int]], None]) -> None:
    """Depth-first search over all configs of all layers, nothing pruned.

    The outer layers are searched one config at a time. The inner ones, as many of the last
    layers as fit a block, are one flat axis P of all their combinations, in numpy.

    Args:
        problem: the costs.
        offer: called with every strategy better than those before; at last, so, the first optimum.
    """
    sizes = [costs.size for costs in problem.node_costs]
    outer = next(n for n in range(len(sizes)) if _fits(sizes[n:]))
    inner = _all_combinations(sizes[outer:])
    best_s = math.inf
    for prefix, costs in _descend(problem, inner, (), _inner_costs(problem, inner)):
        first = int(np.argmin(costs))
        if costs[first] < best_s:
            best_s = float(costs[first])
            offer((*prefix, *(int(c) for c in inner[:, first])))


def _fits(sizes: Sequence[int]) -> bool:
    return len(sizes) == 1 or math.prod(sizes) <= _BLOCK


def _all_combinations(sizes: Sequence[int]) -> NDArray[np.intp]:
    """Shape (layers, P): the configs of all P combinations, the last layer's fastest."""
    flat = np.arange(math.prod(sizes))
    strides = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    return np.stack([flat // stride % n for stride, n in zip(strides, sizes, strict=True)])


def _inner_costs(problem: Problem, inner: NDArray[np.intp]) -> FloatArray:
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
    problem: Problem, inner: NDArray[np.intp], prefix: tuple[int, ...], costs: FloatArray
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
