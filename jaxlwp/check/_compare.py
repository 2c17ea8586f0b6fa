"""Comparison: the strategy found and every baseline, predicted and measured in one run.

What is measured is a whole training step: loss, gradients and an SGD update with momentum, state
donated. The steps take turns, in an order that rotates, so that whatever else the machine does
meets all of them alike.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxlwp._progress import Progress, reporting, silent
from jaxlwp._version import __version__
from jaxlwp.check._hlo import bytes_by_kind, compiled_collectives
from jaxlwp.check._steps import (
    ROUNDS,
    Step,
    accelerator_bytes,
    batch_of,
    batch_size,
    compiled_step,
    is_simulated,
    measured_steps,
)
from jaxlwp.devices import (
    DeviceGraph,
    GivenRates,
    choose_devices,
    device_graph,
    from_first,
    local_devices,
    make_mesh,
    spans_processes,
)
from jaxlwp.measure import layer_timer
from jaxlwp.mesh import need_devices
from jaxlwp.optimize import measured_space
from jaxlwp.plan import (
    MEMORY_MARGIN,
    OPTIMIZER,
    Plan,
    baselines,
    initial_state,
    plan_for,
    plan_memory,
    with_strategy,
)
from jaxlwp.program import Arguments, canonical
from jaxlwp.solver import Cost
from jaxlwp.space import BASELINES, Strategy

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """One strategy of a comparison.

    Attributes:
      strategy: its name.
      predicted: predicted seconds of a step, decomposed.
      times_s: measured seconds of a step, one for each round.
      predicted_bytes_by_kind: operand bytes per device of a step's collectives, as predicted.
      compiled_bytes_by_kind: the same, counted in the compiled step.
      argument_bytes: bytes per device of parameters, optimizer state and batch.
      temporary_bytes: bytes per device of the compiled step's temporaries.
      peak_bytes: bytes per device at the step's peak, by the compiler's account.
    """

    strategy: str
    predicted: Cost
    times_s: tuple[float, ...]
    predicted_bytes_by_kind: dict[str, int]
    compiled_bytes_by_kind: dict[str, int]
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int

    @property
    def predicted_s(self) -> float:
        """Predicted seconds of a step."""
        return self.predicted.total_s

    @property
    def measured_s(self) -> float:
        """Median of the measured seconds of a step."""
        return statistics.median(self.times_s)

    @property
    def predicted_bytes(self) -> int:
        """Predicted operand bytes per device of a step's collectives."""
        return sum(self.predicted_bytes_by_kind.values())

    @property
    def compiled_bytes(self) -> int:
        """Operand bytes per device of the collectives in the compiled step."""
        return sum(self.compiled_bytes_by_kind.values())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Strategies of one model on one machine, measured in one run.

    Attributes:
      model: its name.
      batch: examples in a batch.
      devices: the mesh and the rates that the predictions are from.
      machine: platform, device kind, whether the devices are simulated, processor and system.
      versions: of jaxlwp and what it runs on.
      date: when, in UTC, ISO 8601.
      results: one per strategy.
      left_out: strategies that were not run, since they need more of a device's memory than is
        left or allowed, and the bytes that they are predicted to need.
    """

    model: str
    batch: int
    devices: DeviceGraph = field(repr=False)
    machine: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    date: str
    results: tuple[StrategyResult, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    def result(self, strategy: str) -> StrategyResult:
        """The result of a strategy.

        Raises:
          KeyError: it was not compared.
        """
        return {result.strategy: result for result in self.results}[strategy]

    def speedup(self, strategy: str) -> float | None:
        """How many times faster than data parallelism a strategy was measured to be.

        None where data parallelism was not run.

        Raises:
          KeyError: the strategy was not compared.
        """
        measured_s = self.result(strategy).measured_s
        known = {result.strategy: result.measured_s for result in self.results}
        return known["data"] / measured_s if "data" in known else None

    def to_json(self) -> str:
        """As JSON text.

        Keys: `format_version`, `model`, `batch`, `devices` (how many), `rounds`, `date`,
        `machine`, `versions`, `rates` (mesh axes and rates of the prediction), `left_out` (bytes
        that strategies which do not fit would need, by name), and `results`, a list with, for each
        strategy:

        - `strategy`: "search", "data", "model", "owt" or "spatial";
        - `predicted_s`: its sum, and `predicted_compute_s`, `predicted_transfer_s`,
          `predicted_sync_s`, `predicted_overhead_s`;
        - `measured_s`: the median; `measured_min_s`, `measured_max_s`, and all `times_s`;
        - `speedup`: over data parallelism, of the medians; null where that was not run;
        - `predicted_bytes`, `compiled_bytes`: operand bytes per device of a step's collectives,
          and `predicted_bytes_by_kind`, `compiled_bytes_by_kind`;
        - `argument_bytes`, `temporary_bytes`, `peak_bytes`: memory per device.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "batch": self.batch,
            "devices": self.devices.num_devices,
            "rounds": len(self.results[0].times_s),
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "rates": self.devices.to_json(),
            "left_out": self.left_out,
            "results": [self._result_json(result) for result in self.results],
        }
        return json.dumps(content, indent=2)

    def _result_json(self, result: StrategyResult) -> dict[str, Any]:
        return {
            "strategy": result.strategy,
            "predicted_s": result.predicted_s,
            "predicted_compute_s": result.predicted.compute_s,
            "predicted_transfer_s": result.predicted.transfer_s,
            "predicted_sync_s": result.predicted.sync_s,
            "predicted_overhead_s": result.predicted.overhead_s,
            "measured_s": result.measured_s,
            "measured_min_s": min(result.times_s),
            "measured_max_s": max(result.times_s),
            "times_s": list(result.times_s),
            "speedup": self.speedup(result.strategy),
            "predicted_bytes": result.predicted_bytes,
            "compiled_bytes": result.compiled_bytes,
            "predicted_bytes_by_kind": result.predicted_bytes_by_kind,
            "compiled_bytes_by_kind": result.compiled_bytes_by_kind,
            "argument_bytes": result.argument_bytes,
            "temporary_bytes": result.temporary_bytes,
            "peak_bytes": result.peak_bytes,
        }

    def __str__(self) -> str:
        """A row per strategy: time, bytes and memory, predicted and measured."""
        from jaxlwp.report import comparison_text

        return comparison_text(self)


@reporting
def compare(
    fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    devices: Sequence[Any] | int | None = None,
    strategies: Sequence[str | Strategy] = BASELINES,
    rounds: int = ROUNDS,
    rates: GivenRates | DeviceGraph | None = None,
    memory_bytes: float | None = None,
    train: bool = True,
    name: str | None = None,
    on_progress: Progress | None = None,
    **keywords: Any,
) -> Comparison:
    """Run the strategy found and others, and set them against the prediction.

    Args:
      fn: loss function, as for `parallelize`.
      params: pytree of floating-point arrays.
      *batch: the other arguments, arrays; the data first.
      devices: devices or how many of `jax.devices()`; all by default.
      strategies: what to compare with: names of baselines, or strategies of this model and mesh;
        every baseline by default.
      rounds: measured steps of each strategy, after one to warm up.
      rates: rates by hand or of a system, as for `parallelize`; by default they are measured (30
        to 60 s, cached), and the layers too (about a second for each layer and config, cached).
      memory_bytes: what a step may take of each device, as for `parallelize`. A strategy that is
        predicted to take more than that, or than a GPU has left, is not run.
      train: False for a function that is only evaluated, as for `parallelize`.
      name: of the model, for the report; the function's by default.
      on_progress: called as `on_progress(what, done, total)`.
      **keywords: arguments of `fn` by name, as for `parallelize`.

    Returns:
      The comparison.

    Raises:
      ValueError: fewer rounds than one, or as `parallelize`: above all a batch that the devices
        do not divide, so that data parallelism does not apply.
      MemoryLimitError: no strategy fits into `memory_bytes`.
    """
    if rounds < 1:
        raise ValueError(
            f"compare: rounds is {rounds}; give at least 1, or leave it out for {ROUNDS}"
        )
    progress = on_progress or silent
    arguments = canonical("compare", fn, (params, *batch), keywords)
    plans, left_out = _make_plans(
        fn, arguments, devices, strategies, rates, memory_bytes, train, progress
    )
    state, data = initial_state(plans[0], params), batch_of(arguments)
    steps: list[Step] = []
    for plan in plans:
        progress("compiling steps", len(steps), len(plans))
        steps.append(compiled_step(plan, state, data))
    progress("compiling steps", len(steps), len(plans))
    times = measured_steps(steps, state, data, rounds, progress)
    mesh_devices = list(need_devices("compare", plans[0].mesh).devices.flat)
    return Comparison(
        model=name or str(getattr(fn, "__qualname__", type(fn).__name__)),
        batch=batch_size(data),
        devices=plans[0].space.devices,
        machine=_machine(mesh_devices),
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        results=tuple(_result(step, taken) for step, taken in zip(steps, times, strict=True)),
        left_out=left_out,
    )


def fastest(
    plan: Plan,
    arguments: Arguments,
    *,
    against: Sequence[str],
    optimizer: Any = None,
    memory_bytes: float | None = None,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> Plan:
    """Run a plan and baselines for a few steps, and keep the fastest.

    Args:
      plan: the plan.
      arguments: (params, *batch), and arguments by name, as arrays.
      against: names of baselines; one that does not apply (a batch that the devices do not divide)
        is left out.
      optimizer: optax transformation of the step; SGD with momentum by default.
      memory_bytes: what a baseline may take of a device, as for `parallelize`; one that is
        predicted to take more than that, or than the device has left, is not run.
      rounds: measured steps of each, in turns.
      progress: called as `progress(what, done, total)`.

    Returns:
      The plan of the least median time, with what was measured in `checked`.

    Raises:
      ValueError: parameters or batch are shapes only.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments)):
        raise ValueError(
            "check: the parameters or the batch are shapes only, but steps are to be run; pass "
            "arrays, or leave the check out"
        )
    progress, optimizer = progress or silent, optimizer or OPTIMIZER
    others = applicable(plan, against)
    fitting, left_out = _fitting(others, _limit_bytes(plan, memory_bytes), optimizer)
    plans = [plan, *fitting]
    params, batch = arguments[0][0], batch_of(arguments)
    state = initial_state(plan, params, optimizer)
    steps = []
    for number, each in enumerate(plans):
        progress("compiling steps", number, len(plans))
        steps.append(compiled_step(each, state, batch, optimizer))
    taken = measured_steps(steps, state, batch, rounds, progress)
    times = [statistics.median(times_s) for times_s in taken]
    mesh = need_devices("compare", plan.mesh)
    if spans_processes(mesh):  # all must keep the same plan
        times = from_first(times, mesh)
    checked = {each.strategy.name: s for each, s in zip(plans, times, strict=True)}
    for name in left_out:
        checked.setdefault(name, math.inf)
    best = min(range(len(plans)), key=times.__getitem__)
    return dataclasses.replace(plans[best], checked=checked)


def applicable(plan: Plan, against: Sequence[str]) -> list[Plan]:
    """Plans of the baselines that apply and differ from the plan and from each other."""
    plans = [plan]
    for other in baselines(plan, against).values():
        if all(other.strategy.configs != known.strategy.configs for known in plans):
            plans.append(other)
    return plans[1:]


def _fitting(
    plans: Sequence[Plan], limit_bytes: float, optimizer: Any
) -> tuple[list[Plan], dict[str, int]]:
    """The plans that are predicted to take no more of a device, and the bytes of the others."""
    if limit_bytes == math.inf:
        return list(plans), {}
    peak_bytes = [plan_memory(plan, optimizer).peak_bytes for plan in plans]
    each = list(zip(plans, peak_bytes, strict=True))
    fitting = [plan for plan, num_bytes in each if num_bytes <= limit_bytes]
    return fitting, {p.strategy.name: size for p, size in each if size > limit_bytes}


def _limit_bytes(plan: Plan, memory_bytes: float | None) -> float:
    """Bytes of a device that a baseline may be predicted to take: of those allowed, and there.

    A plan's margin below what is allowed counts here too; below what is there a tenth is enough:
    whatever can be run is to be compared. Of simulated devices there is no telling: what they take
    is not what GPUs would.
    """
    mesh = need_devices("compare", plan.mesh)
    free_bytes = accelerator_bytes(local_devices(mesh))
    if spans_processes(mesh):  # all must run the same programs
        free_bytes = from_first(free_bytes, mesh)
    allowed_bytes = math.inf if memory_bytes is None else memory_bytes / MEMORY_MARGIN
    return min(allowed_bytes, math.inf if free_bytes is None else free_bytes)


def _make_plans(
    fn: Callable[..., Any],
    arguments: Arguments,
    devices: Sequence[Any] | int | None,
    strategies: Sequence[str | Strategy],
    rates: GivenRates | DeviceGraph | None,
    memory_bytes: float | None,
    train: bool,
    progress: Progress,
) -> tuple[list[Plan], dict[str, int]]:
    """The plan found, those of strategies that fit, all over one space; bytes of the others."""
    mesh = make_mesh(choose_devices(devices))
    progress("measuring device rates", 0, 1)
    rated = rates if isinstance(rates, DeviceGraph) else device_graph(mesh, rates=rates)
    progress("measuring device rates", 1, 1)
    measured = rates is None
    found = plan_for(
        fn,
        arguments,
        mesh=mesh,
        rates=rated,
        measure=measured,
        memory_bytes=memory_bytes,
        train=train,
        on_progress=progress,
    )
    space = found.space
    others = [s if isinstance(s, Strategy) else space.baseline(s) for s in strategies]
    bound = [with_strategy(found, strategy) for strategy in others]
    fitting, left_out = _fitting(bound, _limit_bytes(found, memory_bytes), OPTIMIZER)
    plans = [found, *fitting]
    if measured:
        timer = layer_timer(space.graph, rated, mesh)
        timer.measure([pair for plan in fitting for pair in space.pairs(plan.strategy)], progress)
        space = measured_space(space, timer)
        plans = [dataclasses.replace(plan, space=space) for plan in plans]
    return plans, left_out


def _result(step: Step, times_s: Sequence[float]) -> StrategyResult:
    predicted: dict[str, int] = {}
    for collective in step.plan.collectives:
        predicted[collective.kind] = predicted.get(collective.kind, 0) + collective.num_bytes
    return StrategyResult(
        strategy=step.plan.strategy.name,
        predicted=step.plan.cost,
        times_s=tuple(times_s),
        predicted_bytes_by_kind=predicted,
        compiled_bytes_by_kind=bytes_by_kind(compiled_collectives(step.program.as_text())),
        argument_bytes=step.memory.argument_bytes,
        temporary_bytes=step.memory.temporary_bytes,
        peak_bytes=step.memory.peak_bytes,
    )


def _machine(devices: Sequence[Any]) -> dict[str, Any]:
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "simulated": is_simulated(devices),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    others = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"jaxlwp": __version__} | {name: importlib.metadata.version(name) for name in others}
