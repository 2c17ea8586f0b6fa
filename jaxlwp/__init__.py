"""jaxlwp: layer-wise parallelism for convolutional networks in JAX.

`parallelize` traces a loss function, prices every way of splitting every layer over a device mesh,
finds the best combination exactly, and returns a `Plan` that is called like the loss function.
Every step is public on its own: `trace`, `device_graph`, `price`, `search`, `bind`.
"""

from jaxlwp._calibrate import Rates, device_graph, make_mesh, measure
from jaxlwp._collectives import strategy_collectives
from jaxlwp._compare import Comparison, StrategyResult, compare
from jaxlwp._config import Config
from jaxlwp._constraints import Constraints
from jaxlwp._cost import AnalyticCostModel, CostModel
from jaxlwp._devices import DeviceGraph, LinkFit, MeshAxis
from jaxlwp._explain import Alternative, Explanation, RankedStrategy, explain, runners_up
from jaxlwp._graph import ComputationGraph, Edge, Layer
from jaxlwp._hlo import CompiledCollective, compiled_collectives
from jaxlwp._layout import Collective
from jaxlwp._lazy import measured_space, search_measured
from jaxlwp._limit import MemoryLimitError
from jaxlwp._marginals import RankedChoices, k_best, min_marginals
from jaxlwp._measure import LayerTimer, layer_timer
from jaxlwp._memory import Memory, MemoryCosts, MemoryTables, memory_costs, plan_memory
from jaxlwp._objective import MovedBytes, Objective, Overlap, PeakMemory, PlainSum
from jaxlwp._parallelize import parallelize
from jaxlwp._pareto import ParetoCurve, ParetoPoint, pareto
from jaxlwp._plan import Plan, bind
from jaxlwp._profile import Profile, load_profile
from jaxlwp._search import SearchResult, search
from jaxlwp._solve import Solution, solve
from jaxlwp._space import SearchSpace, price, restrict
from jaxlwp._strategy import BASELINES, Strategy
from jaxlwp._tables import Cost, CostTables
from jaxlwp._target import TargetStep, compile_for, target_mesh
from jaxlwp._trace import trace
from jaxlwp._verify import LayerCheck, Verification, verify
from jaxlwp._wide import price_around

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
