"""A forecast of a step on GPUs that need not exist, from the program compiled for them.

A compiled, scheduled module says nearly everything: every kernel's shapes, every collective's
bytes, devices, start and done. What it does not say are rates; those are the system's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxlwp.check._kernels import KernelReader
from jaxlwp.check._module import Module, parse
from jaxlwp.check._schedule import schedule
from jaxlwp.check._target import TargetStep
from jaxlwp.check._timeline import (
    COMMUNICATION,
    COMPUTE,
    EXPOSED,
    Event,
    KindTotal,
    Timeline,
)
from jaxlwp.check._trace import chrome_trace, write_trace
from jaxlwp.devices import System
from jaxlwp.plan import ProgramMemory, program_memory


class Compiled(Protocol):
    """What `jax.jit(step).lower(...).compile()` returns."""

    def as_text(self) -> str | None:
        """The compiled program."""
        ...

    def memory_analysis(self) -> Any:
        """What it takes of memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a program does on a system, and when.

    Attributes:
      system: name of the system.
      num_devices: how many devices run the program; all run the same.
      total_s: seconds from its first kernel to its last kernel or collective.
      events: every kernel and collective, and every wait of the kernels for a collective. Of a
        loop a few iterations are shown, the others are one event.
      kernels: kind -> sums over all kernels, loops included. Kinds are "convolution forward",
        "convolution backward-input", "convolution backward-filter", "product", "fusion",
        "reduction", "copy" and "other".
      collectives: kind -> sums over all collectives, loops included; bytes are those of the
        operands on one device.
      exposed: kind of collective -> sums over the waits of kernels for one.
      memory: of a device, by the compiler's account; None if only text was given. cuDNN's
        workspaces are not in it.
      notes: what the text did not say, and what was assumed for it.
    """

    system: str
    num_devices: int
    total_s: float
    events: tuple[Event, ...] = field(repr=False)
    kernels: Mapping[str, KindTotal]
    collectives: Mapping[str, KindTotal]
    exposed: Mapping[str, KindTotal]
    memory: ProgramMemory | None = None
    notes: tuple[str, ...] = ()

    @property
    def compute_s(self) -> float:
        """Seconds of all kernels."""
        return sum(total.seconds for total in self.kernels.values())

    @property
    def communication_s(self) -> float:
        """Seconds of all collectives, whether kernels run beside them or not."""
        return sum(total.seconds for total in self.collectives.values())

    @property
    def exposed_s(self) -> float:
        """Seconds in which kernels wait for a collective: total less compute."""
        return sum(total.seconds for total in self.exposed.values())

    @property
    def num_kernels(self) -> int:
        """How many kernels run."""
        return sum(total.count for total in self.kernels.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(total.num_bytes for total in self.kernels.values())

    @property
    def flops(self) -> float:
        """Operations of convolutions and matrix products; a multiply-add is two."""
        return sum(total.flops for total in self.kernels.values())

    def trace(self) -> dict[str, Any]:
        """The timeline in Chrome's trace format, which Perfetto (ui.perfetto.dev) opens.

        Kernels, collectives and exposed communication have a track each; bytes, operations, dtype
        and origin are arguments of each event. Times are in microseconds.
        """
        return chrome_trace(self.events, f"{self.system}: one of {self.num_devices} devices")

    def save_trace(self, path: str | Path) -> None:
        """Write `trace` as JSON, compressed if the name ends in ".gz"; Perfetto opens both.

        Raises:
          OSError: the file cannot be written.
        """
        write_trace(self.trace(), path)

    def __str__(self) -> str:
        """A row per kind of kernel and collective."""
        from jaxlwp.report import forecast_text

        return forecast_text(self)


def forecast(compiled: Compiled | TargetStep | str, system: System) -> Forecast:
    """Forecast how long a compiled GPU program takes on a system.

    Any program that JAX has compiled for GPUs will do, whether they are there or not: a plan's
    step (`compile_for`), or a step of one's own.

    Args:
      compiled: what `jax.jit(step).lower(...).compile()` or `compile_for` returns, or the text
        that its `as_text()` gives.
      system: GPUs and links, as in `jaxlwp.devices.preset("dgx-h200")`.

    Returns:
      Seconds in all and of every kernel and collective. Print it, or `save_trace` it.

    Raises:
      ValueError: the text is no scheduled module, cannot be read, or is for more devices than the
        system has.
    """
    memory = None
    if isinstance(compiled, TargetStep):
        text, memory = compiled.text, compiled.memory
    elif isinstance(compiled, str):
        text = compiled
    else:
        text, memory = compiled.as_text() or "", _memory(compiled)
    module = parse(text)
    _check(module, system)
    reader = KernelReader(module=module, gpu=system.gpu)
    timeline = Timeline(system=system)
    timeline.run(schedule(module, reader))
    timeline.finish()
    return Forecast(
        system=system.name,
        num_devices=module.num_replicas * module.num_partitions,
        total_s=timeline.compute_s,
        events=tuple(timeline.events),
        kernels=_of(timeline, COMPUTE),
        collectives=_of(timeline, COMMUNICATION),
        exposed=_of(timeline, EXPOSED),
        memory=memory,
        notes=tuple(reader.notes),
    )


def _of(timeline: Timeline, stream: str) -> dict[str, KindTotal]:
    """Sums of a stream by kind, the longest first."""
    totals = {kind: total for (s, kind), total in timeline.totals.items() if s == stream}
    return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


def _memory(compiled: Compiled) -> ProgramMemory | None:
    """The compiler's account, if it gives one."""
    return None if compiled.memory_analysis() is None else program_memory(compiled, "gpu")


def _check(module: Module, system: System) -> None:
    if not module.is_scheduled:
        raise ValueError(
            "forecast: the module is not scheduled (no is_scheduled=true in its header), so "
            "nothing is known of what runs beside what; give compiled.as_text(), not the text of "
            "a lowered program"
        )
    num_devices = module.num_replicas * module.num_partitions
    if num_devices > system.num_devices:
        raise ValueError(
            f"forecast: the program is for {num_devices} devices, {system.name} has "
            f"{system.num_devices}; give a system of as many, as in preset(name, hosts=...)"
        )
