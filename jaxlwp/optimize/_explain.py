"""Why this strategy: what every other config would cost, who comes second, what a constraint costs.

All answers are from the tables of the search, and as exact as the search: no answer is an estimate
around the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlwp.cost import Problem, restrict
from jaxlwp.optimize._search import SearchResult, search
from jaxlwp.solver import Cost, FloatArray, k_best, min_marginals
from jaxlwp.space import Config, Constraints, Split, Strategy


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A config that a layer could have.

    Attributes:
      config: the config.
      best_s: predicted seconds of the best strategy that uses it; inf if none may.
      extra_s: what that is more than the optimum.
      measured: whether the layer's time under the config is measured, or analytic.
    """

    config: Config
    best_s: float
    extra_s: float
    measured: bool


@dataclass(frozen=True, kw_only=True)
class RankedStrategy:
    """One of the cheapest strategies.

    Attributes:
      strategy: named "search 1", "search 2", and so on.
      cost: its predicted cost.
      changed: the layers whose config differs from the optimum's.
    """

    strategy: Strategy
    cost: Cost
    changed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the search knows besides the optimum; made by `explain`.

    Attributes:
      space: what was searched.
      best_s: per layer, shape (configs,): seconds of the best strategy that has this config.
    """

    space: Problem = field(repr=False)
    best_s: tuple[FloatArray, ...] = field(repr=False)

    @property
    def optimum_s(self) -> float:
        """Predicted seconds of the best strategy."""
        return float(self.best_s[0].min())

    def alternatives(self, layer: str, containing: Sequence[str] = ()) -> tuple[Alternative, ...]:
        """The configs of a layer, the best first.

        Args:
          layer: its name.
          containing: dimensions that must be split; `("height",)` asks "why not height here?".

        Raises:
          ValueError: there is no such layer.
        """
        number = self._number(layer)
        best_s, optimum_s = self.best_s[number], self.optimum_s
        measured = self.space.measured[number] if self.space.measured else None
        return tuple(
            Alternative(
                config=self.space.configs[number][n],
                best_s=float(best_s[n]),
                # Both are sums in different orders: the optimum's own configs must show 0.
                extra_s=max(0.0, float(best_s[n]) - optimum_s),
                measured=measured is not None and bool(measured[n]),
            )
            for n in np.argsort(best_s, kind="stable")
            if all(self.space.configs[number][n].axes(name) for name in containing)
        )

    def best_with(self, layer: str, split: Split) -> SearchResult[Problem]:
        """The best strategy in which a layer has a certain split.

        Args:
          layer: its name.
          split: as in `Constraints.pin`.

        Raises:
          ValueError: there is no such layer, or it cannot be split like that.
        """
        self._number(layer)
        return search(restrict(self.space, Constraints(pin={layer: split})))

    def price(self, constraints: Constraints) -> float:
        """Seconds of a step that constraints cost: the best that keeps to them less the optimum.

        Raises:
          ValueError: as `jaxlwp.cost.restrict`, or no strategy that keeps to them is allowed.
        """
        found = search(restrict(self.space, constraints))
        return max(0.0, found.cost.total_s - self.optimum_s)

    def _number(self, layer: str) -> int:
        names = [known.name for known in self.space.graph.layers]
        if layer not in names:
            raise ValueError(f"explain: there is no layer {layer!r}; there are {', '.join(names)}")
        return names.index(layer)

    def __str__(self) -> str:
        """A row per layer: its config, and the best alternatives."""
        from jaxlwp.report import explanation_table, render

        return render(explanation_table(self))


def explain(space: Problem) -> Explanation:
    """What the best strategy costs with every config of every layer.

    Args:
      space: from `price` or `load_problem`, or `SearchResult.space`.

    Raises:
      ValueError: no strategy is allowed, or the graph is so dense that tables would exceed memory.
    """
    tables = space.tables
    best_s = min_marginals(tables.node_costs_s, tables.edges, tables.transfer_s)
    return Explanation(space=space, best_s=tuple(array + tables.step_s for array in best_s))


def runners_up(space: Problem, k: int = 5) -> tuple[RankedStrategy, ...]:
    """The k best strategies of a space, the optimum first.

    Args:
      space: from `price` or `load_problem`, or `SearchResult.space`.
      k: how many.

    Returns:
      All different, by rising cost; fewer than k if fewer are allowed.

    Raises:
      ValueError: `k` is less than 1, or as `explain`.
    """
    tables = space.tables
    ranked = k_best(tables.node_costs_s, tables.edges, tables.transfer_s, k)
    names = [layer.name for layer in space.graph.layers]
    return tuple(
        RankedStrategy(
            strategy=space.strategy(f"search {n}", found.choices),
            cost=tables.evaluate(found.choices),
            changed=tuple(
                name
                for name, a, b in zip(names, found.choices, ranked[0].choices, strict=True)
                if a != b
            ),
        )
        for n, found in enumerate(ranked, start=1)
    )
