"""When each step of a schedule runs: two streams, one of kernels and one of collectives.

Kernels run one after another, in the order of the schedule. A collective starts when the kernels
in front of it have run and the collective before it has ended. What is behind a collective's done
waits for its end; the stream of kernels is idle meanwhile, and that is exposed communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxlwp.check._hlo import Groups
from jaxlwp.check._kernels import Kernel
from jaxlwp.check._schedule import Branches, Done, Loop, Start, Step
from jaxlwp.devices import System
from jaxlwp.lower import layer_index

COMPUTE, COMMUNICATION, EXPOSED = "compute", "communication", "exposed communication"

SHOWN = 4
"""Iterations of a loop that are followed one by one; the others take as long as the last of them:
a collective that is started in an iteration has ended with it."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that takes time.

    Attributes:
      name: of the instruction in the program; for exposed communication, of the collective.
      kind: of the kernel, or of the collective, or "loop": the iterations that are not shown.
      stream: "compute", "communication" or "exposed communication".
      start_s: seconds since the program began.
      end_s: the same.
      num_bytes: that a kernel reads and writes, or of a collective's operands on one device.
      flops: of convolutions and products.
      op_name: where it comes from, in JAX's words.
      dtype: as the arithmetic units take the operands, "" where nothing is known of it.
    """

    name: str
    kind: str
    stream: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    flops: float = 0.0
    op_name: str = ""
    dtype: str = ""

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_s - self.start_s

    @property
    def layer(self) -> int | None:
        """Index of the layer of a plan for which it runs; None for other programs, or the update.

        A fusion has the name of one of its members.
        """
        return layer_index(self.op_name)


@dataclass(frozen=True, kw_only=True)
class KindTotal:
    """What all kernels or collectives of one kind sum up to, over all iterations of loops.

    Attributes:
      count: how many run.
      num_bytes: bytes.
      flops: operations.
      seconds: seconds.
    """

    count: int = 0
    num_bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def plus(self, event: Event, times: int) -> KindTotal:
        """With an event that happens so many times."""
        return KindTotal(
            count=self.count + times,
            num_bytes=self.num_bytes + times * event.num_bytes,
            flops=self.flops + times * event.flops,
            seconds=self.seconds + times * event.seconds,
        )


@dataclass(kw_only=True)
class Timeline:
    """Two streams and what has run on them so far.

    Attributes:
      system: what the program runs on.
      compute_s: when the stream of kernels is free.
      communication_s: when that of collectives is.
      events: what has run.
      totals: (stream, kind) -> sums, over all iterations.
    """

    system: System
    compute_s: float = 0.0
    communication_s: float = 0.0
    events: list[Event] = field(default_factory=list)
    totals: dict[tuple[str, str], KindTotal] = field(default_factory=dict)
    _started: dict[str, Event] = field(default_factory=dict)
    _prices: dict[tuple[str, int, Groups], float] = field(default_factory=dict)

    def run(self, steps: Iterable[Step], times: int = 1) -> None:
        """Run steps, which count so many times."""
        for step in steps:
            match step:
                case Kernel():
                    self._kernel(step, times)
                case Start():
                    self._start(step, times)
                case Done():
                    self._wait(self._started.pop(step.name), times)
                case Loop():
                    self._loop(step, times)
                case Branches():
                    self.run(self._longest(step), times)

    def finish(self) -> None:
        """Wait for collectives that nobody has waited for."""
        for event in self._started.values():
            self._wait(event, 1)
        self._started.clear()

    def _add(self, event: Event, times: int) -> Event:
        key = event.stream, event.kind
        self.totals[key] = self.totals.get(key, KindTotal()).plus(event, times)
        self.events.append(event)
        return event

    def _kernel(self, kernel: Kernel, times: int) -> None:
        start_s = self.compute_s
        self.compute_s = start_s + kernel.seconds
        self._add(
            Event(
                name=kernel.name,
                kind=kernel.kind,
                stream=COMPUTE,
                start_s=start_s,
                end_s=self.compute_s,
                num_bytes=kernel.num_bytes,
                flops=kernel.flops,
                op_name=kernel.op_name,
                dtype=kernel.dtype,
            ),
            times,
        )

    def _start(self, start: Start, times: int) -> None:
        start_s = max(self.compute_s, self.communication_s)
        self.communication_s = start_s + self._seconds(start)
        event = Event(
            name=start.name,
            kind=start.kind,
            stream=COMMUNICATION,
            start_s=start_s,
            end_s=self.communication_s,
            num_bytes=start.num_bytes,
            op_name=start.op_name,
        )
        self._add(event, times)
        if start.is_sync:
            self._wait(event, times)
        else:
            self._started[start.name] = event

    def _seconds(self, start: Start) -> float:
        key = start.kind, start.num_bytes, start.groups
        if key not in self._prices:
            self._prices[key] = collective_s(self.system, *key)
        return self._prices[key]

    def _wait(self, collective: Event, times: int) -> None:
        if collective.end_s <= self.compute_s:
            return
        exposed = Event(
            name=collective.name,
            kind=collective.kind,
            stream=EXPOSED,
            start_s=self.compute_s,
            end_s=collective.end_s,
            op_name=collective.op_name,
        )
        self._add(exposed, times)
        self.compute_s = collective.end_s

    def _loop(self, loop: Loop, times: int) -> None:
        shown = min(loop.trips, SHOWN)
        rest = loop.trips - shown
        start_s = 0.0
        for i in range(shown):
            start_s = self.compute_s
            self.run(loop.body, times * (1 + rest if i == shown - 1 else 1))
        if rest:
            begin_s = self.compute_s
            self.compute_s += rest * (begin_s - start_s)
            self.events.append(
                Event(
                    name=f"{loop.name}: {rest} more iterations",
                    kind="loop",
                    stream=COMPUTE,
                    start_s=begin_s,
                    end_s=self.compute_s,
                )
            )

    def _longest(self, branches: Branches) -> Sequence[Step]:
        """The branch that takes longest on its own."""
        return max(branches.bodies, key=lambda body: alone_s(self.system, body), default=())


def alone_s(system: System, steps: Iterable[Step]) -> float:
    """Seconds that steps take when nothing runs beside them."""
    timeline = Timeline(system=system)
    timeline.run(steps)
    timeline.finish()
    return timeline.compute_s


def collective_s(system: System, kind: str, num_bytes: float, groups: Groups) -> float:
    """Seconds of a collective: of its slowest group, or of its slowest pair if it is a permute.

    Args:
      system: what the program runs on.
      kind: as in HLO, without `-start`. A broadcast is charged as the all-gather of its parts.
      num_bytes: of its operands on one device.
      groups: the devices of each group.

    Raises:
      ValueError: devices that the system does not have.
    """
    if kind == "collective-broadcast":
        parts = max(len(group) for group in groups)
        kind, num_bytes = "all-gather", num_bytes / parts
    elif kind == "ragged-all-to-all":
        kind = "all-to-all"
    return max(
        system.collective_s(kind, num_bytes, group) for group in groups if len(set(group)) > 1
    )
