"""jaxlwp: layer-wise parallelism for convolutional networks in JAX.

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
lower, solver, cost, memory, measure, optimize, plan, check, simulate, report.
`help(jaxlwp.solver)` says what a folder is for and in which order to read it.
"""

from jaxlwp._parallelize import parallelize
from jaxlwp._version import __version__
from jaxlwp.check import compare, target_mesh, verify
from jaxlwp.cost import price
from jaxlwp.devices import DeviceGraph, Rates, device_graph, make_mesh
from jaxlwp.graph import trace
from jaxlwp.measure import load_profile
from jaxlwp.optimize import explain, pareto, search, search_measured
from jaxlwp.plan import Plan, bind
from jaxlwp.solver import MemoryLimitError, solve
from jaxlwp.space import BASELINES, Config, Constraints, Strategy

__all__ = [
    "BASELINES",
    "Config",
    "Constraints",
    "DeviceGraph",
    "MemoryLimitError",
    "Plan",
    "Rates",
    "Strategy",
    "__version__",
    "bind",
    "compare",
    "device_graph",
    "explain",
    "load_profile",
    "make_mesh",
    "parallelize",
    "pareto",
    "price",
    "search",
    "search_measured",
    "solve",
    "target_mesh",
    "trace",
    "verify",
]
