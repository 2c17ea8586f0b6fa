"""What a collective takes over one or several link levels, as NCCL carries it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxlwp.space import wire_share


class Crossed(NamedTuple):
    """One link level as a collective crosses it.

    Attributes:
      parts: how many devices, or groups of devices of the level inside, take part.
      start_s: seconds of a small all-reduce over the level.
      bytes_per_s: bytes per second that each device sends over it, all at once.
    """

    parts: int
    start_s: float
    bytes_per_s: float


def staged(kind: str, levels: Sequence[Crossed]) -> tuple[float, float]:
    """Seconds of a collective beside its bytes, and for each byte of a device's operand.

    An all-reduce adds up inside the first level (reduce-scatter), across the next ones on what
    each device holds then, and collects inside again (all-gather). A reduce-scatter and an
    all-gather are its halves. An all-to-all and a permute send straight to where the data belongs,
    over all levels at once: the slowest counts.

    Args:
      kind: as in `Collective`.
      levels: what it crosses, fastest links first; the devices are the product of their parts.

    Returns:
      (start seconds, seconds per byte); (0, 0) where one device is alone.
    """
    levels = [level for level in levels if level.parts > 1]
    if not levels:
        return 0.0, 0.0
    start_s = max(level.start_s for level in levels)
    devices = math.prod(level.parts for level in levels)
    inner, times = 1, []
    for level in levels:
        outer = devices // (inner * level.parts)
        share = {
            "all-reduce": 1 / inner,  # what the levels inside have left to each device
            "reduce-scatter": 1 / inner,
            "all-gather": outer,  # what the levels outside have collected
            "all-to-all": 1 / outer,  # what stays within the outer levels
            "collective-permute": 1.0,
        }[kind]
        sent = 1.0 if kind == "collective-permute" else wire_share(kind, level.parts)
        times.append(share * sent / level.bytes_per_s)
        inner *= level.parts
    return start_s, (max if kind in DIRECT else sum)(times)


DIRECT = ("all-to-all", "collective-permute")
"""Kinds that send over all levels at once."""
