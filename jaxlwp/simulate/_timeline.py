"""A simulated step as a trace: who does what when."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxlwp.check import Span, spans_trace
from jaxlwp.simulate._engine import Event
from jaxlwp.simulate._links import ADAPTER, COMMUNICATION, COMPUTE

WAITING = "waiting"
"""The thread of a trace that shows when no kernel runs."""


def step_trace(
    events: Sequence[Event], links: Iterable[str], device: str, host: str
) -> dict[str, Any]:
    """The trace of a step: a process for a device, and one for a host if there are adapters.

    Args:
      events: what has run.
      links: names of the links.
      device: what the device's process is called.
      host: what the host's is called.
    """
    kernels = [event for event in events if event.task.stream == COMPUTE]
    others = [event for event in events if event.task.stream != COMPUTE]
    device_spans = [
        *(_span(COMPUTE, event) for event in kernels),
        *_waits(events, kernels),
        *_lanes(_span(COMMUNICATION, event) for event in others),
    ]
    processes, shown = {device: [COMPUTE, WAITING, COMMUNICATION]}, device_spans
    for name in links:
        loads = list(_lanes(_loads(name, others)))
        shown = shown + loads
        process = host if name == ADAPTER else device
        processes.setdefault(process, []).append(name)
    places = {name: process for process, names in processes.items() for name in names}
    for thread in dict.fromkeys(span.thread for span in shown):
        process = places[thread.partition(" #")[0]]
        if thread not in processes[process]:
            processes[process].append(thread)
    return spans_trace(shown, processes)


def _span(thread: str, event: Event) -> Span:
    task = event.task
    return Span(
        thread=thread,
        name=f"{task.cause}: {task.name}",
        kind=task.cause,
        start_s=event.begin_s,
        end_s=event.end_s,
        arguments={
            "layer": "" if task.layer is None else str(task.layer),
            "bytes": task.num_bytes,
            "contended_us": 1e6 * event.contended_s,
        },
    )


def _loads(link: str, events: Iterable[Event]) -> Iterator[Span]:
    """What is on a link."""
    for event in events:
        for load, span in zip(event.task.loads, event.spans, strict=True):
            if load.link == link and span.end_s > span.begin_s:
                more = {"flows": load.flows if load.flows > 1 else 0}
                whole = _span(link, event)
                yield whole._replace(
                    start_s=span.begin_s, end_s=span.end_s, arguments={**whole.arguments, **more}
                )


def _waits(events: Sequence[Event], kernels: Sequence[Event]) -> Iterator[Span]:
    """When no kernel runs, and the task at whose end the next one begins."""
    free_s = 0.0
    for event in sorted(kernels, key=lambda event: event.begin_s):
        if event.begin_s > free_s and event.behind is not None:
            task = events[event.behind].task
            yield Span(WAITING, f"{task.cause}: {task.name}", task.cause, free_s, event.begin_s, {})
        free_s = event.end_s
    last = max(events, key=lambda event: event.end_s, default=None)
    if last is not None and last.end_s > free_s:
        name = f"{last.task.cause}: {last.task.name}"
        yield Span(WAITING, name, last.task.cause, free_s, last.end_s, {})


def _lanes(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans of one thread in as many threads as run at once: viewers show one span at a time."""
    free: list[int] = []
    ends: list[tuple[float, int]] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        while ends and ends[0][0] <= span.start_s:
            heapq.heappush(free, heapq.heappop(ends)[1])
        lane = heapq.heappop(free) if free else len(ends)
        heapq.heappush(ends, (span.end_s, lane))
        yield span._replace(thread=f"{span.thread} #{lane + 1}") if lane else span
