"""Seconds: what layers, changes of layout and whole strategies take.

Read `_collectives` first (what is communicated, read off the program of one device), then `_model`
(a `CostModel` turns work and collectives into seconds), `_tables` (all layers and edges under all
configs), `_kernels` (work as XLA for GPUs fuses it), `_changes` (all changes of layout between two
layers at once), `_paper` (the paper's model; `_fetched` is what it moves), `_problem` (layers,
configs and their costs, as numbers; `_problem_file` reads and writes them), `_search_space` (the
same with the program) and `_shares` (what of a layer's work is which pass).

A cost model of one's own is a `CostModel`, given to `price(graph, devices, model=...)`. What a
config does is here as data, in bytes: `layer_collectives` (halos and partial sums of a layer),
`argument_collectives` (parameters and the batch, as JAX stores them; `gradient_sums` are the sums
of gradients alone) and `use_collectives` (between the layouts of two layers; `fetched_bytes` is
what the paper counts there). `AnalyticCostModel` prices all of it at any rates, the work too.
`PaperCostModel` is a small one made of these.
"""

from jaxlwp.cost._collectives import (
    argument_collectives,
    collectives_by_layer,
    layer_collectives,
    spare_sums,
    strategy_collectives,
    use_collectives,
)
from jaxlwp.cost._fetched import fetched_bytes
from jaxlwp.cost._kernels import Kernel
from jaxlwp.cost._model import (
    AnalyticCostModel,
    CostModel,
    LayerCosts,
    first_of_value,
    passes_of,
    start_of_kernel_s,
    work_rate,
)
from jaxlwp.cost._paper import SERVERS, TRANSFERS, PaperCostModel, gradient_sums
from jaxlwp.cost._problem import (
    AnyProblem,
    Problem,
    SavedProblem,
    check_mesh,
    load_problem,
    restrict,
)
from jaxlwp.cost._search_space import SearchSpace, need_program, price
from jaxlwp.cost._shares import PassShares, pass_shares
from jaxlwp.cost._tables import MovedTables, build_tables, layer_configs

__all__ = [
    "AnalyticCostModel",
    "AnyProblem",
    "CostModel",
    "Kernel",
    "LayerCosts",
    "MovedTables",
    "PaperCostModel",
    "SERVERS",
    "PassShares",
    "Problem",
    "SavedProblem",
    "SearchSpace",
    "TRANSFERS",
    "argument_collectives",
    "build_tables",
    "check_mesh",
    "collectives_by_layer",
    "layer_collectives",
    "layer_configs",
    "fetched_bytes",
    "first_of_value",
    "gradient_sums",
    "load_problem",
    "need_program",
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
