"""The search for a strategy: objectives, search, wide spaces, explanation.

Read `_search` first. `_objective` says what is made least; `_measured` measures layers as the
search picks them; `_wide` and `_floor` are for spaces of many devices; `_explain` and `_pareto` say
why, and what else there is; `_diff` sets two strategies beside each other.
"""

from jaxlwp.optimize._diff import StrategyDiff, diff_strategies
from jaxlwp.optimize._explain import Alternative, Explanation, RankedStrategy, explain, runners_up
from jaxlwp.optimize._measured import measured_space, search_measured
from jaxlwp.optimize._objective import (
    OBJECTIVES,
    MovedBytes,
    Objective,
    Overlap,
    PeakMemory,
    PlainSum,
)
from jaxlwp.optimize._pareto import ParetoCurve, ParetoPoint, pareto
from jaxlwp.optimize._search import SearchResult, search
from jaxlwp.optimize._wide import ROUNDS, is_large, price_around

__all__ = [
    "Alternative",
    "Explanation",
    "MovedBytes",
    "OBJECTIVES",
    "Objective",
    "Overlap",
    "ParetoCurve",
    "ParetoPoint",
    "PeakMemory",
    "PlainSum",
    "ROUNDS",
    "RankedStrategy",
    "SearchResult",
    "StrategyDiff",
    "diff_strategies",
    "explain",
    "is_large",
    "measured_space",
    "pareto",
    "price_around",
    "runners_up",
    "search",
    "search_measured",
]
