"""Layer-wise parallelism for convolutional networks in JAX.

`parallelize` traces a loss function, prices every way of splitting every layer over a device mesh,
finds the best combination exactly, and returns a `Plan` that is called like the loss function:

    plan = jaxlwp.parallelize(loss_fn, params, images, labels)
    state, images, labels = plan.place(state), *plan.place_batch(images, labels)
    loss, grads = jax.jit(jax.value_and_grad(plan))(state.params, images, labels)

All in one     parallelize
Its steps      trace, make_mesh, device_graph, price, search or search_measured, bind
Looking        print(plan), explain, pareto, verify, compare
Values         Plan, Strategy, Config, Constraints, Rates, DeviceGraph; BASELINES (names)
Elsewhere      load_profile (another machine's measurements), target_mesh (GPUs that are not there)
On numbers     solve (cost tables alone)
Errors         ValueError, in one line; MemoryLimitError, which names the least memory

All else is in the folders, each one step of the way: program, mesh, ops, graph, space, devices,
lower, kernels, solver, files, memory, cost, measure, optimize, plan, check, simulate, report.
`help(jaxlwp.solver)` says what a folder is for and in which order to read it.
"""

import typing as _typing

# Names are exported by `as`, not by `__all__`: help(jaxlwp) would print them all, on 20 screens.
from jaxlwp._lazy import __dir__ as __dir__
from jaxlwp._lazy import __getattr__ as __getattr__
from jaxlwp._parallelize import parallelize as parallelize
from jaxlwp._version import __version__ as __version__
from jaxlwp.check import compare as compare
from jaxlwp.check import target_mesh as target_mesh
from jaxlwp.check import verify as verify
from jaxlwp.cost import price as price
from jaxlwp.devices import DeviceGraph as DeviceGraph
from jaxlwp.devices import Rates as Rates
from jaxlwp.devices import device_graph as device_graph
from jaxlwp.devices import make_mesh as make_mesh
from jaxlwp.graph import trace as trace
from jaxlwp.measure import load_profile as load_profile
from jaxlwp.optimize import explain as explain
from jaxlwp.optimize import pareto as pareto
from jaxlwp.optimize import search as search
from jaxlwp.optimize import search_measured as search_measured
from jaxlwp.plan import Plan as Plan
from jaxlwp.plan import bind as bind
from jaxlwp.solver import MemoryLimitError as MemoryLimitError
from jaxlwp.solver import solve as solve
from jaxlwp.space import BASELINES as BASELINES
from jaxlwp.space import Config as Config
from jaxlwp.space import Constraints as Constraints
from jaxlwp.space import Strategy as Strategy

if _typing.TYPE_CHECKING:
    from jaxlwp import report as report
    from jaxlwp import simulate as simulate
