"""Training steps compiled and measured in turn, as many as the devices have memory for."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxlwp._progress import Progress, silent
from jaxlwp.devices import (
    from_first,
    local_devices,
    spans_processes,
)
from jaxlwp.mesh import need_devices
from jaxlwp.plan import (
    OPTIMIZER,
    Plan,
    ProgramMemory,
    initial_state,
    lower_step,
    place_arguments,
    program_memory,
)
from jaxlwp.program import Arguments

ROUNDS = 7
"""How often each strategy's step is timed, if nothing else is asked for."""


def batch_of(arguments: Arguments) -> Arguments:
    """All arguments but the parameters."""
    return arguments[0][1:], arguments[1]


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
    params, batch = arguments[0][0], batch_of(arguments)
    state = initial_state(plan, params, optimizer or OPTIMIZER)
    step = compiled_step(plan, state, batch, optimizer)
    taken = measured_steps([step], state, batch, rounds, silent)
    return taken[0]


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension of its first array that has one."""
    shapes = (tuple(leaf.shape) for leaf in jax.tree.leaves(batch) if hasattr(leaf, "shape"))
    return next((shape[0] for shape in shapes if shape), 1)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled training step of one plan."""

    plan: Plan
    program: Any
    memory: ProgramMemory

    def place(self, state: Any, batch: Arguments) -> tuple[Any, Arguments]:
        return self.plan.place(state), place_arguments(self.plan, batch)


def compiled_step(plan: Plan, state: Any, batch: Arguments, optimizer: Any = None) -> Step:
    program = lower_step(plan, state, batch, optimizer or OPTIMIZER).compile()
    memory = program_memory(program, need_devices("compare", plan.mesh).devices.flat[0].platform)
    return Step(plan=plan, program=program, memory=memory)


def measured_steps(
    steps: Sequence[Step], state: Any, batch: Arguments, rounds: int, progress: Progress
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
    free_bytes = accelerator_bytes(devices)
    if free_bytes is not None:
        return free_bytes
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        # Simulated devices share the host's memory, and others want some of it.
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 0.5 * free_bytes / len(devices)
    return 0.0


def accelerator_bytes(devices: Sequence[Any]) -> float | None:
    """Bytes that a device with memory of its own has left, but for a tenth; None for others."""
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return 0.9 * float(stats["bytes_limit"] - stats["bytes_in_use"])
    return None


def is_simulated(devices: Sequence[Any]) -> bool:
    """Whether the devices share one host's processor."""
    return len(devices) > 1 and devices[0].platform == "cpu"
