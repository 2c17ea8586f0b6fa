"""Link levels: which ones the axes of a mesh cross, and what a collective over several takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlwp.mesh import AnyMesh
from jaxlwp.space import wire_share


class Crossed(NamedTuple):
    """One link level as a collective crosses it.

    Attributes:
      parts: how many devices, or groups of devices of the level inside, take part.
      start_s: seconds of a small all-reduce over the level's devices.
      bytes_per_s: bytes per second that each device sends over it, all at once.
    """

    parts: int
    start_s: float
    bytes_per_s: float


def staged(kind: str, levels: Sequence[Crossed]) -> tuple[float, float]:
    """Seconds of a collective beside its bytes, and for each byte of a device's operand.

    The stages are those of NCCL. An all-reduce adds up inside the first level (reduce-scatter),
    goes across the next ones with what each device holds then, and collects inside again
    (all-gather). A reduce-scatter and an all-gather are its halves. An all-to-all sends over each
    level what is meant for its devices. A permute sends a block from device to device, some inside
    and some across, and the slowest counts. Where all levels are equally fast, all of this is what
    one ring takes. A collective is one kernel: it starts once, as at its slowest level.

    Source for two hosts: NVIDIA/nccl issue 812, each adapter sends its GPU's share once.

    Args:
      kind: as in `Collective`.
      levels: what it crosses, inside first; the devices are the product of their parts.

    Returns:
      (start seconds, seconds per byte); (0, 0) where one device is alone.
    """
    levels = [level for level in levels if level.parts > 1]
    if not levels:
        return 0.0, 0.0
    byte_s = 0.0
    for seconds in stage_seconds(kind, levels):
        byte_s += seconds
    return max(level.start_s for level in levels), byte_s


def stage_seconds(kind: str, levels: Sequence[Crossed]) -> list[float]:
    """Seconds for each byte of a device's operand that a collective is on each level; see `staged`.

    Args:
      kind: as in `Collective`.
      levels: what it crosses, inside first, each with several parts.
    """
    if kind == "collective-permute":
        slowest = min(range(len(levels)), key=lambda n: levels[n].bytes_per_s, default=0)
        return [1 / level.bytes_per_s * (n == slowest) for n, level in enumerate(levels)]
    seconds, inner, devices = [], 1, math.prod(level.parts for level in levels)
    for level in levels:
        outer = devices // (inner * level.parts)
        share = {
            "all-reduce": 1 / inner,  # what the levels inside have left to each device
            "reduce-scatter": 1 / inner,
            "all-gather": outer,  # what the levels outside have brought to it before
            "all-to-all": 1 / outer,  # what is meant for devices of this level
        }[kind]
        seconds.append(share * wire_share(kind, level.parts) / level.bytes_per_s)
        inner *= level.parts
    return seconds


def host_numbers(mesh: AnyMesh) -> np.ndarray:
    """The host of each device of a mesh, shape of the mesh; all 0 where it has axes alone."""
    if not isinstance(mesh, Mesh):
        return np.zeros(mesh.axis_sizes, np.int64)
    hosts = np.vectorize(lambda d: getattr(d, "process_index", 0), otypes=[np.int64])
    return np.asarray(hosts(mesh.devices))


def device_kind(mesh: AnyMesh) -> str:
    """What JAX calls the mesh's devices; "unknown" where it has axes alone."""
    return str(mesh.devices.flat[0].device_kind) if isinstance(mesh, Mesh) else "unknown"


def axis_levels(names: Sequence[Any], hosts: np.ndarray) -> dict[Any, int]:
    """Link level of each mesh axis: 0 where moving along it changes the host, else 1.

    Args:
      names: of the axes.
      hosts: the host of each device, shape of the mesh. If there is one only, all levels are 0.
    """
    if len(np.unique(hosts)) == 1:
        return dict.fromkeys(names, 0)
    return {name: int(np.all(hosts == np.take(hosts, [0], axis=i))) for i, name in enumerate(names)}
