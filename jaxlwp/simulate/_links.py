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
from jaxlwp.simulate._engine import Load
from jaxlwp.simulate._parts import Part

COMPUTE, COMMUNICATION = "compute", "communication"
"""Streams of a device: of kernels, and of collectives."""

LINKS, ADAPTER = "links", "adapter"
"""Of a device its links, inside the host if there are several; the adapter between hosts."""


class Stage(NamedTuple):
    """A collective on one link.

    Attributes:
      load: what it puts on it.
      saved_s: seconds less than the price, which counts on all devices to send.
    """

    load: Load
    saved_s: float = 0.0

    def half(self) -> Stage:
        """Half of it."""
        return Stage(self.load._replace(seconds=self.load.seconds / 2), self.saved_s / 2)


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
        inside = self.levels[-1:]
        return math.prod(axis.size for axis in self.devices.axes if axis.level in inside)

    @property
    def senders(self) -> int:
        """Devices that send over an adapter where all send."""
        inside = self.devices_per_host if len(self.levels) > 1 else 1
        return min(self.devices.adapter_sharers, inside)

    @property
    def names(self) -> tuple[str, ...]:
        """The links that there are."""
        return (LINKS, ADAPTER)[: len(self.levels)]

    def stages(self, part: Part) -> tuple[Stage, ...]:
        """The stages of a collective, in the order in which NCCL runs them.

        An all-reduce adds up inside first and spreads the sums inside at last; a reduce-scatter is
        its first half, an all-gather its second.
        """
        kind = part.collective.kind if part.collective else ""
        stages = [self._stage(part, level, seconds) for level, seconds in part.stages]
        if kind == "all-reduce" and len(stages) > 1:
            half = [stage.half() for stage in stages[:-1]]
            return (*half, stages[-1], *reversed(half))
        return tuple(reversed(stages) if kind == "all-gather" else stages)

    def _stage(self, part: Part, level: int, seconds: float) -> Stage:
        if level == self.levels[-1]:
            return Stage(Load(LINKS, seconds))
        share = self._halo_share(part.collective.axes) if part.halo and part.collective else 1.0
        flows = max(math.ceil(self.senders * share), 1)
        taken_s = seconds * flows / self.devices.adapter_sharers
        return Stage(Load(ADAPTER, taken_s, flows), seconds - taken_s)

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
