"""Discrete events: tasks that depend on one another and need resources, and when each runs.

The engine knows no network and no units but seconds. A resource is *exclusive* (one task at a time,
of those that are ready the one with the lowest number: a stream of kernels) or *shared* (all that
are ready run at once, and each flow gets an equal part of the rate: links). Nothing that could run
is held back, so no schedule is longer than all its work, and equal tasks make equal schedules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something that does work, at a rate of one second of it in a second.

    Attributes:
      name: unique.
      shared: whether what is there at once shares the rate; otherwise one task runs at a time.
    """

    name: str
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work on one resource.

    Attributes:
      name: for people.
      cause: what it is for, as results add it up.
      resource: name of the resource that it needs.
      seconds: of work, which it takes if it has the resource to itself.
      start_s: seconds before the work. They take nothing of a shared resource's rate.
      flows: how many flows of a shared resource it is made of. Two tasks share the rate in
        proportion to them.
      after: numbers of the tasks that end before it begins, each less than its own number.
      layer: index of the layer for which it runs, if it runs for one.
      num_bytes: bytes of a collective's operand on each device.
    """

    name: str
    cause: str
    resource: str
    seconds: float
    start_s: float = 0.0
    flows: int = 1
    after: tuple[int, ...] = ()
    layer: int | None = None
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """A task that has run.

    Attributes:
      task: the task.
      begin_s: seconds since the first task began.
      end_s: the same.
      behind: number of the task at whose end it began: the last that it depends on, or the one that
        had the resource. None if it waited for nothing.
    """

    task: Task
    begin_s: float
    end_s: float
    behind: int | None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s

    @property
    def contended_s(self) -> float:
        """Seconds that it took longer than one of its flows would have with nothing beside it."""
        alone_s = self.task.start_s + self.task.seconds / self.task.flows
        # Times are sums: what is left by rounding is no contention.
        more_s = self.seconds - alone_s
        return more_s if more_s > 1e-12 * self.end_s else 0.0


def run(tasks: Sequence[Task], resources: Sequence[Resource]) -> tuple[Event, ...]:
    """Run tasks as early as dependencies and resources allow.

    Args:
      tasks: known by their position. A lower one goes first where two are ready.
      resources: those that tasks name.

    Returns:
      An event for each task, in the order of the tasks.

    Raises:
      ValueError: a task that names no resource, depends on itself or a later one, or has a time
        that is negative or not finite, or fewer than one flow.
    """
    names = {resource.name for resource in resources}
    for number, task in enumerate(tasks):
        _check(number, task, names)
    state = _Run(tasks, resources)
    while state.step():
        pass
    return tuple(
        Event(task=task, begin_s=begin_s, end_s=end_s, behind=behind)
        for task, begin_s, end_s, behind in zip(
            tasks, state.begins, state.ends, state.behind, strict=True
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


def _check(number: int, task: Task, names: set[str]) -> None:
    place = f"task {number} ({task.name})"
    if task.resource not in names:
        raise ValueError(
            f"{place}: resource {task.resource!r} is none of {', '.join(sorted(names))}; add it"
        )
    if not all(0 <= other < number for other in task.after):
        raise ValueError(
            f"{place}: after is {task.after}; a task depends on earlier ones: sort the tasks"
        )
    if not (0 <= task.seconds < math.inf and 0 <= task.start_s < math.inf):
        raise ValueError(
            f"{place}: seconds {task.seconds} and start_s {task.start_s} must be at least 0 and "
            "finite; correct them"
        )
    if task.flows < 1:
        raise ValueError(f"{place}: flows is {task.flows}; it must be at least 1")


@dataclass
class _Exclusive:
    """One task at a time; `ready` is a heap of numbers, `last` the task that ran last."""

    ready: list[int] = field(default_factory=list)
    busy: bool = False
    last: int | None = None


@dataclass
class _Shared:
    """Fair shares, kept in seconds of work that each flow has had: a task ends at a fixed count.

    Attributes:
      flows: that are there.
      served_s: seconds of work that a flow has had which was there all the time.
      now_s: when that was.
      ends: heap of (`served_s` at which the task ends, its number).
    """

    flows: int = 0
    served_s: float = 0.0
    now_s: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)

    def advance(self, now_s: float) -> None:
        if self.flows:
            self.served_s += (now_s - self.now_s) / self.flows
        self.now_s = now_s

    def join(self, now_s: float, number: int, task: Task) -> None:
        self.advance(now_s)
        if not self.flows:
            self.served_s = 0.0
        heapq.heappush(self.ends, (self.served_s + task.seconds / task.flows, number))
        self.flows += task.flows

    def leave(self, now_s: float, task: Task) -> None:
        self.advance(now_s)
        self.served_s = heapq.heappop(self.ends)[0]
        self.flows -= task.flows

    def next_end_s(self) -> float:
        if not self.ends:
            return math.inf
        return self.now_s + max(self.ends[0][0] - self.served_s, 0.0) * self.flows


class _Run:
    """The state of a run; see `run`."""

    def __init__(self, tasks: Sequence[Task], resources: Sequence[Resource]) -> None:
        self.tasks = tasks
        self.exclusive = {r.name: _Exclusive() for r in resources if not r.shared}
        self.shared = {r.name: _Shared() for r in resources if r.shared}
        self.begins, self.ends = [0.0] * len(tasks), [0.0] * len(tasks)
        self.behind: list[int | None] = [None] * len(tasks)
        self.waits_for = [len(set(task.after)) for task in tasks]
        self.followers: list[list[int]] = [[] for _ in tasks]
        self.timed: list[tuple[float, int]] = []  # exclusive: its end; shared: its work begins
        for number, task in enumerate(tasks):
            for other in set(task.after):
                self.followers[other].append(number)
        for number in [n for n, count in enumerate(self.waits_for) if count == 0]:
            self.make_ready(number, 0.0, None)
        self.start_idle(0.0)

    def step(self) -> bool:
        """Go on to the next time at which something happens; False if nothing does."""
        times = [shared.next_end_s() for shared in self.shared.values()]
        now_s = min([*times, self.timed[0][0] if self.timed else math.inf])
        if now_s == math.inf:
            return False
        for shared, end_s in zip(self.shared.values(), times, strict=True):
            while end_s <= now_s:
                number = shared.ends[0][1]
                shared.leave(now_s, self.tasks[number])
                self.end(number, now_s)
                end_s = shared.next_end_s()
        while self.timed and self.timed[0][0] <= now_s:
            number = heapq.heappop(self.timed)[1]
            task = self.tasks[number]
            if task.resource in self.shared:
                self.shared[task.resource].join(now_s, number, task)
            else:
                self.exclusive[task.resource].busy = False
                self.exclusive[task.resource].last = number
                self.end(number, now_s)
        self.start_idle(now_s)
        return True

    def end(self, number: int, now_s: float) -> None:
        """A task has ended; what waited for it alone is ready."""
        self.ends[number] = now_s
        for follower in self.followers[number]:
            self.waits_for[follower] -= 1
            if self.waits_for[follower] == 0:
                self.make_ready(follower, now_s, number)

    def make_ready(self, number: int, now_s: float, behind: int | None) -> None:
        """Begin a task on a shared resource, or queue it."""
        task = self.tasks[number]
        self.begins[number], self.behind[number] = now_s, behind
        if task.resource in self.shared:
            heapq.heappush(self.timed, (now_s + task.start_s, number))
        else:
            heapq.heappush(self.exclusive[task.resource].ready, number)

    def start_idle(self, now_s: float) -> None:
        """Begin the first task that is ready on every idle exclusive resource."""
        for resource in self.exclusive.values():
            if resource.busy or not resource.ready:
                continue
            number = heapq.heappop(resource.ready)
            task = self.tasks[number]
            if now_s > self.begins[number]:  # it was ready before: the resource was not
                self.begins[number], self.behind[number] = now_s, resource.last
            resource.busy = True
            heapq.heappush(self.timed, (now_s + task.start_s + task.seconds, number))
