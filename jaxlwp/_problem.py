"""The problem that the search solves, checked: costs of layers and edges, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from jaxlwp._tables import FloatArray, check_costs, check_edges


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Checked input: C_l is the number of configs of layer l."""

    node_costs: tuple[FloatArray, ...]  # per layer, shape (C_l,)
    edges: tuple[tuple[int, int], ...]
    edge_costs: tuple[FloatArray, ...]  # per edge (i, j), shape (C_i, C_j)

    def total(self, choices: Sequence[int]) -> float:
        """The cost of a strategy in seconds, summed in the order of the input."""
        total = 0.0
        for costs, choice in zip(self.node_costs, choices, strict=True):
            total += float(costs[choice])
        for (i, j), table in zip(self.edges, self.edge_costs, strict=True):
            total += float(table[choices[i], choices[j]])
        return total


def check_problem(
    node_costs: Sequence[ArrayLike],
    edges: Sequence[tuple[int, int]],
    edge_costs: Sequence[ArrayLike],
) -> Problem:
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
    return Problem(node_costs=nodes, edges=pairs, edge_costs=tables)


def _check_allowed(places: Sequence[str], arrays: Sequence[FloatArray]) -> None:
    """ValueError if one array alone already rules out every strategy."""
    for place, costs in zip(places, arrays, strict=True):
        if costs.min() == math.inf:
            raise ValueError(
                f"{place} has only inf entries, so every strategy costs inf: something must be "
                "allowed; give at least one of them a finite cost."
            )
