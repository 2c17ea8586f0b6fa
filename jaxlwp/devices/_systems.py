"""Systems: GPU models, the links inside a host and between hosts, and what both reach.

`_presets` reads them from files.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxlwp.devices._device_graph import (
    BUCKET_BYTES,
    EXPOSED_SHARE,
    DeviceGraph,
    LinkFit,
    MeshAxis,
    axis_shape,
    check_rate,
    check_seconds,
)
from jaxlwp.devices._links import Crossed, axis_levels, device_kind, host_numbers, staged
from jaxlwp.mesh import AnyMesh, abstract_mesh
from jaxlwp.space import COLLECTIVES

TENSOR_DTYPES = ("bfloat16", "float16", "tensorfloat32")
"""Dtypes that tensor cores compute in."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU model: peaks as published, the shares of them that kernels reach, start of a kernel.

    Attributes:
      name: as in "h200".
      peak_flops_per_s: dtype -> operations per second, dense; a multiply-add is two. "float32" is
        without tensor cores; "tensorfloat32", "float16" and "bfloat16" are there where tensor
        cores compute in them.
      peak_memory_bytes_per_s: bytes per second that are read and written.
      memory_bytes: of device memory.
      tensor_share: of the tensor cores' peak that convolutions and matrix products reach.
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

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: a rate is not positive, a share is not between 0 and 1, a time is negative,
            or there is no rate for float32.
        """
        place = f"Gpu {self.name!r}"
        if "float32" not in self.peak_flops_per_s:
            raise ValueError(
                f"{place}: peak_flops_per_s has {', '.join(self.peak_flops_per_s) or 'nothing'}; "
                "float32 must be there, which stands for every dtype that is not"
            )
        for dtype, rate in self.peak_flops_per_s.items():
            check_rate(place, f"peak_flops_per_s of {dtype}", rate)
        for name in ("peak_memory_bytes_per_s", "memory_bytes", "winograd"):
            check_rate(place, name, getattr(self, name))
        for name in ("tensor_share", "vector_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{place}: {name} is {getattr(self, name)}; give a share above 0 and at most 1"
                )
        check_seconds(place, "kernel_s", self.kernel_s)

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second that kernels reach."""
        return self.peak_memory_bytes_per_s * self.memory_share

    def flops_per_s(self, dtype: str) -> float:
        """Operations per second that convolutions and matrix products of a dtype reach.

        Those of float32 run in TF32 where the GPU has it: XLA allows that by default, for products
        and convolutions alike (`allow_tf32(true)` in xla/stream_executor/numeric_options.h;
        jax-ml/jax issues 12008 and 18934). A dtype without a peak of its own runs as float32.

        Args:
          dtype: of the operands, as numpy names it.
        """
        peaks = self.peak_flops_per_s
        if dtype not in peaks or dtype == "float32":
            dtype = "tensorfloat32" if "tensorfloat32" in peaks else "float32"
        share = self.tensor_share if dtype in TENSOR_DTYPES else self.vector_share
        return peaks[dtype] * share


@dataclass(frozen=True, kw_only=True)
class Level:
    """One link level of a system.

    Attributes:
      devices: GPUs of a host, or hosts.
      bytes_per_s: bytes per second that each GPU sends in a collective, all at once; by how many
        of the level's devices take part where that matters (a mesh of links; not a switch).
      start_s: seconds of a small all-reduce over the level.
      shared_by: GPUs of a host that share an adapter, each with `bytes_per_s` of it while all of
        them send; 1 where each has its own, and for links inside a host.
    """

    devices: int
    bytes_per_s: Mapping[int, float] | float
    start_s: float
    shared_by: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: fewer than one device, a rate that is not positive, a negative time.
        """
        if self.devices < 1:
            raise ValueError(f"Level: devices is {self.devices}; it must be at least 1")
        if self.shared_by < 1:
            raise ValueError(f"Level: shared_by is {self.shared_by}; it must be at least 1")
        check_seconds("Level", "start_s", self.start_s)
        if not isinstance(self.bytes_per_s, Mapping):
            check_rate("Level", "bytes_per_s", self.bytes_per_s)
            return
        if not self.bytes_per_s:
            raise ValueError("Level: bytes_per_s has no rates; give one for a number of devices")
        for count, rate in self.bytes_per_s.items():
            check_rate("Level", f"bytes_per_s of {count} devices", rate)

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

    def __str__(self) -> str:
        """Such as "4 x dgx-h100 with 8 x h100 each"."""
        hosts = f"{self.num_hosts} x {self.name} with " if self.across else f"{self.name} with "
        each = " each" if self.across else ""
        return f"{hosts}{self.inside.devices} x {self.gpu.name}{each}"

    @property
    def num_hosts(self) -> int:
        """Hosts in all."""
        return self.across.devices if self.across else 1

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.inside.devices * self.num_hosts

    @property
    def mesh(self) -> AbstractMesh:
        """Axes of prime size, hosts first, as `make_mesh` has them where the devices are there."""
        levels = (self.num_hosts, self.inside.devices) if self.across else (self.inside.devices,)
        sizes = {name: size for name, size, _ in axis_shape(levels)}
        return abstract_mesh(sizes or {"device0": 1})

    def collective_s(self, kind: str, num_bytes: float, group: Sequence[int]) -> float:
        """Seconds of one collective among some devices, while all like groups do the same.

        Args:
          kind: as in `Collective`.
          num_bytes: bytes of its operand on each device.
          group: the devices; hosts with fewer of them than others count as if they had as many.

        Raises:
          ValueError: the system does not have one of the devices.
        """
        start_s, byte_s = staged(kind, self._crossed(kind, group))
        return start_s + byte_s * num_bytes

    def _crossed(self, kind: str, group: Sequence[int]) -> list[Crossed]:
        """The levels that a collective of a group of devices crosses, inside first."""
        wrong = [d for d in group if not 0 <= d < self.num_devices]
        if wrong:
            raise ValueError(
                f"group: device {wrong[0]} is none of {self.name}, which has {self.num_devices}; "
                "count from 0"
            )
        hosts = Counter(d // self.inside.devices for d in set(group))
        most = max(hosts.values(), default=1)
        levels = [(most, self.inside)]
        if self.across and len(hosts) > 1:
            levels.append((len(hosts), self.across))
        # However many take part in a permute, each device sends to one other.
        pairs = kind == "collective-permute"
        return [
            Crossed(parts, level.start_s, level.rate(2 if pairs else parts))
            for parts, level in levels
        ]

    def device_graph(self, mesh: AnyMesh | None = None) -> DeviceGraph:
        """What the cost model needs, for a mesh of the system's devices; its own by default.

        A mesh of several hosts must have those of the system. One that names no hosts, such as one
        of simulated devices, has the system's: its devices are counted in the order of the mesh.

        Raises:
          ValueError: the mesh has another number of devices, or its hosts others than the system.
        """
        mesh = self.mesh if mesh is None else mesh
        hosts = self._hosts(mesh)
        levels = axis_levels(mesh.axis_names, hosts)
        one = [self._along("all-reduce", mesh, hosts, (axis,)) for axis in mesh.axis_names]
        graph = DeviceGraph(
            axes=tuple(
                MeshAxis(
                    name=str(axis),
                    size=mesh.shape[axis],
                    level=levels[axis],
                    latency_s=max((level.start_s for level in crossed), default=0.0),
                    bytes_per_s=min(level.bytes_per_s for level in crossed),
                )
                for axis, crossed in zip(mesh.axis_names, one, strict=True)
            ),
            conv_flops_per_s=self.gpu.flops_per_s("float32"),
            dense_flops_per_s=self.gpu.flops_per_s("float32"),
            memory_bytes_per_s=self.gpu.memory_bytes_per_s,
            dtype_flops_per_s=tuple(
                (dtype, self.gpu.flops_per_s(dtype)) for dtype in sorted(self.gpu.peak_flops_per_s)
            ),
            overhead_s=self.gpu.kernel_s,
            update_pass_byte_s=1 / self.gpu.memory_bytes_per_s,
            bucket_bytes=BUCKET_BYTES,
            exposed_share=EXPOSED_SHARE,
            adapter_sharers=self.across.shared_by if self.across else 1,
            fuses=True,
            device_kind=device_kind(mesh) if isinstance(mesh, Mesh) else self.gpu.name,
            source=f"system {self.name}",
        )
        return replace(graph, links=self._links(mesh, hosts, graph))

    def _hosts(self, mesh: AnyMesh) -> np.ndarray:
        """The host of each device of a mesh: the mesh's own, or the system's in its order."""
        hosts = host_numbers(mesh)
        found, counts = np.unique(hosts, return_counts=True)
        own = len(found) == 1 or (len(found) == self.num_hosts and len(set(counts)) == 1)
        if mesh.size != self.num_devices or not own:
            raise ValueError(
                f"rates: {self.name} has {self.num_hosts} x {self.inside.devices} devices, the "
                f"mesh {' + '.join(map(str, counts))}; give the system with the mesh's hosts, or "
                "its name, which takes them from the mesh"
            )
        if len(found) > 1:
            return hosts
        return (np.arange(mesh.size) // self.inside.devices).reshape(hosts.shape)

    def _along(
        self, kind: str, mesh: AnyMesh, hosts: np.ndarray, axes: Sequence[object]
    ) -> list[Crossed]:
        """The levels that a collective over some axes of a mesh crosses, inside first."""
        place = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
        found, counts = np.unique(hosts[place], return_counts=True)
        # Any devices of as many hosts do, as many of each.
        firsts = range(0, len(found) * self.inside.devices, self.inside.devices)
        group = [first + n for first in firsts for n in range(int(counts.max()))]
        return self._crossed(kind, group)

    def _links(self, mesh: AnyMesh, hosts: np.ndarray, graph: DeviceGraph) -> tuple[LinkFit, ...]:
        """The collectives that are not what the rates of the axes say.

        Groups of some sizes have rates of their own in a mesh of links, and an axis may lead
        through a host and on to the next.
        """
        fits = []
        groups = graph.axis_groups
        names = {str(name): name for name in mesh.axis_names}
        for counts in itertools.product(*(range(len(group) + 1) for group in groups)):
            axes = tuple(n for group, c in zip(groups, counts, strict=True) for n in group[:c])
            for kind in COLLECTIVES if axes else ():
                crossed = self._along(kind, mesh, hosts, [names[axis] for axis in axes])
                times = staged(kind, crossed)
                if not all(map(math.isclose, times, graph.link_rate(kind, axes))):
                    start_s, byte_s = times
                    fit = LinkFit(
                        kind=kind, axes_per_group=counts, latency_s=start_s, byte_s=byte_s
                    )
                    fits.append(fit)
        return tuple(fits)
