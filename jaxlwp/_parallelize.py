"""The front door: from a loss function to a sharded one in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlwp._progress import Progress, progress_of
from jaxlwp.check import fastest, fastest_compiled
from jaxlwp.devices import (
    DeviceGraph,
    GivenDevices,
    GivenRates,
    Rates,
    System,
    system_for,
    system_of,
)
from jaxlwp.measure import Profile
from jaxlwp.optimize import Objective
from jaxlwp.plan import Plan, plan_for
from jaxlwp.program import canonical
from jaxlwp.space import BASELINES, Constraints, Strategy


def parallelize(
    fn: Callable[..., Any],
    params: Any,
    *batch: Any,
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
    check: str | Sequence[str] | None = None,
    on_progress: Progress | None = None,
    **keywords: Any,
) -> Plan:
    """Trace, price, search and bind: from a loss function to a sharded one.

    Args:
      fn: loss function, called as `fn(params, *batch)`; returns a scalar loss, or a tuple whose
        first element is the loss. With `train=False` any function of arrays.
      params: pytree of parameters (arrays or `jax.ShapeDtypeStruct`).
      *batch: the other arguments, likewise; their shapes are the plan's shapes.
      devices: devices or how many of `jax.devices()`; by default those of the mesh that is set
        (`jax.set_mesh`), if there is one, else all. Or what is not there: a system by name
        ("dgx-h100:4" for four hosts, "h200:8" for eight GPUs, "cluster.toml:2"), what
        `jaxlwp.devices.preset` returns, or a `DeviceGraph`. Such a plan can be looked at, saved
        and compared; running it asks for devices.
      mesh: a mesh of the user's own, in place of `devices`; its axes keep their names and order,
        Auto or Explicit.
      strategy: "search", "data", "model", "owt", "spatial", or a `Strategy`.
      rates: rates of devices and links: of a system by its published figures ("h200", "dgx-a100",
        a TOML file, or what `jaxlwp.devices.preset` returns), by hand, or a profile of another
        machine (`load_profile`); measured (30 to 60 s, cached) by default.
      measure: measure the layers that the search picks on these devices (about a second each,
        cached). By default if no rates are given; False prices layers by the devices' rates.
      optimizer: the optax transformation of the training step, for the time and memory of its
        update; by default SGD with momentum is assumed.
      memory_bytes: what a training step may take of each device, as compiled for GPUs; the search
        is for the fastest strategy that is predicted to need no more, with a margin of 15 %.
      constraints: pinned layers, forbidden dimensions, parameters that stay replicated.
      objective: what the search makes least: "sum", "overlap", "bytes", "memory", or an
        `Objective`; see `search`.
      sum_dtype: the least dtype in which gradients of parameters are added up over devices. By
        default that in which the layer computes, as XLA's partitioner does: bfloat16 in mixed
        precision. `jnp.float32` makes these sums exact to float32, and sends twice the bytes.
      train: False plans a function that is only evaluated: no gradients are priced, no optimizer
        is there, and memory is that of the forward pass.
      outputs: where they go: "replicated" brings all whole to every device, PartitionSpecs (in the
        form in which `jax.jit` takes `out_shardings`) into these layouts, at a price; by default,
        and where None is given, they stay as the layers that make them have them.
      params_as: the plan of a training step, whose mesh and rates are the default: with
        `train=False`, parameters stay as it stores them (`Plan.elsewhere_s`: what that costs).
      check: "measure" runs a few training steps of the plan and of data parallelism and returns
        the faster; names of baselines run those besides, `jaxlwp.BASELINES` all of them. One that
        needs more memory than there is, or than `memory_bytes`, is not run. `params` and `batch`
        must be arrays then. "compile" compiles the plan, the baselines, the function whole on every
        device and plain JAX's data parallelism for the mesh's GPUs, which need not exist, and
        returns the plan that is forecast to be the fastest (`jaxlwp.check.forecast`), with the
        rates of the system that `rates` names, or of the newest one with such GPUs.
      on_progress: called as `on_progress(what, done, total)`; shown by default if it takes long.
      **keywords: arguments of `fn` by name. One that has the name of an option above is to be
        passed by position.

    Returns:
      A plan, to be called like `fn`.

    Raises:
      ValueError: an argument of a wrong kind, more devices than exist, a loss that is not a scalar,
        an unknown strategy or one for another model, a batch that the devices do not divide under
        strategy "data", a rate that is not a positive number, an unknown system or one that the
        mesh does not fit, an unknown check or place of outputs, what would run on devices that are
        not there, constraints that nothing keeps to, a `sum_dtype` that is no floating-point dtype,
        a check by compiling on processors; in several processes, all of which must call it, what
        differs between them.
      MemoryLimitError: no strategy fits into `memory_bytes`.
    """
    _check_kinds(fn, devices, mesh, strategy, rates, optimizer, memory_bytes, constraints)
    if not train and optimizer is not None:
        raise ValueError(
            "optimizer: given with train=False, which evaluates only; leave it out, or train"
        )
    against = () if check == "compile" else _against(check)
    if against and isinstance(devices, _DESCRIBED):
        raise ValueError(
            f"check: {check!r} runs training steps, and the devices are not here; give "
            'check="compile", which forecasts them, or None'
        )
    arguments = canonical("parallelize", fn, (params, *batch), keywords)
    with progress_of(on_progress) as progress:
        plan = plan_for(
            fn,
            arguments,
            devices=devices,
            mesh=mesh,
            strategy=strategy,
            rates=rates,
            measure=measure,
            optimizer=optimizer,
            memory_bytes=memory_bytes,
            constraints=constraints,
            objective=objective,
            sum_dtype=sum_dtype,
            train=train,
            outputs=outputs,
            params_as=params_as,
            on_progress=progress,
            check=check,
        )
        if check == "compile":
            named = [given for given in (rates, devices) if isinstance(given, _NAMED)]
            return fastest_compiled(
                plan,
                system_for(plan.mesh, named[0]) if named else system_of(plan.mesh),
                optimizer=optimizer,
                memory_bytes=memory_bytes,
                progress=progress,
            )
        if not against:
            return plan
        return fastest(
            plan,
            arguments,
            against=against,
            optimizer=optimizer,
            memory_bytes=memory_bytes,
            progress=progress,
        )


_NAMED = (str, os.PathLike, System)
_DESCRIBED = (*_NAMED, DeviceGraph)
"""Kinds of what stands for devices that need not be there."""


def _check_kinds(
    fn: Any,
    devices: Any,
    mesh: Any,
    strategy: Any,
    rates: Any,
    optimizer: Any,
    memory_bytes: Any,
    constraints: Any,
) -> None:
    """Check the kinds of the arguments, each in one line: place, value, rule, remedy."""

    def refuse(name: str, value: Any, wanted: str) -> None:
        text = getattr(value, "__name__", f"{value!r:.80}")
        raise ValueError(f"{name}: {text} is a {type(value).__name__}; give {wanted}")

    if not callable(fn):
        refuse("loss function", fn, "a function, called as fn(params, *batch)")
    counted = isinstance(devices, str) and devices.isdigit()
    if (
        counted
        or isinstance(devices, (bytes, bool))
        or not (devices is None or isinstance(devices, (int, np.integer, Iterable, *_DESCRIBED)))
    ):
        refuse(
            "devices",
            devices,
            "a number of devices, as in devices=8, a list of them, or a system, as in "
            "devices='dgx-h100:4'",
        )
    if not (mesh is None or isinstance(mesh, Mesh)):
        refuse("mesh", mesh, "a jax.sharding.Mesh, as from jax.make_mesh")
    if devices is not None and mesh is not None:
        raise ValueError("devices: given beside mesh, which has devices already; give one of both")
    if not isinstance(strategy, (str, Strategy)):
        refuse("strategy", strategy, "'search', a baseline's name, or a Strategy")
    kinds = Rates, DeviceGraph, Profile, System, str, os.PathLike
    if not (rates is None or isinstance(rates, kinds)):
        refuse(
            "rates",
            rates,
            "jaxlwp.Rates, a system such as 'h200', a DeviceGraph, a profile, or None to measure",
        )
    if not (optimizer is None or (hasattr(optimizer, "init") and hasattr(optimizer, "update"))):
        refuse(
            "optimizer",
            optimizer,
            "an optax transformation, as in optimizer=optax.sgd(1e-2, momentum=0.9)",
        )
    if not (constraints is None or isinstance(constraints, Constraints)):
        refuse(
            "constraints",
            constraints,
            "jaxlwp.Constraints, as in Constraints(pin={'conv1': {'sample': 2}})",
        )
    number = isinstance(memory_bytes, (int, float, np.number)) and not isinstance(
        memory_bytes, bool
    )
    if not (memory_bytes is None or (number and memory_bytes > 0)):
        refuse("memory_bytes", memory_bytes, "a positive number of bytes, as in 80e9")


def _against(check: str | Sequence[str] | None) -> tuple[str, ...]:
    """The baselines that a check runs: data parallelism always, others if they are named."""
    if check is None:
        return ()
    names = () if check == "measure" else check
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name in BASELINES for name in names):
        raise ValueError(
            f"check: {check!r} is unknown; give 'measure', 'compile', a list of baselines to run "
            f"besides data parallelism, of {BASELINES}, or None for no check"
        )
    return tuple(dict.fromkeys(("data", *names)))
