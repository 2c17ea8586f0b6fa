"""Seconds of programs on the devices at hand: several at once, in turn, until they are steady."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.devices import (
    DeviceGraph,
    Measurement,
)
from jaxlwp.measure import _pages
from jaxlwp.measure._local import LocalStep
from jaxlwp.program import Value

ROUNDS = (4, 21)
"""Least and most runs of a program."""

ENOUGH_S = 0.5
"""A program that has run so long in all, and often enough, is measured."""

COPIES = (2, 16)
"""Least and most copies of a step in its program; compiling takes longer the more there are."""

LONG_S = 4e-3
"""Seconds of a program that stand out from those of a call."""

RANDOM_VALUES = 1 << 20
"""Different values of an operand: making them anew takes longer than the work on them."""

COLD = 10
"""The first run of a program may take so many times as long as the next."""

STEADY = 0.02
"""Relative standard error of the median at which a program is measured."""

TOUCHED = 0.75
"""Share of a run that new memory may take at most. Its price is an average of pages; where it would
take more, that price is off, and the layer must not come out free."""

NEGLIGIBLE = 0.02
"""Standard error at which a program is measured, too, over what a step that does nothing takes."""

CHUNK = 8
"""Programs that take turns."""

CHUNK_BYTES = 1 << 31
"""Bytes of operands of the programs that take turns, over all devices."""


def chunks(steps: Sequence[LocalStep], devices: int) -> Iterator[list[LocalStep]]:
    """The steps in groups whose operands fit into memory together."""
    chunk: list[LocalStep] = []
    chunk_bytes = 0
    for step in steps:
        num_bytes = 4 * devices * sum(math.prod(v.shape) * v.itemsize for v in step.operands)
        if chunk and (len(chunk) == CHUNK or chunk_bytes + num_bytes > CHUNK_BYTES):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(step)
        chunk_bytes += num_bytes
    if chunk:
        yield chunk


@dataclass
class _Runner:
    """A program of several copies of one step, and what it has taken.

    `allocated_bytes` are of a run's temporaries and results on one device, without what is donated.
    A kernel's own scratch memory is not among them: it costs a training step just as much.
    """

    step: LocalStep
    mesh: Mesh
    rates: DeviceGraph
    copies: int = 0
    program: Any = None
    allocated_bytes: int = 0
    carried: list[Any] = field(default_factory=list)
    fixed: list[Any] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def prepare(self) -> None:
        """Compile; more copies of what is short, for its time to stand out from a call's."""
        count = self.step.carried
        self.carried = [self.random(v, n) for n, v in enumerate(self.step.operands[:count])]
        if self.use(COPIES[0]) > COLD * LONG_S:
            return
        taken_s = min(self.once() for _ in range(2))
        if taken_s < LONG_S:
            self.use(min(math.ceil(COPIES[0] * LONG_S / taken_s), COPIES[1]))

    def use(self, copies: int) -> float:
        """Compile a program of so many copies; seconds of its first run."""
        self.copies, self.program = copies, self.compiled(copies)
        memory = self.program.memory_analysis()  # asked once: it takes milliseconds
        made = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.allocated_bytes = int(memory.temp_size_in_bytes + max(made, 0))
        return self.once()

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("device"))

    def random(self, value: Value, seed: int) -> Any:
        """One block for each device, stacked: the same on all, and large ones repeat themselves."""
        shape = (self.mesh.size, *value.shape)
        if not isinstance(value.dtype, np.dtype):  # random keys
            keys = jax.random.split(jax.random.key(seed), shape)
            return jax.device_put(keys, self.sharding)
        values = np.zeros(1, np.float32)
        if value.differentiable:
            count = min(math.prod(value.shape), RANDOM_VALUES)
            values = np.random.default_rng(seed).standard_normal(count, np.float32) * 0.1
        block = np.resize(values.astype(value.dtype), value.shape)
        return jax.device_put(np.broadcast_to(block, shape), self.sharding)

    def compiled(self, copies: int) -> Any:
        """A program of so many copies.

        What is not carried is another array for each copy: of work on that alone, equal copies
        would be merged.
        """
        spec = PartitionSpec("device")
        rest = self.step.operands[self.step.carried :]
        for copy in range(len(self.fixed), copies):
            self.fixed.append([self.random(v, n + 100 * copy) for n, v in enumerate(rest)])

        def body(carried: Any, fixed: Any) -> Any:
            carried, fixed = jax.tree.map(lambda x: x[0], (carried, fixed))
            made: tuple[Any, ...] = ()
            for others in fixed:
                results = self.step(*carried, *others)
                carried, made = results[: self.step.carried], results[self.step.carried :]
            return jax.tree.map(lambda x: x[None], (list(carried), made))

        mapped = jax.shard_map(
            body, mesh=self.mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
        )
        jitted = jax.jit(mapped, donate_argnums=0)
        return jitted.lower(self.carried, self.fixed[:copies]).compile()

    def once(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.carried, made = self.program(self.carried, self.fixed[: self.copies])
        jax.block_until_ready((self.carried, made))
        return time.perf_counter() - start

    def turn(self) -> None:
        """Run it, and keep the time, and how many pages of memory it took anew."""
        before = _pages.taken()
        self.times_s.append(self.once())
        self.pages.append(_pages.taken() - before)

    def work_s(self, run_s: float, pages: int, call_s: float) -> float:
        """Seconds of a run without what is not the step's: the call, its arrays, new memory."""
        arrays = len(self.step.operands) + (self.copies - 1) * len(self.fixed[0])
        called_s = call_s + self.rates.leaf_s * arrays
        # Next to nothing, hidden by noise: a small part of a run stands in for it.
        rest_s = max(run_s - called_s, 1e-3 * min(self.times_s))
        # Whether the C library has kept a block from the run before depends on what ran between.
        new_bytes = min(pages * _pages.page_bytes() / self.mesh.size, self.allocated_bytes)
        touch_s = self.rates.first_touch_s(math.inf) * new_bytes
        return rest_s - min(touch_s, TOUCHED * rest_s)

    @property
    def done(self) -> bool:
        """Measured often and long enough, or steady."""
        least, most = ROUNDS
        samples = len(self.times_s)
        if samples < least:
            return False
        timing = self.timing()
        error_s = 1.25 * timing.spread * timing.seconds / math.sqrt(samples)
        steady = error_s < max(STEADY * timing.seconds, NEGLIGIBLE * self.rates.step_s)
        return steady or samples >= most or sum(self.times_s) > ENOUGH_S

    def timing(self, call_s: float = 0.0) -> Measurement:
        """Of one copy.

        Args:
          call_s: seconds of a call that does next to nothing.
        """
        runs = zip(self.times_s, self.pages, strict=True)
        each = [self.work_s(run_s, pages, call_s) / self.copies for run_s, pages in runs]
        typical_s = statistics.median(each)
        spread = statistics.median(abs(s - typical_s) for s in each) / typical_s
        return Measurement(seconds=typical_s, spread=spread, samples=len(each))


@functools.lru_cache(maxsize=2)
def _empty_call(mesh: Mesh) -> Callable[[], float]:
    """A function that returns the seconds of a call that does next to nothing on every device."""
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    x = jax.device_put(np.zeros(mesh.size, np.float32), sharding)
    program = jax.jit(lambda x: x + 1.0).lower(x).compile()

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        return time.perf_counter() - start

    run()
    return run


# A plan may be made while a training step is traced: without this, nothing would run.
@jax.ensure_compile_time_eval()
def time_together(steps: Sequence[LocalStep], mesh: Mesh, rates: DeviceGraph) -> list[Measurement]:
    """Timings of some steps that take turns, with each other and with a call that is empty."""
    run_empty = _empty_call(mesh)
    empty_s = [run_empty()]
    runners = [_Runner(step, mesh, rates) for step in steps]
    for runner in runners:
        runner.prepare()
    waiting = list(runners)
    while waiting:
        for runner in waiting:
            runner.turn()
        empty_s.append(run_empty())
        waiting = [runner for runner in waiting if not runner.done]
    return [runner.timing(statistics.median(empty_s)) for runner in runners]
