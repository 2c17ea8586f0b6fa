"""GPU models and systems of them: published figures, from files in `systems/` or of the user's own.

A system has two link levels: `inside` a host and `across` hosts.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh

from jaxlwp.devices._device_graph import DeviceGraph
from jaxlwp.devices._links import Crossed, staged


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU model: peaks as published, the shares of them that kernels reach, start of a kernel.

    Attributes:
      name: as in "h200".
      peak_flops_per_s: dtype -> operations per second, dense; a multiply-add is two. "float32" is
        without tensor cores; "tensorfloat32", "float16" and "bfloat16" are there where the GPU
        has units for them.
      peak_memory_bytes_per_s: bytes per second that are read and written.
      memory_bytes: of device memory.
      tensor_share: of a tensor cores' peak that convolutions and matrix products reach.
      vector_share: the same without tensor cores.
      memory_share: of the memory's peak.
      winograd: how many times faster 3x3 convolutions of stride 1 run in float32 than by counting
        their operations: cuDNN needs fewer by Winograd's method.
      kernel_s: seconds that a kernel takes to start.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]
    peak_memory_bytes_per_s: float
    memory_bytes: float
    tensor_share: float
    vector_share: float
    memory_share: float
    winograd: float
    kernel_s: float

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second that kernels reach."""
        return self.peak_memory_bytes_per_s * self.memory_share

    def flops_per_s(self, dtype: str) -> float:
        """Operations per second that convolutions and products of a dtype reach.

        Args:
          dtype: of the operands, as numpy names it; or "tensorfloat32".
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Level:
    """One link level of a system.

    Attributes:
      devices: GPUs of a host, or hosts.
      bytes_per_s: bytes per second that each GPU sends in a collective, all at once; by how many
        of the level's devices take part where that matters (a mesh of links; not a switch).
      start_s: seconds of a small all-reduce over the level.
    """

    devices: int
    bytes_per_s: Mapping[int, float] | float
    start_s: float

    def rate(self, parts: int) -> float:
        """Bytes per second of each GPU where so many of the level's devices take part.

        A number between those given has the rate of the next smaller one.
        """
        if not isinstance(self.bytes_per_s, Mapping):
            return self.bytes_per_s
        given = [count for count in self.bytes_per_s if count <= parts]
        return self.bytes_per_s[max(given, default=min(self.bytes_per_s))]


@dataclass(frozen=True, kw_only=True)
class System:
    """Hosts of GPUs, their links, and what a collective among them takes.

    Device d is GPU d % inside.devices of host d // inside.devices.

    Attributes:
      name: as in "dgx-h200".
      gpu: every GPU of it.
      inside: links inside a host.
      across: links between hosts, `bytes_per_s` a GPU's share of the adapters; None for one host.
    """

    name: str
    gpu: Gpu
    inside: Level
    across: Level | None = None

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.inside.devices * (self.across.devices if self.across else 1)

    def collective_s(self, kind: str, num_bytes: float, group: Sequence[int]) -> float:
        """Seconds of one collective among some devices, while all like groups do the same.

        Args:
          kind: as in `Collective`.
          num_bytes: bytes of its operand on each device.
          group: the devices.

        Raises:
          ValueError: devices that the system does not have, or of unknown links.
        """
        start_s, byte_s = staged(kind, self._crossed(group))
        return start_s + byte_s * num_bytes

    def _crossed(self, group: Sequence[int]) -> list[Crossed]:
        """The levels that a group of devices crosses, fastest links first."""
        wrong = [d for d in group if not 0 <= d < self.num_devices]
        if wrong:
            raise ValueError(
                f"group: device {wrong[0]} is not one of the {self.num_devices} of {self.name}"
            )
        hosts = Counter(d // self.inside.devices for d in set(group))
        most = max(hosts.values(), default=1)
        levels = [Crossed(most, self.inside.start_s, self.inside.rate(most))]
        if len(hosts) > 1 and self.across:
            rate = self.across.rate(len(hosts))
            levels.append(Crossed(len(hosts), self.across.start_s, rate))
        return levels

    def device_graph(self, mesh: Mesh) -> DeviceGraph:
        """What the cost model needs, for a mesh of the system's devices.

        Raises:
          ValueError: the mesh has another number of devices.
        """
        raise NotImplementedError


def preset(name: str, *, hosts: int = 1, gpus: int | None = None) -> System:
    """A system by its name, from published figures.

    Args:
      name: of a system ("dgx-h200", "dgx-a100", ...), of a GPU ("h200": in its newest system), or
        the path of a TOML file.
      hosts: how many of it.
      gpus: how many GPUs of each host are used; all by default.

    Raises:
      ValueError: an unknown name, or numbers that the system does not have.
    """
    raise NotImplementedError
