"""jaxlwp: layer-wise parallelism for convolutional networks in JAX.

`parallelize` traces a loss function, prices every way of splitting every layer over a device mesh,
finds the best combination exactly, and returns a `Plan` that is called like the loss function.
Every step is public on its own: `trace`, `device_graph`, `price`, `search`, `bind`.
"""

from jaxlwp.devices._calibrate import Rates, device_graph, make_mesh, measure
from jaxlwp.cost._collectives import strategy_collectives
from jaxlwp.check._compare import Comparison, StrategyResult, compare
from jaxlwp.space._config import Config
from jaxlwp.space._constraints import Constraints
from jaxlwp.cost._model import AnalyticCostModel, CostModel
from jaxlwp.devices._device_graph import DeviceGraph, LinkFit, MeshAxis
from jaxlwp.search._explain import Alternative, Explanation, RankedStrategy, explain, runners_up
from jaxlwp.graph._graph import ComputationGraph, Edge, Layer
from jaxlwp.check._hlo import CompiledCollective, compiled_collectives
from jaxlwp.space._layout import Collective
from jaxlwp.search._measured import measured_space, search_measured
from jaxlwp.solver._limit import MemoryLimitError
from jaxlwp.solver._marginals import RankedChoices, k_best, min_marginals
from jaxlwp.measure._timer import LayerTimer, layer_timer
from jaxlwp.memory._memory import Memory, MemoryCosts, MemoryTables, memory_costs, plan_memory
from jaxlwp.search._objective import MovedBytes, Objective, Overlap, PeakMemory, PlainSum
from jaxlwp._parallelize import parallelize
from jaxlwp.search._pareto import ParetoCurve, ParetoPoint, pareto
from jaxlwp.plan._plan import Plan, bind
from jaxlwp.measure._profile import Profile, load_profile
from jaxlwp.search._search import SearchResult, search
from jaxlwp.solver._solve import Solution, solve
from jaxlwp.cost._search_space import SearchSpace, price, restrict
from jaxlwp.space._strategy import BASELINES, Strategy
from jaxlwp.solver._tables import Cost, CostTables
from jaxlwp.check._target import TargetStep, compile_for, target_mesh
from jaxlwp.graph._trace import trace
from jaxlwp.check._verify import LayerCheck, Verification, verify
from jaxlwp.search._wide import price_around

__version__ = "0.1.0"

__all__ = [
    "BASELINES",
    "Alternative",
    "AnalyticCostModel",
    "Collective",
    "Comparison",
    "CompiledCollective",
    "ComputationGraph",
    "Config",
    "Constraints",
    "Cost",
    "CostModel",
    "CostTables",
    "DeviceGraph",
    "Edge",
    "Explanation",
    "Layer",
    "LayerCheck",
    "LayerTimer",
    "LinkFit",
    "Memory",
    "MemoryCosts",
    "MemoryTables",
    "MemoryLimitError",
    "MeshAxis",
    "MovedBytes",
    "Objective",
    "Overlap",
    "ParetoCurve",
    "ParetoPoint",
    "PeakMemory",
    "PlainSum",
    "Plan",
    "Profile",
    "RankedChoices",
    "RankedStrategy",
    "Rates",
    "SearchResult",
    "SearchSpace",
    "Solution",
    "Strategy",
    "StrategyResult",
    "TargetStep",
    "Verification",
    "bind",
    "compare",
    "compile_for",
    "compiled_collectives",
    "device_graph",
    "explain",
    "k_best",
    "layer_timer",
    "load_profile",
    "make_mesh",
    "measure",
    "measured_space",
    "memory_costs",
    "min_marginals",
    "parallelize",
    "pareto",
    "plan_memory",
    "price",
    "price_around",
    "restrict",
    "runners_up",
    "search",
    "search_measured",
    "solve",
    "strategy_collectives",
    "target_mesh",
    "trace",
    "verify",
]
