"""A training step, event by event, from its prices alone: nothing is compiled, and no device asked.

The plain sum adds up what a step does. Here the same seconds are put where they belong: on the
stream of kernels of a device, on its links, on the adapter of its host, each behind what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxlwp.check import write_trace
from jaxlwp.cost import SearchSpace, need_program
from jaxlwp.plan import Plan
from jaxlwp.simulate._engine import Event, Span, last_chain, one_by_one, run
from jaxlwp.simulate._links import COMMUNICATION, COMPUTE
from jaxlwp.simulate._tasks import StepTasks
from jaxlwp.simulate._timeline import step_trace
from jaxlwp.space import BASELINES, Strategy

CONTENTION = "contention"
"""Cause of the seconds that a collective takes longer because others use the same link, or because
the devices of a host share an adapter."""

SUMS = ("behind", "ready")


@dataclass(frozen=True, kw_only=True)
class ResourceUse:
    """What a resource has done.

    Attributes:
      name: "compute" or "communication" (kernels and collectives of a device), "links" (of a
        device, inside its host) or "adapter" (between hosts; devices of a host may share one).
      busy_s: seconds in which it was in use. Of collectives the start counts, of links it does not.
      exposed_s: those of them in which no kernel ran; 0 for kernels.
      contended_s: seconds that tasks took longer on it than if each flow had had it to itself.
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
        of GPU systems leave out, on average, what is hidden; here all of it runs, and shows if it
        is. They also count on all devices of a host to send at once, where in an exchange of rows
        few do.
      resources: what each has done, kernels first.
      critical_s: by cause, the seconds of the tasks that make the step as long as it is. They add
        up to `total_s`.
      events: every task: forward, backward, gradient sums and updates.
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

        A process for a device, with its kernels, when they wait and for what, its collectives and
        links; one for a host, if there are adapters. What runs at once on a link is in several
        threads. Times are in microseconds.
        """
        links = [use.name for use in self.resources if use.name not in (COMPUTE, COMMUNICATION)]
        device = f"{self.strategy}: one of {self.num_devices} devices"
        return step_trace(self.events, links, device, f"one of {self.num_hosts} hosts")

    def save(self, path: str | Path) -> None:
        """Write `trace` as JSON, compressed if the name ends in ".gz"; Perfetto opens both.

        Raises:
          OSError: the file cannot be written.
        """
        write_trace(self.trace(), path)

    def __str__(self) -> str:
        """A row per resource, and one per cause of the step's length."""
        from jaxlwp.report import simulation_text

        return simulation_text(self)


def simulate_step(
    plan: Plan | SearchSpace,
    strategy: Strategy | str | None = None,
    *,
    overlap: bool = True,
    sums: Literal["behind", "ready"] = "behind",
    concurrent: bool = False,
) -> StepSimulation:
    """Simulate a training step of a strategy, event by event.

    The seconds are those of the cost tables. Of a layer's work, forward pass, cotangents and
    gradients of parameters have the shares of its operators' passes (`jaxlwp.cost.pass_shares`);
    the layers before wait for the cotangents alone. A price of communication is
    handed out to its collectives in proportion to what each takes alone. Kernels run one at a time,
    in the order of the program, and so do collectives.

    Args:
      plan: a plan, or a priced space, as `jaxlwp.price` returns.
      strategy: a strategy of the space, or the name of a baseline; a plan's own by default.
      overlap: False runs one task after the other.
      sums: when the sum of a bucket of gradients starts, of which one runs at a time. "behind": the
        backward pass is over, the smallest first, which is what XLA's schedule for GPUs does.
        "ready": the last of its gradients is there, as in data-parallel frameworks.
      concurrent: collectives run at once, as soon as what they need is there, and share the rates
        of links fairly. XLA for GPUs has one in flight at a time.

    Raises:
      ValueError: a space without a strategy, a strategy that is not of it or not allowed, a wrong
        `sums`, a saved problem.
    """
    space = plan.space if isinstance(plan, Plan) else need_program("simulate_step", plan)
    if sums not in SUMS:
        raise ValueError(f"simulate_step: sums is {sums!r}; give one of {', '.join(SUMS)}")
    chosen = _strategy(plan, strategy)
    made = StepTasks(space, chosen, wait=sums == "behind", concurrent=concurrent)
    events = run(made.tasks if overlap else one_by_one(made.tasks))
    return StepSimulation(
        strategy=chosen.name,
        num_devices=space.devices.num_devices,
        num_hosts=space.devices.num_devices // made.links.devices_per_host,
        overlap=overlap,
        total_s=max((event.end_s for event in events), default=0.0),
        plain_s=made.plain_s,
        more_s=made.more_s,
        resources=_uses(events, made.links.names),
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


def _uses(events: Sequence[Event], links: Sequence[str]) -> tuple[ResourceUse, ...]:
    """What kernels, collectives and links have done."""
    kernels = [event for event in events if event.task.stream == COMPUTE]
    others = [event for event in events if event.task.stream != COMPUTE]
    work = _union(Span(event.begin_s, event.end_s) for event in kernels)
    sent = _union(Span(event.begin_s, event.end_s) for event in others)
    uses = [_use(COMPUTE, work, work, 0.0)]
    contended_s = sum(event.contended_s for event in others)
    uses.append(_use(COMMUNICATION, sent, work, contended_s))
    for link in links:
        loads = [
            (load, span)
            for event in others
            for load, span in zip(event.task.loads, event.spans, strict=True)
            if load.link == link
        ]
        alone_s = sum(load.seconds / load.flows for load, _ in loads)
        taken_s = sum(span.end_s - span.begin_s for _, span in loads)
        more_s = taken_s - alone_s
        busy = _union(span for _, span in loads)
        uses.append(_use(link, busy, work, more_s if more_s > 1e-9 * taken_s else 0.0))
    return tuple(uses)


def _use(name: str, busy: Sequence[Span], work: Sequence[Span], contended_s: float) -> ResourceUse:
    busy_s = _seconds(busy)
    exposed_s = _seconds(_union([*busy, *work])) - _seconds(work)
    return ResourceUse(
        name=name,
        busy_s=busy_s,
        exposed_s=min(max(exposed_s, 0.0), busy_s),  # rounding
        contended_s=contended_s,
    )


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not meet, ascending."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.begin_s <= found[-1].end_s:
            found[-1] = Span(found[-1].begin_s, max(found[-1].end_s, span.end_s))
        else:
            found.append(span)
    return found


def _seconds(spans: Iterable[Span]) -> float:
    return sum(span.end_s - span.begin_s for span in spans)
