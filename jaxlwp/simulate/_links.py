"""Which links a collective keeps busy, for how long, and how many devices send over one at once.

All devices run the same program, so one stands for all. What they share is the adapters of a host:
prices give each device its part of one, as if all of them always sent. Here an adapter has its
whole rate, and a collective crosses it in as many flows as there are devices that send.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxlwp.devices import DeviceGraph
from jaxlwp.simulate._engine import Resource
from jaxlwp.simulate._parts import Part

COMPUTE, LINKS, ADAPTER = "compute", "links", "adapter"
"""The stream of kernels of a device; its links, inside the host if there are several; the adapter
between hosts that it uses."""


class Stage(NamedTuple):
    """A collective on one resource: seconds of it, if nothing else is there, and its flows."""

    resource: str
    seconds: float
    flows: int


@dataclass(frozen=True)
class Links:
    """The links of a device graph.

    Attributes:
      devices: mesh axes and rates.
    """

    devices: DeviceGraph

    @property
    def levels(self) -> tuple[int, ...]:
        """Link levels that have several devices, slowest first."""
        return tuple(sorted({axis.level for axis in self.devices.axes if axis.size > 1}))

    @property
    def devices_per_host(self) -> int:
        """How many devices the innermost links join."""
        inside = [axis.size for axis in self.devices.axes if axis.level == self.levels[-1:][0]]
        return math.prod(inside)

    @property
    def senders(self) -> int:
        """Devices that send over an adapter where all send."""
        inside = self.devices_per_host if len(self.levels) > 1 else 1
        return min(self.devices.adapter_sharers, inside)

    def resources(self) -> tuple[Resource, ...]:
        """What a device has, its adapter last if there is one."""
        names = (LINKS, ADAPTER)[: len(self.levels)]
        return (Resource(name=COMPUTE), *(Resource(name=name, shared=True) for name in names))

    def stages(self, part: Part) -> tuple[Stage, ...]:
        """The stages of a collective, in the order in which NCCL runs them.

        An all-reduce adds up inside first and spreads the sums inside at last; a reduce-scatter is
        its first half, an all-gather its second.
        """
        kind = part.collective.kind if part.collective else ""
        stages = [self._stage(part, level, seconds) for level, seconds in part.stages]
        if kind == "all-reduce" and len(stages) > 1:
            half = [stage._replace(seconds=stage.seconds / 2) for stage in stages[:-1]]
            return (*half, stages[-1], *reversed(half))
        return tuple(reversed(stages) if kind == "all-gather" else stages)

    def _stage(self, part: Part, level: int, seconds: float) -> Stage:
        if level == self.levels[-1]:
            return Stage(LINKS, seconds, 1)
        share = self._halo_share(part.collective.axes) if part.halo and part.collective else 1.0
        flows = max(math.ceil(self.senders * share), 1)
        return Stage(ADAPTER, seconds * flows / self.devices.adapter_sharers, flows)

    def _halo_share(self, axes: tuple[str, ...]) -> float:
        """Of a host's devices along an exchange of rows, those that send to another host."""
        known: Mapping[str, tuple[int, int]] = {
            axis.name: (axis.size, axis.level) for axis in self.devices.axes
        }
        places = list(itertools.product(*(range(known[axis][0]) for axis in axes)))
        inside = [known[axis][1] == self.levels[-1] for axis in axes]
        hosts = [
            tuple(n for n, within in zip(place, inside, strict=True) if not within)
            for place in places
        ]
        crossing = Counter(a for a, b in itertools.pairwise(hosts) if a != b)
        return max((crossing[host] / count for host, count in Counter(hosts).items()), default=1.0)
