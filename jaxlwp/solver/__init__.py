"""Exact search on cost tables: numbers alone, no layers, no devices, no JAX.

Read `_tables` (costs of a problem) and `_solve` (which method when), then the methods:
`_eliminate`, `_bound`, `_branch`; `_exhaustive` is the paper's baseline. `_marginals` answers what
each config costs at best. `_limit`, `_least`, `_minmax` are problems with several sums (`_linear`:
linear programs).
"""

from jaxlwp.solver._limit import LayerBytes, LimitedSolution, MemoryLimitError, solve_limited
from jaxlwp.solver._marginals import DenseGraphError, RankedChoices, k_best, min_marginals
from jaxlwp.solver._minmax import MinMaxSolution, Rows, minimize_max
from jaxlwp.solver._solve import Solution, solve
from jaxlwp.solver._tables import Cost, CostTables, FloatArray

__all__ = [
    "Cost",
    "CostTables",
    "DenseGraphError",
    "FloatArray",
    "LayerBytes",
    "LimitedSolution",
    "MemoryLimitError",
    "MinMaxSolution",
    "RankedChoices",
    "Rows",
    "Solution",
    "k_best",
    "min_marginals",
    "minimize_max",
    "solve",
    "solve_limited",
]
