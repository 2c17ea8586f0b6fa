"""What a price is made of: the collectives of a change, a layer or its arguments, and their times.

Prices are sums. Each is handed out to its collectives in proportion to what each would take alone,
so that the parts add up to the price, whatever made it: rates, fits, measurements, a `CostModel` of
the user's own. Waits and copies that a price has besides go with the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlwp.devices import DeviceGraph
from jaxlwp.space import Collective

JOINED = ("all-reduce", "all-gather", "reduce-scatter")
"""Kinds that XLA joins. Source: its passes AllReduceCombiner and the like."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A collective that a price is for.

    Attributes:
      collective: the collective.
      counted: of its time, what the price has: less than 1 where it counts on overlap.
      halo: it brings rows of neighbours, so most devices of a host send to one in the same host.
      bucket_bytes: it shares its start with so many bytes; 0 if it starts alone.
    """

    collective: Collective
    counted: float = 1.0
    halo: bool = False
    bucket_bytes: float = 0.0

    def times(self, devices: DeviceGraph) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Seconds beside its bytes, and (link level, seconds) of them, inside first."""
        one = self.collective
        start_s, _ = devices.link_rate(one.kind, one.axes)
        if self.bucket_bytes and one.kind in JOINED:
            start_s *= min(one.num_bytes / self.bucket_bytes, 1.0)
        stages = devices.link_stages(one.kind, one.axes)
        return start_s, tuple((level, byte_s * one.num_bytes) for level, byte_s in stages)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a price, with the time that it takes where nothing runs beside it.

    Attributes:
      collective: which one; None where a price has no collective.
      start_s: seconds beside the bytes.
      stages: (link level, seconds), inside first.
      counted: see `Sent`.
      halo: likewise.
    """

    collective: Collective | None
    start_s: float
    stages: tuple[tuple[int, float], ...] = ()
    counted: float = 1.0
    halo: bool = False

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.start_s + sum(seconds for _, seconds in self.stages)

    @property
    def backward(self) -> bool:
        """Whether it runs in the backward pass."""
        return self.collective is not None and self.collective.backward


def parts(sent: Sequence[Sent], price_s: float, devices: DeviceGraph) -> tuple[Part, ...]:
    """The parts of a price: `counted` times their seconds add up to it.

    Args:
      sent: the collectives that it is for.
      price_s: the price in seconds.
      devices: mesh axes and rates.
    """
    if price_s == 0:
        return ()
    times = [one.times(devices) for one in sent]
    alone_s = [start_s + sum(seconds for _, seconds in stages) for start_s, stages in times]
    counted_s = math.fsum(one.counted * seconds for one, seconds in zip(sent, alone_s, strict=True))
    if counted_s == 0:
        counted = sent[0].counted if sent else 1.0
        return (Part(collective=None, start_s=price_s / counted, counted=counted),)
    scale = price_s / counted_s
    return tuple(
        Part(
            collective=one.collective,
            start_s=scale * start_s,
            stages=tuple((level, scale * seconds) for level, seconds in stages),
            counted=one.counted,
            halo=one.halo,
        )
        for one, (start_s, stages) in zip(sent, times, strict=True)
    )
