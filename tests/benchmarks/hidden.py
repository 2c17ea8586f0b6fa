"""A compiled step as frameworks run it that start each gradient's sum as it arises.

XLA's schedule for P100, V100 and A100 waits for every sum where it starts it, and puts gradients
of weights off. MxNet, Horovod and TensorFlow compute a weight's gradient when they can, start its
sum then, and wait for it before the update, as `Overlap` (jaxlwp/optimize) reckons. `hidden` takes
kernels, gradient sums and their buckets from the program as it is, and runs them so:

- Kernels run one after another and wait for no sum: of those that can run, the one of which the
  fewest sums are made, and of these the one next to a sum. So a gradient comes before the layers in
  front of it.
- Sums run one after the other beside the kernels, each when its gradients are there.
- The step ends when kernels and sums have: at the latest, over all sums, of the time at which its
  gradients are there plus all sums from there on.

All collectives of the program must be sums of gradients (or of the loss): in a program whose
GPUs share statistics of batch normalisation, kernels do wait.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

from jaxlwp.check import Forecast
from jaxlwp.check._module import parse


@dataclasses.dataclass(frozen=True)
class Sum:
    """A collective that adds up gradients.

    Attributes:
      name: of the instruction.
      ready_s: when its gradients are there, in seconds of kernels.
      seconds: that it takes.
      num_bytes: of its operands on one device.
    """

    name: str
    ready_s: float
    seconds: float
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A step whose gradient sums run beside its kernels.

    Attributes:
      compute_s: seconds of all kernels.
      sums: of gradients, in the order in which they are ready.
    """

    compute_s: float
    sums: tuple[Sum, ...]

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return max(self.compute_s, last_end_s(self.sums))


def last_end_s(sums: Iterable[Sum]) -> float:
    """When the last of some sums ends, which run one after the other, each when it is ready."""
    end_s = 0.0
    for each in sums:
        end_s = max(end_s, each.ready_s) + each.seconds
    return end_s


def hidden(text: str, found: Forecast) -> Hidden:
    """The step of a program, its gradient sums hidden as well as they can be.

    Args:
      text: of the compiled program.
      found: its forecast.

    Raises:
      ValueError: a kernel or collective is not in the program's entry but in a loop or branch.
    """
    module = parse(text)
    operands = {i.name: i.operands for i in module.instructions(module.entry)}
    if outside := [e.name for e in found.events if e.name not in operands]:
        raise ValueError(f"hidden: {outside[0]} is not in the entry of the program")
    seconds = {e.name: e.seconds for e in found.events if e.stream == "compute"}
    collectives = [e for e in found.events if e.stream == "communication"]
    ends = eager_ends(operands, seconds, [e.name for e in collectives])
    sums = [Sum(e.name, ends[e.name], e.seconds, e.num_bytes) for e in collectives]
    return Hidden(found.compute_s, tuple(sorted(sums, key=lambda each: each.ready_s)))


Graph = Mapping[str, Sequence[str]]
"""Operands of each instruction, in an order in which they can run."""


def eager_ends(
    operands: Graph, seconds: Mapping[str, float], sums: Sequence[str]
) -> dict[str, float]:
    """When each instruction has run if gradients come first and nothing waits for a collective.

    Args:
      operands: of each instruction.
      seconds: of those that are kernels; the others take no time.
      sums: instructions that add up gradients.

    Returns:
      Name -> seconds since the first kernel began. What no sum is made of comes last.
    """
    reach = dict.fromkeys(operands, 0)  # a bit for each sum that an instruction leads to
    steps = dict.fromkeys(operands, len(operands))  # to the nearest sum
    for number, name in enumerate(sums):
        reach[name], steps[name] = 1 << number, 0
    readers: dict[str, list[str]] = {name: [] for name in operands}
    waiting = {}
    for name in reversed(list(operands)):
        inputs = {operand for operand in operands[name] if operand in operands}
        waiting[name] = len(inputs)
        for operand in inputs:
            reach[operand] |= reach[name]
            steps[operand] = min(steps[operand], steps[name] + 1)
            readers[operand].append(name)
    urgency = {
        name: (reach[name].bit_count() or len(sums) + 1, steps[name], position, name)
        for position, name in enumerate(operands)
    }
    ready = [urgency[name] for name, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    now_s, ends = 0.0, {}
    while ready:
        name = heapq.heappop(ready)[-1]
        now_s += seconds.get(name, 0.0)
        ends[name] = now_s
        for reader in readers[name]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, urgency[reader])
    return ends
