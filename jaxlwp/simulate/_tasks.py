"""The tasks of a training step under a strategy: what runs, on what, and behind what.

Forward, a layer waits for what it reads, exchanges halos, computes, and adds up partial results;
backward, the same in reverse, where the layers before wait for its cotangents and not for its
parameters' gradients. Then these are added up over devices, and parameters updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxlwp.cost import SearchSpace
from jaxlwp.graph import Layer, Use
from jaxlwp.simulate._engine import Load, Task
from jaxlwp.simulate._links import COMMUNICATION, COMPUTE, Links
from jaxlwp.simulate._parts import JOINED, Part
from jaxlwp.simulate._prices import CHANGE, PARTIAL, Inside, Prices
from jaxlwp.space import Strategy

STEP, FORWARD, BACKWARD, UPDATE = "step", "forward", "backward", "update"
ARGUMENT, SUM = "argument", "gradient sum"
"""Causes. "step" is what every step has (dispatch) and what a layer has besides its work (memory
taken anew, input), "argument" what brings parameters and batch to the layers that read them."""

FEW = "few devices of a host send"

Ends = tuple[int, ...]
"""Numbers of tasks: what comes next begins when all have ended."""


class Gradient(NamedTuple):
    """The sum of a gradient over devices: what runs, in what dtype, for which layer, and when."""

    part: Part
    dtype: str
    owner: int
    ready: Ends

    @property
    def num_bytes(self) -> int:
        """Bytes of its operand on each device."""
        return self.part.collective.num_bytes if self.part.collective else 0


class StepTasks:
    """The tasks of a step.

    Attributes:
      tasks: in the order of a program: forward, backward, sums, updates.
      more_s: seconds that the tasks take more, one after the other, than the plain sum, by reason.
      links: what collectives load.
      plain_s: the plain sum.
    """

    def __init__(
        self, space: SearchSpace, strategy: Strategy, *, wait: bool, concurrent: bool
    ) -> None:
        """Make the tasks.

        Args:
          space: the priced space.
          strategy: a strategy of it.
          wait: whether gradient sums wait for the whole backward pass.
          concurrent: whether collectives run at once, or on a stream.

        Raises:
          ValueError: as `Prices`.
        """
        self.links = Links(space.devices)
        self.tasks: list[Task] = []
        self.more_s: dict[str, float] = {}
        self._graph, self._prices, self._wait = space.graph, Prices(space, strategy), wait
        self._stream = "" if concurrent else COMMUNICATION
        self.plain_s = self._prices.plain_s
        self._edges = space.graph.edges
        self._forward_ends: dict[int, Ends] = {}
        self._backward_ends: dict[int, Ends] = {}
        self._returned: dict[int, Ends] = {}  # of a layer: the cotangents of what it has made
        self._gradients: list[Gradient] = []
        arriving: dict[int, list[int]] = {}
        for number, edge in enumerate(self._edges):
            arriving.setdefault(edge.target, []).append(number)
        begin = self._work("step", STEP, space.tables.step_s, (), None)
        for layer in space.graph.layers:
            self._forward(layer, arriving.get(layer.index, ()), begin)
        for layer in reversed(space.graph.layers):
            self._backward(layer, arriving.get(layer.index, ()))
        self._update(list(_buckets(self._gradients, space.devices.bucket_bytes)))

    # --- one layer -------------------------------------------------------------------------------

    def _forward(self, layer: Layer, arriving: Sequence[int], begin: Ends) -> None:
        index, prices = layer.index, self._prices.layers[layer.index]
        ends = begin
        for number in arriving:
            edge, moved = self._edges[number], self._prices.edges[number]
            if edge.use.argument:
                ends += self._move(moved, False, ARGUMENT, begin, index)
            else:
                made = self._forward_ends.get(edge.source, begin)
                ends += self._move(moved, False, CHANGE, made, index)
        for argument in prices.arguments:
            ends += self._move(argument.parts, False, ARGUMENT, begin, index)
        inside = [one for one in prices.inside if not one.part.backward]
        ends = self._exchange(inside, False, ends, index)
        ends = self._work(layer.name, FORWARD, prices.forward_s, ends, index)
        if not _updates(layer):
            ends = self._work(f"{layer.name}: besides", STEP, prices.besides_s, ends, index)
        self._forward_ends[index] = self._exchange(inside, True, ends, index)

    def _backward(self, layer: Layer, arriving: Sequence[int]) -> None:
        index, prices = layer.index, self._prices.layers[layer.index]
        ends = self._forward_ends[index] + self._returned.get(index, ())
        inside = [one for one in prices.inside if one.part.backward]
        ends = self._exchange(inside, True, ends, index)
        worked = self._work(layer.name, BACKWARD, prices.backward_s, ends, index)
        # Nobody but the sums waits for these, so that exchanges run beside them.
        name = f"{layer.name}: gradients"
        gradients = worked + self._work(name, BACKWARD, prices.gradients_s, ends, index)
        for argument in prices.arguments:
            self._summed(argument.use, argument.parts, index, gradients)
        ends = self._exchange(inside, False, worked, index)
        self._backward_ends[index] = ends + gradients
        for number in arriving:
            edge, moved = self._edges[number], self._prices.edges[number]
            if edge.use.argument:
                self._summed(edge.use, moved, edge.source, gradients)
                continue
            back = self._move(moved, True, CHANGE, ends, index)
            if edge.use.gradient:
                self._returned[edge.source] = self._returned.get(edge.source, ()) + back

    def _move(
        self, moved: Sequence[Part], backward: bool, cause: str, after: Ends, layer: int
    ) -> Ends:
        """A change of layout, forward or backward."""
        for part in moved:
            if part.backward == backward:
                after = self._send(part, cause, after, layer)
        return after

    def _exchange(self, inside: Sequence[Inside], sums: bool, after: Ends, layer: int) -> Ends:
        """The partial sums of a layer, or all else that it exchanges."""
        for cause, part in inside:
            if (cause == PARTIAL) == sums:
                after = self._send(part, cause, after, layer)
        return after

    def _summed(self, use: Use, moved: Sequence[Part], owner: int, ready: Ends) -> None:
        dtype = str(use.moved.dtype)
        self._gradients += [Gradient(p, dtype, owner, ready) for p in moved if p.backward]

    # --- gradients and updates -------------------------------------------------------------------

    def _update(self, buckets: list[list[Gradient]]) -> None:
        """Sum gradients, bucket by bucket and one at a time, and update parameters behind them."""
        passed = tuple(end for ends in self._backward_ends.values() for end in ends)
        if self._wait:
            buckets = sorted(buckets, key=lambda bucket: sum(one.num_bytes for one in bucket))
        summed: dict[int, Ends] = {}
        previous: Ends = ()
        for bucket in buckets:
            ready = passed if self._wait else tuple(end for one in bucket for end in one.ready)
            previous = self._send(_joined(bucket), SUM, previous + ready, bucket[0].owner)
            for one in bucket:
                summed[one.owner] = summed.get(one.owner, ()) + previous
        for layer in filter(_updates, reversed(self._graph.layers)):
            after = summed.get(layer.index, ()) + self._backward_ends[layer.index]
            seconds = self._prices.layers[layer.index].besides_s
            self._work(f"{layer.name}: update", UPDATE, seconds, after, layer.index)

    # --- tasks -----------------------------------------------------------------------------------

    def _send(self, part: Part, cause: str, after: Ends, layer: int) -> Ends:
        """A collective."""
        one, stages = part.collective, self.links.stages(part)
        hidden = "gradient sums" if cause in (SUM, ARGUMENT) else "exchanges"
        self._more(f"{hidden} that prices hide", (1 - part.counted) * part.seconds)
        self._more(FEW, -sum(stage.saved_s for stage in stages))
        return self._add(
            f"{self._graph.layers[layer].name}: {one.kind if one else 'transfer'}",
            cause,
            self._stream,
            part.start_s,
            after,
            loads=tuple(stage.load for stage in stages),
            layer=layer,
            num_bytes=one.num_bytes if one else 0,
        )

    def _more(self, reason: str, seconds: float) -> None:
        if seconds:
            self.more_s[reason] = self.more_s.get(reason, 0.0) + seconds

    def _work(self, name: str, cause: str, seconds: float, after: Ends, layer: int | None) -> Ends:
        """Kernels."""
        return self._add(name, cause, COMPUTE, seconds, after, layer=layer)

    def _add(
        self,
        name: str,
        cause: str,
        stream: str,
        own_s: float,
        after: Iterable[int],
        *,
        layer: int | None,
        loads: tuple[Load, ...] = (),
        num_bytes: int = 0,
    ) -> Ends:
        """A task; what takes no time is none."""
        waits = tuple(dict.fromkeys(after))
        if own_s == 0 and not any(load.seconds for load in loads):
            return waits
        task = Task(
            name=name,
            cause=cause,
            stream=stream,
            own_s=own_s,
            loads=loads,
            after=waits,
            layer=layer,
            num_bytes=num_bytes,
        )
        self.tasks.append(task)
        return (len(self.tasks) - 1,)


def _updates(layer: Layer) -> bool:
    """Whether a layer stores parameters that are updated."""
    return any(u.argument and u.gradient and u.source == layer.index for u in layer.uses)


def _buckets(gradients: Iterable[Gradient], most_bytes: float) -> Iterator[list[Gradient]]:
    """The sums that are joined, in the order in which a bucket is full; the rest at the end.

    Args:
      gradients: in the order in which they are ready.
      most_bytes: what a bucket holds; one that is larger is alone. 0 if nothing is joined.
    """
    open_buckets: dict[object, list[Gradient]] = {}
    for one in gradients:
        collective = one.part.collective
        if not most_bytes or collective is None or collective.kind not in JOINED:
            yield [one]
            continue
        key = collective.kind, collective.axes, one.dtype, one.part.counted
        bucket = open_buckets.setdefault(key, [])
        if bucket and sum(other.num_bytes for other in bucket) + one.num_bytes > most_bytes:
            yield bucket
            bucket = open_buckets[key] = []
        bucket.append(one)
    yield from open_buckets.values()


def _joined(bucket: Sequence[Gradient]) -> Part:
    """One collective of all in a bucket; each pays for its share of the start."""
    first = bucket[0].part
    if first.collective is None:
        return first
    stages = [dict(one.part.stages) for one in bucket]
    return replace(
        first,
        collective=replace(first.collective, num_bytes=sum(one.num_bytes for one in bucket)),
        start_s=sum(one.part.start_s for one in bucket),
        stages=tuple((level, sum(each[level] for each in stages)) for level, _ in first.stages),
    )
