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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxlwp._version import __version__
from jaxlwp.check._hlo import bytes_by_kind, compiled_collectives
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
    ProgramMemory,
    lower_step,
    place_arguments,
    plan_for,
    plan_memory,
    program_memory,
    with_strategy,
)
from jaxlwp.program import Arguments, canonical
from jaxlwp.solver import Cost
from jaxlwp.space import BASELINES, Strategy

FORMAT_VERSION = 1
STRATEGIES = ("search", *BASELINES)
ROUNDS = 7

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many parts of it are done, and of how many."""


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


def compare(
    fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    devices: Sequence[Any] | int | None = None,
    strategies: Sequence[str | Strategy] = BASELINES,
    rounds: int = ROUNDS,
    rates: GivenRates | DeviceGraph | None = None,
    memory_bytes: float | None = None,
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
        raise ValueError(f"compare: rounds is {rounds}; it must be at least 1: 7 give a median")
    progress = on_progress or (lambda what, done, total: None)
    arguments = canonical("compare", fn, (params, *batch), keywords)
    plans, left_out = _make_plans(fn, arguments, devices, strategies, rates, memory_bytes, progress)
    state, data = (params, OPTIMIZER.init(params)), _batch_of(arguments)
    steps: list[_Step] = []
    for plan in plans:
        progress("compiling steps", len(steps), len(plans))
        steps.append(_compile(plan, state, data))
    progress("compiling steps", len(steps), len(plans))
    times = _measure(steps, state, data, rounds, progress)
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


def _batch_of(arguments: Arguments) -> Arguments:
    """All arguments but the parameters."""
    return arguments[0][1:], arguments[1]


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
    progress, optimizer = progress or (lambda what, done, total: None), optimizer or OPTIMIZER
    others = applicable(plan, against)
    fitting, left_out = _fitting(others, _limit_bytes(plan, memory_bytes), optimizer)
    plans = [plan, *fitting]
    params, batch = arguments[0][0], _batch_of(arguments)
    state = (params, optimizer.init(params))
    steps = []
    for number, each in enumerate(plans):
        progress("compiling steps", number, len(plans))
        steps.append(_compile(each, state, batch, optimizer))
    taken = _measure(steps, state, batch, rounds, progress)
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
    for name in against:
        try:
            other = plan.space.baseline(name)
        except ValueError:
            continue
        if all(other.configs != known.strategy.configs for known in plans):
            plans.append(with_strategy(plan, other))
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
    free_bytes = _accelerator_bytes(local_devices(mesh))
    if spans_processes(mesh):  # all must run the same programs
        free_bytes = from_first(free_bytes, mesh)
    allowed_bytes = math.inf if memory_bytes is None else memory_bytes / MEMORY_MARGIN
    return min(allowed_bytes, math.inf if free_bytes is None else free_bytes)


def step_times(
    plan: Plan, arguments: Arguments, optimizer: Any = None, rounds: int = ROUNDS
) -> list[float]:
    """Measured seconds of a plan's training steps.

    Args:
      plan: the plan.
      arguments: (params, *batch), and arguments by name, as arrays.
      optimizer: optax transformation of the step; SGD with momentum by default.
      rounds: how many steps, after one to warm up.
    """
    params, batch = arguments[0][0], _batch_of(arguments)
    state = (params, (optimizer or OPTIMIZER).init(params))
    step = _compile(plan, state, batch, optimizer)
    taken = _measure([step], state, batch, rounds, lambda what, done, total: None)
    return taken[0]


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension of its first array that has one."""
    shapes = (tuple(leaf.shape) for leaf in jax.tree.leaves(batch) if hasattr(leaf, "shape"))
    return next((shape[0] for shape in shapes if shape), 1)


def _make_plans(
    fn: Callable[..., Any],
    arguments: Arguments,
    devices: Sequence[Any] | int | None,
    strategies: Sequence[str | Strategy],
    rates: GivenRates | DeviceGraph | None,
    memory_bytes: float | None,
    progress: Progress,
) -> tuple[list[Plan], dict[str, int]]:
    """The plan found, those of strategies that fit, all over one space; bytes of the others."""
    mesh = make_mesh(choose_devices(devices))
    progress("measuring device rates", 0, 1)
    rated = rates if isinstance(rates, DeviceGraph) else device_graph(mesh, rates=rates)
    progress("measuring device rates", 1, 1)
    progress("tracing, pricing and searching", 0, 1)
    measured = rates is None
    found = plan_for(
        fn,
        arguments,
        mesh=mesh,
        rates=rated,
        measure=measured,
        memory_bytes=memory_bytes,
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
    progress("tracing, pricing and searching", 1, 1)
    return plans, left_out


# --- one training step -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A compiled training step of one plan."""

    plan: Plan
    program: Any
    memory: ProgramMemory

    def place(self, state: Any, batch: Arguments) -> tuple[Any, Arguments]:
        return self.plan.place(state), place_arguments(self.plan, batch)


def _compile(plan: Plan, state: Any, batch: Arguments, optimizer: Any = None) -> _Step:
    program = lower_step(plan, state, batch, optimizer or OPTIMIZER).compile()
    memory = program_memory(program, need_devices("compare", plan.mesh).devices.flat[0].platform)
    return _Step(plan=plan, program=program, memory=memory)


def _result(step: _Step, times_s: Sequence[float]) -> StrategyResult:
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


# --- measuring -------------------------------------------------------------------------------


def _measure(
    steps: Sequence[_Step], state: Any, batch: Arguments, rounds: int, progress: Progress
) -> list[list[float]]:
    """Seconds of every step, `rounds` times, in rotating order.

    Every turn is two steps, and the second counts. The states of as many steps as memory allows
    stay on the devices; the others are placed anew for every turn.
    """
    stay = _staying([step.memory for step in steps], _free_bytes(steps[0].plan))
    placed: dict[int, tuple[Any, Arguments]] = {}
    times: list[list[float]] = [[] for _ in steps]
    turns = [(i + shift) % len(steps) for shift in range(rounds) for i in range(len(steps))]
    for turn, number in enumerate(turns):
        progress("timing steps", turn, len(turns))
        program = steps[number].program
        if number not in placed:
            placed[number] = steps[number].place(state, batch)
        current, data = placed.pop(number)
        # In training a step follows its like: what the others left in caches is gone by then.
        current, _ = _finished(program(current, *data))
        start = time.perf_counter()
        current, _ = _finished(program(current, *data))
        times[number].append(time.perf_counter() - start)
        if number in stay:
            placed[number] = current, data
        del current, data
    progress("timing steps", len(turns), len(turns))
    return times


def _finished(results: Any) -> Any:
    """The results of a program, once it has computed them."""
    for leaf in jax.tree.leaves(results):
        leaf.block_until_ready()
    return results


def _staying(memories: Sequence[ProgramMemory], free_bytes: float) -> set[int]:
    """The steps, smallest state first, whose states fit beside the largest step in progress."""
    stay: set[int] = set()
    used_bytes = max(memory.peak_bytes for memory in memories)
    for number in sorted(range(len(memories)), key=lambda n: memories[n].argument_bytes):
        used_bytes += memories[number].argument_bytes
        if used_bytes <= free_bytes:
            stay.add(number)
    return stay


def _free_bytes(plan: Plan) -> float:
    """Bytes of memory per device that a comparison may take."""
    mesh = need_devices("compare", plan.mesh)
    num_bytes = _free_here(local_devices(mesh))
    return float(from_first(num_bytes, mesh)) if spans_processes(mesh) else num_bytes


def _free_here(devices: Sequence[Any]) -> float:
    free_bytes = _accelerator_bytes(devices)
    if free_bytes is not None:
        return free_bytes
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        # Simulated devices share the host's memory, and others want some of it.
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 0.5 * free_bytes / len(devices)
    return 0.0


def _accelerator_bytes(devices: Sequence[Any]) -> float | None:
    """Bytes that a device with memory of its own has left, but for a tenth; None for others."""
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return 0.9 * float(stats["bytes_limit"] - stats["bytes_in_use"])
    return None


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


def is_simulated(devices: Sequence[Any]) -> bool:
    """Whether the devices share one host's processor."""
    return len(devices) > 1 and devices[0].platform == "cpu"


def _versions() -> dict[str, str]:
    others = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"jaxlwp": __version__} | {name: importlib.metadata.version(name) for name in others}
