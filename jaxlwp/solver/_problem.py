"""The problem that the search solves, checked, and what every solution of it tells, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from jaxlwp.solver._tables import FloatArray, check_costs, check_edges


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


@dataclass(frozen=True, kw_only=True)
class BoundedSolution:
    """The best strategy found, and what is proven of all others.

    Two solutions are equal if all but their wall times are.

    Attributes:
        choices: per layer, the index of its config.
        cost_s: the strategy's cost in seconds, or in the unit of the objective.
        lower_bound_s: no strategy that is allowed costs less.
        optimal: whether the search proved that nothing is cheaper, to rounding.
        wall_s: how long the search took, in seconds.
    """

    choices: tuple[int, ...]
    cost_s: float
    lower_bound_s: float
    optimal: bool
    wall_s: float = field(compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound_s <= self.cost_s < math.inf:
            raise ValueError(
                f"{type(self).__name__}.lower_bound_s is {self.lower_bound_s} and cost_s "
                f"{self.cost_s}: a lower bound must be from 0 to the cost, and the cost finite; "
                "check both."
            )

    @property
    def gap(self) -> float:
        """The share of `cost_s` that a better strategy could save at most; 0.0 if optimal."""
        if self.optimal or self.cost_s == 0:
            return 0.0
        return (self.cost_s - self.lower_bound_s) / self.cost_s


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
