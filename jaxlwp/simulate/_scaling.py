"""How a network scales over systems of growing size, by the cost model: nothing runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlwp._progress import Progress, reporting, silent
from jaxlwp.devices import System
from jaxlwp.plan import MEMORY_MARGIN, Plan, baselines, plan_for, plan_memory
from jaxlwp.program import canonical
from jaxlwp.solver import MemoryLimitError
from jaxlwp.space import BASELINES

Workload = Callable[[int], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
"""From the examples of a batch to (loss_fn, params, batch), called as loss_fn(params, *batch);
shapes will do."""

FOUND = "found"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One strategy on one system.

    Attributes:
      strategy: "found", or a baseline's name.
      step_s: predicted seconds of a training step.
      examples_per_s: examples of all devices per second.
      efficiency: of what as many single GPUs would do, each on its own.
      sent_bytes: operands of the collectives of one device in a step.
      memory_bytes: what a step takes of a device, as compiled for GPUs.
      fits: whether that is less than the device has, by the margin that a search keeps.
    """

    strategy: str
    step_s: float
    examples_per_s: float
    efficiency: float
    sent_bytes: int
    memory_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """All strategies on one system.

    Attributes:
      system: as it prints itself, such as "4 x dgx-h100 with 8 x h100 each".
      hosts: of the system.
      devices: GPUs of the system.
      batch: examples in a step.
      outcomes: the strategy found first, then the baselines that apply.
    """

    system: str
    hosts: int
    devices: int
    batch: int
    outcomes: tuple[Outcome, ...]

    def outcome(self, strategy: str) -> Outcome:
        """That of a strategy.

        Raises:
          KeyError: it does not apply.
        """
        return {each.strategy: each for each in self.outcomes}[strategy]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A network over systems of growing size. Print it.

    Attributes:
      model: the network's name.
      weak: the batch grows with the devices; else it is the same on all.
      gpu: name of the GPU.
      gpu_bytes: memory of one.
      one_s: seconds of a step of one GPU alone, of its share of the batch where it grows, else of
        the whole, whether or not that fits.
      points: one for each system.
    """

    model: str
    weak: bool
    gpu: str
    gpu_bytes: float
    one_s: float
    points: tuple[Point, ...]

    def gpu_hours(self, point: Point, examples: float, strategy: str = FOUND) -> float:
        """Hours of all GPUs together for so many examples, such as epochs times a data set."""
        return examples / point.outcome(strategy).examples_per_s * point.devices / 3600

    def to_json(self) -> str:
        """As JSON text.

        Keys: `format_version`, `model`, `scaling` ("weak" or "strong"), `gpu`, `gpu_bytes`,
        `one_s`, and `points`, a list with the attributes of `Point`, `outcomes` with those of
        `Outcome`.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "scaling": "weak" if self.weak else "strong",
            "gpu": self.gpu,
            "gpu_bytes": self.gpu_bytes,
            "one_s": self.one_s,
            "points": [
                {**vars(point), "outcomes": [vars(each) for each in point.outcomes]}
                for point in self.points
            ],
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        """A row for each system and strategy."""
        from jaxlwp.report import scaling_text

        return scaling_text(self)


@reporting
def scaling(
    workload: Workload,
    systems: Sequence[System],
    *,
    batch: int,
    weak: bool = True,
    strategies: Sequence[str] = BASELINES,
    name: str | None = None,
    optimizer: Any = None,
    sum_dtype: Any = None,
    on_progress: Progress | None = None,
) -> Scaling:
    """Plan a network for systems of growing size, and set strategies side by side.

    Args:
      workload: makes the training function and its arguments for a batch.
      systems: as in `[preset("dgx-a100", hosts=n) for n in (1, 2, 4, 8)]`, of one GPU model.
      batch: examples for each GPU if `weak`, else in all.
      weak: the batch grows with the system (weak scaling); False keeps it (strong scaling).
      strategies: names of the baselines to set beside it; all by default.
      name: of the network, for the report; the workload's by default.
      optimizer: the optax transformation of the step; SGD with momentum by default.
      sum_dtype: as for `parallelize`.
      on_progress: called as `on_progress(what, done, total)`.

    Returns:
      Predicted steps, efficiency, bytes and memory of the strategy found, within the GPU's memory
      if that is possible, and of the baselines.

    Raises:
      ValueError: no systems or several GPU models, a batch below 1, an unknown baseline, a model
        that cannot be traced.
    """
    _check(systems, batch, strategies)
    progress = on_progress or silent
    options: dict[str, Any] = {"optimizer": optimizer, "sum_dtype": sum_dtype}
    gpu = systems[0].gpu
    progress("planning", 0, len(systems) + 1)
    alone = planned(workload, one_gpu(systems[0]), batch, strategy="data", **options)
    one_s = alone.cost.total_s
    one_rate = batch / one_s
    points = []
    for number, system in enumerate(systems):
        progress("planning", number + 1, len(systems) + 1)
        examples = batch * system.num_devices if weak else batch
        found = _within_memory(workload, system, examples, **options)
        plans = {FOUND: found} | baselines(found, strategies)
        points.append(
            Point(
                system=str(system),
                hosts=system.num_hosts,
                devices=system.num_devices,
                batch=examples,
                outcomes=tuple(
                    _outcome(name, plan, system, examples, one_rate, optimizer)
                    for name, plan in plans.items()
                ),
            )
        )
    progress("planning", len(systems) + 1, len(systems) + 1)
    return Scaling(
        model=name or str(getattr(workload, "__qualname__", type(workload).__name__)),
        weak=weak,
        gpu=gpu.name,
        gpu_bytes=gpu.memory_bytes,
        one_s=one_s,
        points=tuple(points),
    )


def _check(systems: Sequence[System], batch: int, strategies: Sequence[str]) -> None:
    if not systems:
        raise ValueError("scaling: no systems are given; give one for each number of hosts")
    names = {system.gpu.name for system in systems}
    if len(names) > 1:
        raise ValueError(
            f"scaling: systems of {', '.join(sorted(names))} are given; efficiency is that of one "
            "GPU model: make a study of each"
        )
    if batch < 1:
        raise ValueError(f"batch: {batch} given; give a number of examples of at least 1")
    unknown = [name for name in strategies if name not in BASELINES]
    if unknown:
        raise ValueError(
            f"strategies: {', '.join(unknown)} given; give names of {', '.join(BASELINES)}"
        )


def one_gpu(system: System) -> System:
    """One GPU of a system alone."""
    return replace(system, inside=replace(system.inside, devices=1), across=None)


def planned(workload: Workload, system: System, batch: int, **options: Any) -> Plan:
    """The plan of a workload for a system."""
    fn, params, data = workload(batch)
    arguments = canonical("workload", fn, (params, *data), {})
    return plan_for(fn, arguments, devices=system, **options)


def _within_memory(workload: Workload, system: System, batch: int, **options: Any) -> Plan:
    """The fastest plan that fits the GPU; the fastest of all if none does."""
    try:
        return planned(workload, system, batch, memory_bytes=system.gpu.memory_bytes, **options)
    except MemoryLimitError:
        return planned(workload, system, batch, **options)


def _outcome(
    name: str, plan: Plan, system: System, batch: int, one_rate: float, optimizer: Any
) -> Outcome:
    step_s = plan.cost.total_s
    memory = plan_memory(plan, optimizer)
    return Outcome(
        strategy=name,
        step_s=step_s,
        examples_per_s=batch / step_s,
        efficiency=batch / step_s / (system.num_devices * one_rate),
        sent_bytes=sum(collective.num_bytes for collective in plan.collectives),
        memory_bytes=memory.peak_bytes,
        fits=MEMORY_MARGIN * memory.peak_bytes <= system.gpu.memory_bytes,
    )
