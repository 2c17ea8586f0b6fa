"""All steps in one: trace, price, search, bind."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlwp._progress import Progress, silent
from jaxlwp.cost import SearchSpace, check_mesh, price
from jaxlwp.devices import (
    DeviceGraph,
    GivenDevices,
    GivenRates,
    System,
    choose_devices,
    device_graph,
    make_mesh,
    preset,
)
from jaxlwp.graph import ComputationGraph, is_loss, trace
from jaxlwp.measure import Profile, layer_timer
from jaxlwp.mesh import AnyMesh, abstract_mesh, set_mesh_or_none
from jaxlwp.optimize import (
    ROUNDS,
    Objective,
    PeakMemory,
    is_large,
    measured_space,
    price_around,
    search,
    search_measured,
)
from jaxlwp.plan._agreement import (
    agreeing,
    check_strategy,
    check_versions,
    given_parts,
    shared,
)
from jaxlwp.plan._beside import check_beside, kept_in_place
from jaxlwp.plan._plan import OPTIMIZER, Plan, bind, plan_memory
from jaxlwp.program import Arguments
from jaxlwp.solver import MemoryLimitError
from jaxlwp.space import Constraints, Strategy, outputs_kept

TRACING, MEASURING, SEARCHING = "tracing", "measuring device rates", "pricing and searching"
"""What progress calls the steps."""

_CALLER = 3
"""Frames from here to who calls `parallelize`."""


def plan_for(
    fn: Callable[..., Any],
    arguments: Arguments,
    *,
    devices: GivenDevices | None = None,
    mesh: Mesh | None = None,
    strategy: str | Strategy = "search",
    rates: GivenRates | DeviceGraph | Profile | None = None,
    measure: bool | None = None,
    optimizer: Any = None,
    memory_bytes: float | None = None,
    constraints: Constraints | None = None,
    objective: str | Objective = "sum",
    sum_dtype: Any = None,
    train: bool = True,
    outputs: Any = None,
    params_as: Plan | None = None,
    on_progress: Progress | None = None,
    check: Any = None,
) -> Plan:
    """Make a plan: what `parallelize` does, whose options are the same, but for its check.

    Args:
      fn: the loss function.
      arguments: (params, *batch), and arguments by name (`canonical`); arrays or shapes.
      devices: see `parallelize`, here and below.
      mesh: of the user's own.
      strategy: to search for, or given.
      rates: of the devices.
      measure: whether layers are measured.
      optimizer: of the training step.
      memory_bytes: limit of a device.
      constraints: on configs.
      objective: what is made least.
      sum_dtype: of the sums of gradients.
      train: whether the function is a loss that is differentiated.
      outputs: where they go.
      params_as: the plan beside which the new one evaluates.
      on_progress: called as `on_progress(what, done, total)`.
      check: what the caller does with the plan: the same in all processes.

    Raises:
      ValueError: as `parallelize`, but for arguments of a wrong kind.
      MemoryLimitError: no strategy fits into `memory_bytes`.
    """
    if params_as is not None:
        check_beside(params_as, train)
    chosen, known = _chosen_mesh(devices, mesh, params_as)
    rates = known if rates is None else rates
    if not isinstance(chosen, Mesh) and measure:
        raise ValueError(
            f"measure: layers cannot be measured on {chosen.size} devices that are not here; leave "
            "it out, and they are priced by rates"
        )
    together = shared(chosen)
    if together is not None:
        check_versions(together)
    progress = on_progress or silent
    progress(TRACING, 0, 1)
    with agreeing(together) as parts:
        graph = trace(
            fn,
            *arguments[0],
            keywords=arguments[1],
            differentiated=train,
            sum_dtype=sum_dtype,
            outputs=outputs,
        )
        if train:
            _check_loss(graph.results)
        slots = _slots(optimizer, arguments[0][0]) if train else 0.0
        given = _given_rates(chosen, rates)
        profile = rates if isinstance(rates, Profile) else None
        if together is not None:
            options = {
                "strategy": strategy,
                "measure": measure,
                "optimizer_slots": slots,
                "memory_bytes": memory_bytes,
                "constraints": constraints,
                "objective": objective,
                "sum_dtype": sum_dtype,
                "train": train,
                "outputs": outputs,
                "params_as": params_as and params_as.strategy,
                "check": check,
            }
            parts.update(given_parts(together, graph, given, profile, options))
    out_tree = jax.tree.structure(graph.results)
    progress(TRACING, 1, 1)
    rated = _measured_rates(chosen, progress) if given is None else given
    progress(SEARCHING, 0, 1)
    if isinstance(strategy, Strategy):
        check_mesh(strategy, rated.axis_sizes)
        strategy.for_graph(graph)
        if other := strategy.unlike(graph):
            warnings.warn(other, stacklevel=_CALLER)
    timer = None
    if not isinstance(rates, Profile) and (measure or (measure is None and rates is None)):
        assert isinstance(chosen, Mesh)
        timer = layer_timer(graph, rated, chosen)

    def space_under(constraints: Constraints | None) -> SearchSpace:
        space = _priced(
            graph,
            rated,
            strategy,
            constraints=outputs_kept(graph, constraints, rated.axis_sizes),
            objective=objective,
            memory_bytes=memory_bytes,
            optimizer_slots=slots,
            progress=progress,
        )
        if isinstance(rates, Profile):
            return measured_space(space, rates.times(graph, rated))
        return space

    own = constraints
    if params_as is not None:
        check_beside(params_as, train, rated)
        own = kept_in_place(graph, constraints, params_as)

    space = space_under(own)

    def planned(
        limit_bytes: float | None,
        objective: str | Objective = objective,
        space: SearchSpace = space,
    ) -> Plan:
        result, found = None, space
        if strategy == "search":
            options: dict[str, Any] = {
                "objective": objective,
                "memory_bytes": limit_bytes,
                "optimizer_slots": slots,
            }
            if timer:
                result = search_measured(space, timer, progress=progress, **options)
            else:
                result = search(space, **options)
            found, picked = result.space, result.strategy
        else:
            picked = strategy if isinstance(strategy, Strategy) else space.baseline(strategy)
            if timer:
                timer.measure(space.pairs(picked), progress)
                found = measured_space(space, timer)
        plan = bind(found, picked, chosen, arguments[0], out_tree, result, fn, arguments[1])
        return replace(plan, outputs=outputs, optimizer=optimizer or OPTIMIZER)

    if memory_bytes is None:
        plan = planned(None)
    else:
        plan = _fitting(planned, memory_bytes, slots)
    if params_as is not None and strategy == "search":
        free = planned(None, space=space_under(constraints))
        plan = replace(plan, elsewhere_s=free.cost.total_s)
    if together is not None:
        check_strategy(together, plan.strategy)
    progress(SEARCHING, 1, 1)
    return plan


def _chosen_mesh(
    devices: GivenDevices | None, mesh: Mesh | None, beside: Plan | None
) -> tuple[AnyMesh, System | DeviceGraph | None]:
    """The mesh given, that of the devices given, the one that is set, or one of all devices.

    That of the plan beside which a plan is made comes before the last two. Beside the mesh is what
    is known of devices that need not be there: then it has axes alone; and the other plan's rates.
    """
    if beside is not None and devices is None and mesh is None:
        space = beside.space
        return beside.mesh, None if space.measured else space.devices
    if isinstance(devices, (str, os.PathLike)):
        devices = preset(devices)
    if isinstance(devices, System):
        return devices.mesh, devices
    if isinstance(devices, DeviceGraph):
        return abstract_mesh(devices.axis_sizes), devices
    if mesh is None and devices is None:
        mesh = set_mesh_or_none()
    return mesh if mesh is not None else make_mesh(choose_devices(devices)), None


MEMORY_MARGIN = 1.15
"""Times what is predicted for a plan's program: how far it has to stay below a limit.

Compiled programs needed up to 11 % more than predicted (`make bench-memory`), but for one in
bfloat16 (20 %) and one with tensors as large as a fifth of its memory (26 %).
"""

_CLOSE = 1.02
"""Limits of the search that differ by less are not told apart."""

_ATTEMPTS = 12
"""Plans that are looked at for one memory limit, at most."""


def _fitting(planned: Callable[..., Plan], memory_bytes: float, slots: float) -> Plan:
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
        memory = plan_memory(plan)
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
        f"device, with a margin of {MEMORY_MARGIN - 1:.0%} more than {memory_bytes:,.0f} given; "
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


def _given_rates(
    mesh: AnyMesh, rates: GivenRates | DeviceGraph | Profile | None
) -> DeviceGraph | None:
    """The device graph by the rates given; None if they are to be measured."""
    if isinstance(rates, Profile):
        return rates.device_graph(mesh)
    if rates is None or isinstance(rates, DeviceGraph):
        return rates
    return device_graph(mesh, rates=rates)


def _measured_rates(mesh: AnyMesh, progress: Progress) -> DeviceGraph:
    """The device graph, measured."""
    progress(MEASURING, 0, 1)
    try:
        rated = device_graph(mesh)
    except jax.errors.JaxRuntimeError as error:
        if "compile-only" not in str(error) or not isinstance(mesh, Mesh):
            raise
        raise ValueError(
            f"rates: {mesh.devices.flat[0].device_kind} is not there to be measured; give its "
            "rates (a system such as 'h200', or jaxlwp.Rates), a DeviceGraph, or a profile that "
            "was taken on one"
        ) from error
    progress(MEASURING, 1, 1)
    return rated


def _check_loss(out: Any) -> None:
    """Check that the first output is a scalar loss."""
    if not is_loss(out):
        loss = out[0] if isinstance(out, tuple) else out
        raise ValueError(
            f"loss function: its {'first output' if isinstance(out, tuple) else 'output'} is "
            f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', loss)}; a loss must be one "
            "floating-point scalar: reduce it (for instance with .mean()) and return "
            "anything else as the second element of a tuple; or give train=False, for a function "
            "that is only evaluated"
        )
