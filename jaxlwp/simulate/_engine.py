"""Discrete events: tasks that depend on one another and need resources, and when each runs.

The engine knows no network and no units but seconds. A *stream* runs one task at a time: of those
that are ready the one with the lowest number. A *link* carries all that is on it at once, and gives
each flow an equal part of its rate (processor sharing). Nothing that could run is held back, so no
schedule is longer than all its work, and equal tasks make equal schedules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Load(NamedTuple):
    """What a task puts on a link.

    Attributes:
      link: name of the link.
      seconds: for which the link carries it if there is nothing else.
      flows: of how many flows it is made. Two loads share a link in proportion to them.
    """

    link: str
    seconds: float
    flows: int = 1


class Span(NamedTuple):
    """A time, in seconds since the first task began."""

    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work: seconds of its own, and then loads on links, one after the other.

    Attributes:
      name: for people.
      cause: what it is for, as results add it up.
      stream: name of the stream that it has to itself from begin to end; "" if it needs none.
      own_s: seconds of its own: of a kernel all, of a collective the start.
      loads: what it puts on links.
      after: numbers of the tasks that end before it begins, each less than its own number.
      layer: index of the layer for which it runs, if it runs for one.
      num_bytes: bytes of a collective's operand on each device.
    """

    name: str
    cause: str
    stream: str = ""
    own_s: float = 0.0
    loads: tuple[Load, ...] = ()
    after: tuple[int, ...] = ()
    layer: int | None = None
    num_bytes: int = 0

    @property
    def seconds(self) -> float:
        """How long it takes with nothing beside it."""
        return self.own_s + sum(load.seconds for load in self.loads)

    @property
    def alone_s(self) -> float:
        """How long it takes if each of its flows has a link to itself."""
        return self.own_s + sum(load.seconds / load.flows for load in self.loads)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A task that has run.

    Attributes:
      task: the task.
      begin_s: seconds since the first task began.
      end_s: the same.
      spans: of each of its loads, when the link carried it.
      behind: number of the task at whose end it began: the last that it depends on, or the one that
        had the stream. None if it waited for nothing.
    """

    task: Task
    begin_s: float
    end_s: float
    spans: tuple[Span, ...]
    behind: int | None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s

    @property
    def contended_s(self) -> float:
        """Seconds that it took longer than if each of its flows had had a link to itself."""
        more_s = self.seconds - self.task.alone_s
        # Times are sums: what is left by rounding is no contention.
        return more_s if more_s > 1e-12 * self.end_s else 0.0


def run(tasks: Sequence[Task]) -> tuple[Event, ...]:
    """Run tasks as early as dependencies, streams and links allow.

    Args:
      tasks: known by their position. A lower one goes first where two are ready for a stream.

    Returns:
      An event for each task, in the order of the tasks.

    Raises:
      ValueError: a task that depends on itself or a later one, has a time that is negative or not
        finite, or fewer than one flow.
    """
    for number, task in enumerate(tasks):
        _check(number, task)
    state = _Run(tasks)
    while state.step():
        pass
    return tuple(
        Event(task=task, begin_s=begin_s, end_s=end_s, spans=tuple(spans), behind=behind)
        for task, begin_s, end_s, spans, behind in zip(
            tasks, state.begins, state.ends, state.spans, state.behind, strict=True
        )
    )


def one_by_one(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks, each behind the one before it: nothing overlaps."""
    return tuple(
        replace(task, after=(number - 1,) if number else ()) for number, task in enumerate(tasks)
    )


def last_chain(events: Sequence[Event]) -> tuple[int, ...]:
    """The events that make the schedule as long as it is, each begun at the end of the one before.

    Their seconds add up to those of the schedule.
    """
    number = max(range(len(events)), key=lambda n: events[n].end_s, default=None)
    chain = []
    while number is not None:
        chain.append(number)
        number = events[number].behind
    return tuple(reversed(chain))


def _check(number: int, task: Task) -> None:
    place = f"task {number} ({task.name})"
    if not all(0 <= other < number for other in task.after):
        raise ValueError(
            f"{place}: after is {task.after}; a task depends on earlier ones: sort the tasks"
        )
    times = task.own_s, *(load.seconds for load in task.loads)
    if not all(0 <= seconds < math.inf for seconds in times):
        raise ValueError(
            f"{place}: its seconds are {', '.join(map(str, times))}; they must be at least 0 and "
            "finite: correct them"
        )
    if any(load.flows < 1 for load in task.loads):
        flows = ", ".join(str(load.flows) for load in task.loads)
        raise ValueError(f"{place}: its flows are {flows}; each must be at least 1")


@dataclass
class _Stream:
    """One task at a time; `ready` is a heap of numbers, `last` the task that ran last."""

    ready: list[int] = field(default_factory=list)
    busy: bool = False
    last: int | None = None


@dataclass
class _Link:
    """Equal parts, kept in seconds of work that a flow has had: a load ends at a fixed count.

    Attributes:
      flows: that are there.
      served_s: seconds of work that a flow has had which was there all the time.
      now_s: when that was.
      ends: heap of (`served_s` at which a load ends, number of its task).
    """

    flows: int = 0
    served_s: float = 0.0
    now_s: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)

    def join(self, now_s: float, number: int, load: Load) -> None:
        """A load begins."""
        self.served_s = self._served_s(now_s) if self.flows else 0.0
        self.now_s = now_s
        heapq.heappush(self.ends, (self.served_s + load.seconds / load.flows, number))
        self.flows += load.flows

    def leave(self, now_s: float, flows: int) -> None:
        """The load that is first to end has ended."""
        self.served_s, self.now_s = heapq.heappop(self.ends)[0], now_s
        self.flows -= flows

    def next_end_s(self) -> float:
        """When the first load ends, if none begins before."""
        if not self.ends:
            return math.inf
        return self.now_s + max(self.ends[0][0] - self.served_s, 0.0) * self.flows

    def _served_s(self, now_s: float) -> float:
        return self.served_s + (now_s - self.now_s) / self.flows


class _Run:
    """The state of a run; see `run`."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.streams = {task.stream: _Stream() for task in tasks if task.stream}
        self.links = {load.link: _Link() for task in tasks for load in task.loads}
        self.begins, self.ends = [0.0] * len(tasks), [0.0] * len(tasks)
        self.spans: list[list[Span]] = [[] for _ in tasks]
        self.behind: list[int | None] = [None] * len(tasks)
        self.waits_for = [len(set(task.after)) for task in tasks]
        self.followers: list[list[int]] = [[] for _ in tasks]
        self.timed: list[tuple[float, int]] = []  # when the own seconds of a task are over
        for number, task in enumerate(tasks):
            for other in set(task.after):
                self.followers[other].append(number)
        for number in [n for n, count in enumerate(self.waits_for) if count == 0]:
            self._ready(number, 0.0, None)
        self._start_idle(0.0)

    def step(self) -> bool:
        """Go on to the next time at which something happens; False if nothing does."""
        now_s = min([link.next_end_s() for link in self.links.values()], default=math.inf)
        now_s = min(now_s, self.timed[0][0] if self.timed else math.inf)
        if now_s == math.inf:
            return False
        for link in self.links.values():
            while link.next_end_s() <= now_s:
                number = link.ends[0][1]
                load = self.tasks[number].loads[len(self.spans[number]) - 1]
                link.leave(now_s, load.flows)
                self.spans[number][-1] = Span(self.spans[number][-1].begin_s, now_s)
                self._go_on(number, now_s)
        while self.timed and self.timed[0][0] <= now_s:
            self._go_on(heapq.heappop(self.timed)[1], now_s)
        self._start_idle(now_s)
        return True

    def _go_on(self, number: int, now_s: float) -> None:
        """Begin the next load of a task, or end it; what waited for it alone is ready."""
        task, spans = self.tasks[number], self.spans[number]
        if len(spans) < len(task.loads):
            load = task.loads[len(spans)]
            spans.append(Span(now_s, now_s))
            self.links[load.link].join(now_s, number, load)
            return
        self.ends[number] = now_s
        if task.stream:
            self.streams[task.stream].busy = False
            self.streams[task.stream].last = number
        for follower in self.followers[number]:
            self.waits_for[follower] -= 1
            if self.waits_for[follower] == 0:
                self._ready(follower, now_s, number)

    def _ready(self, number: int, now_s: float, behind: int | None) -> None:
        """Begin a task, or queue it at its stream."""
        task = self.tasks[number]
        self.begins[number], self.behind[number] = now_s, behind
        if task.stream:
            heapq.heappush(self.streams[task.stream].ready, number)
        else:
            heapq.heappush(self.timed, (now_s + task.own_s, number))

    def _start_idle(self, now_s: float) -> None:
        """Begin the first task that is ready on every idle stream."""
        for stream in self.streams.values():
            if stream.busy or not stream.ready:
                continue
            number = heapq.heappop(stream.ready)
            if now_s > self.begins[number]:  # it was ready before: the stream was not
                self.begins[number], self.behind[number] = now_s, stream.last
            stream.busy = True
            heapq.heappush(self.timed, (now_s + self.tasks[number].own_s, number))
