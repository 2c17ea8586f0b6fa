"""From a loss function to a plan in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlwp.program._arguments import Arguments, canonical
from jaxlwp.devices._calibrate import Rates, choose_devices, device_graph, make_mesh
from jaxlwp.space._constraints import Constraints
from jaxlwp.devices._device_graph import DeviceGraph
from jaxlwp.graph._graph import ComputationGraph
from jaxlwp.search._measured import measured_space, search_measured
from jaxlwp.solver._limit import MemoryLimitError
from jaxlwp.measure._timer import layer_timer
from jaxlwp.memory._memory import plan_memory
from jaxlwp.search._objective import Objective, PeakMemory
from jaxlwp.plan._plan import Plan, bind, is_loss, output_shapes
from jaxlwp.measure._profile import Profile
from jaxlwp.search._search import search
from jaxlwp.cost._search_space import SearchSpace, check_mesh, price
from jaxlwp.mesh._spmd import set_mesh_or_none
from jaxlwp.space._strategy import BASELINES, Strategy
from jaxlwp.graph._trace import trace
from jaxlwp.search._wide import ROUNDS, is_large, price_around


def parallelize(
    fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    devices: Sequence[Any] | int | None = None,
    mesh: Mesh | None = None,
    strategy: str | Strategy = "search",
    rates: Rates | DeviceGraph | Profile | None = None,
    measure: bool | None = None,
    optimizer: Any = None,
    memory_bytes: float | None = None,
    constraints: Constraints | None = None,
    objective: str | Objective = "sum",
    check: str | Sequence[str] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **keywords: Any,
) -> Plan:
    """Trace, price, search and bind: from a loss function to a sharded one.

    Args:
      fn: loss function, called as `fn(params, *batch)`; returns a scalar loss, or a tuple whose
        first element is the loss.
      params: pytree of parameters (arrays or `jax.ShapeDtypeStruct`).
      *batch: the other arguments, likewise; their shapes are the plan's shapes.
      devices: devices or how many of `jax.devices()`; by default those of the mesh that is set
        (`jax.set_mesh`), if there is one, else all.
      mesh: a mesh of the user's own, in place of `devices`; its axes keep their names and order,
        Auto or Explicit.
      strategy: "search", "data", "model", "owt", "spatial", or a `Strategy`.
      rates: rates of devices and links by hand, or a profile of another machine (`load_profile`);
        measured (30 to 60 s, cached) by default.
      measure: measure the layers that the search picks on these devices (about a second each,
        cached). By default if no rates are given; False prices layers by the devices' rates.
      optimizer: the optax transformation of the training step, for the time and memory of its
        update; by default SGD with momentum is assumed.
      memory_bytes: what a training step may take of each device, as compiled for GPUs; the search
        is for the fastest strategy that is predicted to need no more, with a margin of 15 %.
      constraints: pinned layers, forbidden dimensions, parameters that stay replicated.
      objective: what the search makes least: "sum", "overlap", "bytes", "memory", or an
        `Objective`; see `search`.
      check: "measure" runs a few training steps of the plan and of data parallelism and returns
        the faster; names of baselines run those besides, `jaxlwp.BASELINES` all of them. One that
        needs more memory than there is, or than `memory_bytes`, is not run. `params` and `batch`
        must be arrays then.
      on_progress: called as `on_progress(what, done, total)`.
      **keywords: arguments of `fn` by name. One that has the name of an option above is to be
        passed by position.

    Returns:
      A plan, to be called like `fn`.

    Raises:
      ValueError: an argument of a wrong kind, more devices than exist, a loss that is not a scalar,
        an unknown strategy or one for another model, a batch that the devices do not divide under
        strategy "data", a rate that is not a positive number, an unknown check, constraints that
        nothing keeps to.
      MemoryLimitError: no strategy fits into `memory_bytes`.
    """
    _check_kinds(fn, devices, mesh, strategy, rates, optimizer, memory_bytes)
    against = _against(check)
    arguments = canonical("parallelize", fn, (params, *batch), keywords)
    mesh = _chosen_mesh(devices, mesh)
    graph = trace(fn, *arguments[0], keywords=arguments[1])
    out_tree = _check_loss(fn, arguments)
    if isinstance(rates, Profile):
        rated = rates.device_graph(mesh)
    elif isinstance(rates, DeviceGraph):
        rated = rates
    else:
        rated = _rated(mesh, rates)
    if isinstance(strategy, Strategy):
        check_mesh(strategy, rated.axis_sizes)
        strategy.for_graph(graph)
    slots = _slots(optimizer, params)
    space = _priced(
        graph,
        rated,
        strategy,
        constraints=constraints,
        objective=objective,
        memory_bytes=memory_bytes,
        optimizer_slots=slots,
        progress=on_progress,
    )
    timer = None
    if isinstance(rates, Profile):
        space = measured_space(space, rates.times(graph, rated))
    elif measure or (measure is None and rates is None):
        timer = layer_timer(graph, rated, mesh)

    def planned(limit_bytes: float | None, objective: str | Objective = objective) -> Plan:
        result, found = None, space
        if strategy == "search":
            options: dict[str, Any] = {
                "objective": objective,
                "memory_bytes": limit_bytes,
                "optimizer_slots": slots,
            }
            if timer:
                result = search_measured(space, timer, progress=on_progress, **options)
            else:
                result = search(space, **options)
            found, chosen = result.space, result.strategy
        else:
            chosen = strategy if isinstance(strategy, Strategy) else space.baseline(strategy)
            if timer:
                timer.measure(space.pairs(chosen), on_progress)
                found = measured_space(space, timer)
        return bind(found, chosen, mesh, arguments[0], out_tree, result, fn, arguments[1])

    if memory_bytes is None:
        plan = planned(None)
    else:
        plan = _fitting(planned, memory_bytes, optimizer, slots)
    if not against:
        return plan
    from jaxlwp.check._compare import fastest

    return fastest(
        plan,
        arguments,
        against=against,
        optimizer=optimizer,
        memory_bytes=memory_bytes,
        progress=on_progress,
    )


def _check_kinds(
    fn: Any,
    devices: Any,
    mesh: Any,
    strategy: Any,
    rates: Any,
    optimizer: Any,
    memory_bytes: Any,
) -> None:
    """Check the kinds of the arguments, each in one line: place, value, rule, remedy."""

    def refuse(name: str, value: Any, wanted: str) -> None:
        text = getattr(value, "__name__", f"{value!r:.80}")
        raise ValueError(f"{name}: {text} is a {type(value).__name__}; give {wanted}")

    if not callable(fn):
        refuse("loss function", fn, "a function, called as fn(params, *batch)")
    if isinstance(devices, (str, bytes, bool)) or not (
        devices is None or isinstance(devices, (int, np.integer)) or isinstance(devices, Iterable)
    ):
        refuse("devices", devices, "a number of devices, as in devices=8, or a list of them")
    if not (mesh is None or isinstance(mesh, Mesh)):
        refuse("mesh", mesh, "a jax.sharding.Mesh, as from jax.make_mesh")
    if devices is not None and mesh is not None:
        raise ValueError("devices: given beside mesh, which has devices already; give one of both")
    if not isinstance(strategy, (str, Strategy)):
        refuse("strategy", strategy, "'search', a baseline's name, or a Strategy")
    if not (rates is None or isinstance(rates, (Rates, DeviceGraph, Profile))):
        refuse("rates", rates, "jaxlwp.Rates, a DeviceGraph, a profile, or None to measure")
    if not (optimizer is None or (hasattr(optimizer, "init") and hasattr(optimizer, "update"))):
        refuse(
            "optimizer",
            optimizer,
            "an optax transformation, as in optimizer=optax.sgd(1e-2, momentum=0.9)",
        )
    number = isinstance(memory_bytes, (int, float, np.number)) and not isinstance(
        memory_bytes, bool
    )
    if not (memory_bytes is None or (number and memory_bytes > 0)):
        refuse("memory_bytes", memory_bytes, "a positive number of bytes, as in 80e9")


def _chosen_mesh(devices: Sequence[Any] | int | None, mesh: Mesh | None) -> Mesh:
    """The mesh given, that of the devices given, the one that is set, or one of all devices."""
    if mesh is None and devices is None:
        mesh = set_mesh_or_none()
    return mesh if mesh is not None else make_mesh(choose_devices(devices))


def _against(check: str | Sequence[str] | None) -> tuple[str, ...]:
    """The baselines that a check runs: data parallelism always, others if they are named."""
    if check is None:
        return ()
    names = () if check == "measure" else check
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name in BASELINES for name in names):
        raise ValueError(
            f"check: {check!r} is unknown; give 'measure', a list of baselines to run besides data "
            f"parallelism, of {BASELINES}, or None for no check"
        )
    return tuple(dict.fromkeys(("data", *names)))


MEMORY_MARGIN = 1.15
"""Times what is predicted for a plan's program: how far it has to stay below a limit.

Compiled programs needed up to 11 % more than predicted (`make bench-memory`), but for one in
bfloat16 (20 %) and one with tensors as large as a fifth of its memory (26 %).
"""

_CLOSE = 1.02
"""Limits of the search that differ by less are not told apart."""

_ATTEMPTS = 12
"""Plans that are looked at for one memory limit, at most."""


def _fitting(
    planned: Callable[..., Plan], memory_bytes: float, optimizer: Any, slots: float
) -> Plan:
    """The plan of the highest limit for the search under which the plan's program fits.

    The search adds up bytes of layers, which leaves out what lives across them; the program tells.
    A limit of the search whose plan fits is raised again, halfway to one whose plan does not.
    """
    limit_bytes, too_high, fits = float(memory_bytes), math.inf, 0.0
    best: Plan | None = None
    peak_bytes = math.inf
    smallest: MemoryLimitError | None = None
    for _ in range(_ATTEMPTS):
        try:
            plan = planned(limit_bytes)
        except MemoryLimitError as error:
            if smallest is not None:
                break
            # What takes least by the layers' bytes may still fit by the program's.
            smallest, plan = error, planned(None, PeakMemory(slots))
            limit_bytes = plan.result.value if plan.result is not None else math.inf
        memory = plan_memory(plan, optimizer) if optimizer is not None else plan.memory
        needed_bytes = MEMORY_MARGIN * memory.peak_bytes
        if plan.result is None and needed_bytes > memory_bytes:
            raise _too_little(plan, memory_bytes, memory.peak_bytes)
        if needed_bytes <= memory_bytes:
            best, fits = plan, limit_bytes
            if limit_bytes >= memory_bytes or too_high / fits < _CLOSE:
                break
        else:
            too_high = min(too_high, limit_bytes)
            peak_bytes = min(peak_bytes, needed_bytes)
        if best is not None:
            limit_bytes = math.sqrt(fits * min(too_high, float(memory_bytes)))
        elif smallest is not None:
            break
        else:
            limit_bytes *= min(memory_bytes / needed_bytes, 0.98)
    if best is None:
        _, most, layers = str(smallest).partition("Most of it")
        raise MemoryLimitError(
            f"memory_bytes: {memory_bytes:,.0f} is too little: no plan is predicted to need less "
            f"with a margin of {MEMORY_MARGIN - 1:.0%}; the next best needs {peak_bytes:,.0f} with "
            f"it. Use more devices, a smaller batch or a higher limit. {most}{layers}",
            peak_bytes,
            smallest.choices if smallest is not None else (),
        ) from smallest
    return best


def _too_little(plan: Plan, memory_bytes: float, peak_bytes: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"memory_bytes: strategy {plan.strategy.name!r} needs about {peak_bytes:,} bytes on each "
        f"device, with a margin of {MEMORY_MARGIN - 1:.0%} more than {memory_bytes:,.0f} given: "
        "search for a strategy, or use more devices, a smaller batch, a higher limit",
        MEMORY_MARGIN * peak_bytes,
        plan.space.choices(plan.strategy),
    )


def _priced(
    graph: ComputationGraph,
    devices: DeviceGraph,
    strategy: str | Strategy,
    *,
    constraints: Constraints | None,
    optimizer_slots: float,
    **options: Any,
) -> SearchSpace:
    """The whole space, or what is needed of it where it is large."""
    if not is_large(graph, devices):
        return price(graph, devices, constraints=constraints, optimizer_slots=optimizer_slots)
    if isinstance(strategy, Strategy):
        return price(
            graph,
            devices,
            constraints=constraints,
            configs=[(config,) for config in strategy.for_graph(graph)],
            optimizer_slots=optimizer_slots,
        )
    return price_around(
        graph,
        devices,
        constraints=constraints,
        optimizer_slots=optimizer_slots,
        rounds=ROUNDS if strategy == "search" else 1,
        **options,
    )


def _slots(optimizer: Any, params: Any) -> float:
    """Arrays like the parameters that the optimizer keeps; one if it is not known."""
    if optimizer is None:
        return 1.0
    state = jax.eval_shape(optimizer.init, params)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))
        for tree in (state, params)
    ]
    return float(sizes[0] / max(sizes[1], 1))


def _rated(mesh: Mesh, rates: Rates | None) -> DeviceGraph:
    """The device graph, measured if no rates are given."""
    try:
        return device_graph(mesh, rates=rates)
    except jax.errors.JaxRuntimeError as error:
        if "compile-only" not in str(error):
            raise
        raise ValueError(
            f"rates: {mesh.devices.flat[0].device_kind} is not there to be measured; give its "
            "rates (jaxlwp.Rates), a DeviceGraph, or a profile that was taken on one"
        ) from error


def _check_loss(fn: Callable[..., Any], arguments: Arguments) -> Any:
    """Structure of the output; its first leaf must be a scalar loss."""
    out = output_shapes(fn, arguments)
    if not is_loss(out):
        loss = out[0] if isinstance(out, tuple) else out
        raise ValueError(
            f"loss function: its {'first output' if isinstance(out, tuple) else 'output'} is "
            f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', loss)}; a loss must be one "
            "floating-point scalar: reduce it (for instance with .mean()) and return "
            "anything else as the second element of a tuple"
        )
    return jax.tree.structure(out)
