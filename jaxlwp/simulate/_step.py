"""A training step, event by event, from its prices alone: nothing is compiled, and no device asked.

The plain sum adds up what a step does. Here the same seconds are put where they belong: on the
stream of kernels of a device, on its links, on the adapter of its host, each behind what it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxlwp.check import Span, spans_trace, write_trace
from jaxlwp.cost import SearchSpace
from jaxlwp.plan import Plan
from jaxlwp.simulate._engine import Event, last_chain, one_by_one, run
from jaxlwp.simulate._links import ADAPTER, COMPUTE, LINKS, Links
from jaxlwp.simulate._tasks import StepTasks
from jaxlwp.space import BASELINES, Strategy

CONTENTION = "contention"
"""Cause of the seconds that a collective takes longer because others use the same link, or because
the devices of a host share an adapter."""

WAITING = "waiting"
"""Thread of a trace: when the stream of kernels waits."""

SUMS = ("behind", "ready")

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ResourceUse:
    """What a resource has done.

    Attributes:
      name: "compute" (the stream of kernels), "links" (of a device, inside its host) or "adapter"
        (between hosts; devices of a host may share one).
      busy_s: seconds in which it was in use; of a collective the start counts.
      exposed_s: those of them in which no kernel ran; 0 for the stream of kernels.
      contended_s: seconds that collectives took longer for each other, or for other devices that
        share the adapter.
    """

    name: str
    busy_s: float
    exposed_s: float
    contended_s: float


@dataclass(frozen=True, kw_only=True)
class StepSimulation:
    """When what happens in a training step.

    Attributes:
      strategy: its name.
      num_devices: all run the same program at the same time; one of them is shown.
      num_hosts: likewise.
      overlap: whether communication runs beside work.
      total_s: seconds from the first task to the last.
      plain_s: the plain sum, what `SearchSpace.evaluate` says.
      more_s: what the tasks take more, one after the other, than the plain sum, by reason. Prices
        of GPU systems count on average what is hidden; here all of it runs, and shows if it is.
      resources: what each has done.
      critical_s: by cause, the seconds of the tasks that make the step as long as it is. They add
        up to `total_s`.
      events: every task, forward, backward, gradient sums and updates.
    """

    strategy: str
    num_devices: int
    num_hosts: int
    overlap: bool
    total_s: float
    plain_s: float
    more_s: Mapping[str, float]
    resources: tuple[ResourceUse, ...]
    critical_s: Mapping[str, float]
    events: tuple[Event, ...] = field(repr=False)

    @property
    def serial_s(self) -> float:
        """Seconds of the step if nothing overlaps: the plain sum, and `more_s`."""
        return self.plain_s + sum(self.more_s.values())

    @property
    def compute_s(self) -> float:
        """Seconds in which kernels run."""
        return self.resources[0].busy_s

    @property
    def exposed_s(self) -> float:
        """Seconds in which no kernel runs."""
        return self.total_s - self.compute_s

    def trace(self) -> dict[str, Any]:
        """The timeline in Chrome's trace format, which Perfetto (ui.perfetto.dev) opens.

        A process for a device, with its kernels, what they wait for, and its links; one for a host,
        if it has adapters. Times are in microseconds.
        """
        names = [use.name for use in self.resources]
        hosts = f" in {self.num_hosts} hosts" if self.num_hosts > 1 else ""
        device = f"{self.strategy}: one of {self.num_devices} devices{hosts}"
        processes = {device: [COMPUTE, WAITING, *(n for n in names if n == LINKS)]}
        if ADAPTER in names:
            processes[f"one of {self.num_hosts} hosts"] = [ADAPTER]
        return spans_trace(itertools.chain(map(_span, self.events), self._waits()), processes)

    def save(self, path: str | Path) -> None:
        """Write `trace` as JSON, compressed if the name ends in ".gz"; Perfetto opens both.

        Raises:
          OSError: the file cannot be written.
        """
        write_trace(self.trace(), path)

    def _waits(self) -> Iterable[Span]:
        """When the stream of kernels waits, and for which task's end."""
        kernels = [event for event in self.events if event.task.resource == COMPUTE]
        free_s = 0.0
        for event in sorted(kernels, key=lambda event: event.begin_s):
            if event.begin_s > free_s:
                other = self.events[event.behind].task if event.behind is not None else event.task
                yield Span(WAITING, other.name, other.cause, free_s, event.begin_s, {})
            free_s = event.end_s
        if self.total_s > free_s:
            other = max(self.events, key=lambda event: event.end_s).task
            yield Span(WAITING, other.name, other.cause, free_s, self.total_s, {})


def simulate_step(
    plan: Plan | SearchSpace,
    strategy: Strategy | str | None = None,
    *,
    overlap: bool = True,
    sums: Literal["behind", "ready"] = "behind",
) -> StepSimulation:
    """Simulate a training step of a strategy, event by event.

    The seconds are those of the cost tables. Of a layer's work, forward and backward have the
    shares of its operators' passes (`jaxlwp.cost.forward_share`). A price of communication is
    handed out to its collectives in proportion to what each takes alone. Collectives of one link
    that run at once share its rate; kernels run one at a time, in the order of the program.

    Args:
      plan: a plan, or a priced space, as `jaxlwp.price` returns.
      strategy: a strategy of the space, or the name of a baseline; a plan's own by default.
      overlap: False runs one task after the other.
      sums: when the sum of a bucket of gradients starts, of which one runs at a time. "behind": the
        backward pass is over, the smallest first, which is what XLA's schedule for GPUs does.
        "ready": the last of its gradients is there, as in data-parallel frameworks.

    Raises:
      ValueError: a space without a strategy, a strategy that is not of it or not allowed, a wrong
        `sums`.
    """
    space = plan.space if isinstance(plan, Plan) else plan
    if sums not in SUMS:
        raise ValueError(f"simulate_step: sums is {sums!r}; give one of {', '.join(SUMS)}")
    made = StepTasks(space, _strategy(plan, strategy), wait=sums == "behind")
    tasks = made.tasks if overlap else one_by_one(made.tasks)
    events = run(tasks, made.links.resources())
    return StepSimulation(
        strategy=_strategy(plan, strategy).name,
        num_devices=space.devices.num_devices,
        num_hosts=space.devices.num_devices // made.links.devices_per_host,
        overlap=overlap,
        total_s=max((event.end_s for event in events), default=0.0),
        plain_s=made.plain_s,
        more_s=made.more_s,
        resources=_uses(events, made.links),
        critical_s=_critical(events),
        events=events,
    )


def _strategy(plan: Plan | SearchSpace, strategy: Strategy | str | None) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str):
        return (plan.space if isinstance(plan, Plan) else plan).baseline(strategy)
    if isinstance(plan, Plan):
        return plan.strategy
    raise ValueError(
        "simulate_step: a space has many strategies; give one, or the name of a baseline "
        f"({', '.join(BASELINES)}), as in simulate_step(space, 'data')"
    )


def _critical(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of the chain that makes the step as long as it is, by cause, the longest first."""
    found: dict[str, float] = {}
    for number in last_chain(events):
        event = events[number]
        for cause, seconds in (
            (event.task.cause, event.seconds - event.contended_s),
            (CONTENTION, event.contended_s),
        ):
            if seconds:
                found[cause] = found.get(cause, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _uses(events: Sequence[Event], links: Links) -> tuple[ResourceUse, ...]:
    of_resource: dict[str, list[Event]] = {r.name: [] for r in links.resources()}
    for event in events:
        of_resource[event.task.resource].append(event)
    kernels = _union((event.begin_s, event.end_s) for event in of_resource[COMPUTE])
    uses = []
    for name, used in of_resource.items():
        busy = _union((event.begin_s, event.end_s) for event in used)
        uses.append(
            ResourceUse(
                name=name,
                busy_s=_seconds(busy),
                exposed_s=_seconds(_union([*busy, *kernels])) - _seconds(kernels),
                contended_s=sum(event.contended_s for event in used),
            )
        )
    return tuple(uses)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as intervals that do not meet, ascending."""
    found: list[Interval] = []
    for begin_s, end_s in sorted(intervals):
        if found and begin_s <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end_s)
        else:
            found.append((begin_s, end_s))
    return found


def _seconds(intervals: Iterable[Interval]) -> float:
    return sum(end_s - begin_s for begin_s, end_s in intervals)


def _span(event: Event) -> Span:
    task = event.task
    return Span(
        thread=task.resource,
        name=f"{task.cause}: {task.name}",
        kind=task.cause,
        start_s=event.begin_s,
        end_s=event.end_s,
        arguments={
            "layer": "" if task.layer is None else str(task.layer),
            "bytes": task.num_bytes,
            "alone_us": 1e6 * (task.start_s + task.seconds / task.flows),
            "contended_us": 1e6 * event.contended_s,
            "flows": task.flows if task.flows > 1 else 0,
        },
    )
