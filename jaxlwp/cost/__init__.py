"""Seconds: what layers, changes of layout and whole strategies take.

Read `_collectives` first (what is communicated, read off the program of one device), then `_model`
(a `CostModel` turns work and collectives into seconds), `_kernels` (work as XLA for GPUs fuses
it), `_changes` (all changes of layout between two layers at once), `_search_space` (a graph, its
configs and their costs) and `_shares` (what of a layer's work is which pass).
"""

from jaxlwp.cost._collectives import (
    argument_collectives,
    collectives_by_layer,
    layer_collectives,
    spare_sums,
    strategy_collectives,
    use_collectives,
)
from jaxlwp.cost._kernels import Kernel
from jaxlwp.cost._model import (
    AnalyticCostModel,
    CostModel,
    build_tables,
    first_of_value,
    layer_configs,
    layer_key,
    passes_of,
    start_of_kernel_s,
    work_rate,
)
from jaxlwp.cost._search_space import SearchSpace, check_mesh, price, restrict
from jaxlwp.cost._shares import PassShares, pass_shares

__all__ = [
    "AnalyticCostModel",
    "CostModel",
    "Kernel",
    "PassShares",
    "SearchSpace",
    "argument_collectives",
    "build_tables",
    "check_mesh",
    "collectives_by_layer",
    "layer_collectives",
    "layer_configs",
    "first_of_value",
    "layer_key",
    "pass_shares",
    "passes_of",
    "price",
    "restrict",
    "spare_sums",
    "start_of_kernel_s",
    "strategy_collectives",
    "use_collectives",
    "work_rate",
]
