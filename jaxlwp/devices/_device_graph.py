"""The device graph: mesh axes of prime size, grouped by link level, and the rates of the devices.

Rates are plain numbers: measured, of a system by its published figures, or given by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxlwp.devices._links import Crossed, stage_seconds, staged
from jaxlwp.space import Collective


@dataclass(frozen=True, kw_only=True)
class MeshAxis:
    """One axis of the mesh and the links along it.

    Attributes:
      name: as in the JAX Mesh.
      size: devices along it.
      level: link level, 0 is the slowest (between hosts); axes of one level and size are
        interchangeable.
      latency_s: seconds of a small all-reduce over devices of this level; every collective costs
        so much beside its bytes.
      bytes_per_s: bytes per second that each device sends along it, all devices at once.
    """

    name: str
    size: int
    level: int = 0
    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: a size below 1, a negative or NaN latency, a rate that is not positive.
        """
        if self.size < 1:
            raise ValueError(
                f"MeshAxis {self.name!r}: size is {self.size}; give a number of devices of at "
                "least 1"
            )
        check_rate(f"MeshAxis {self.name!r}", "bytes_per_s", self.bytes_per_s)
        if not (0 <= self.latency_s < math.inf):
            raise ValueError(
                f"MeshAxis {self.name!r}: latency_s is {self.latency_s}; it must be a finite "
                "number of seconds of at least 0: give a measured one or 0.0"
            )


@dataclass(frozen=True, kw_only=True)
class LinkFit:
    """Seconds of one kind of collective over axes of certain groups, fitted to a size sweep.

    Attributes:
      kind: as in `Collective`.
      axes_per_group: how many axes of each of `DeviceGraph.axis_groups` it runs over.
      latency_s: seconds beside the bytes.
      byte_s: seconds for each byte of a device's operand.
      residual: median relative distance between the fit and what was measured.
    """

    kind: str
    axes_per_group: tuple[int, ...]
    latency_s: float
    byte_s: float
    residual: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: a time is negative, infinite or NaN.
        """
        for name in ("latency_s", "byte_s", "residual"):
            check_seconds(f"LinkFit of {self.kind}", name, getattr(self, name))


def check_seconds(place: str, name: str, value: float) -> None:
    """Check a duration.

    Raises:
      ValueError: it is negative, infinite or NaN.
    """
    if not (0 <= value < math.inf):
        raise ValueError(f"{place}: {name} is {value}; it must be at least 0 and finite")


def check_rate(place: str, name: str, value: float) -> None:
    """Check a rate.

    Raises:
      ValueError: the rate is not a positive finite number.
    """
    if not (0 < value < math.inf):
        raise ValueError(
            f"{place}: {name} is {value}; a rate must be a positive finite number; measure it "
            "or give one by hand"
        )


@dataclass(frozen=True, kw_only=True)
class DeviceGraph:
    """Devices as the cost model sees them.

    Attributes:
      axes: mesh axes, slowest link level first.
      conv_flops_per_s: floating-point operations per second of one device in convolutions, all
        devices busy at once, of every dtype that is not in `dtype_flops_per_s`.
      dense_flops_per_s: the same in matrix products.
      dtype_flops_per_s: (dtype, operations per second) of convolutions and matrix products with
        operands of this dtype.
      memory_bytes_per_s: bytes per second that one device reads and writes, all busy at once.
      overhead_s: seconds that a kernel takes to start. An operator has one for each pass, forward
        and backward, unless compilers fuse it with its neighbours.
      links: collectives with times of their own, as measured; all others follow from the axes'
        latencies and rates.
      first_touch_byte_s: seconds for each byte of temporary memory that a step takes anew, beside
        reading or writing it: (least bytes of all temporaries, seconds per byte), ascending.
        Operating systems hand out and clear pages; accelerators' allocators keep them.
      update_pass_byte_s: seconds for each byte that the optimizer's update reads or writes.
      wait_s: seconds that devices wait for one another where long work meets a collective.
      wait_work_s: seconds of work behind which they wait half as long.
      step_s: fixed seconds of a step.
      leaf_s: seconds more for each array that a step reads.
      input_byte_s: seconds for each byte of the batch that is put on a device, all busy at once.
      bucket_bytes: collectives of parameters and their gradients, of one kind, dtype and set of
        axes, that the compiler joins up to so many bytes start once; 0 where each starts.
      exposed_share: of the time of synchronisation, what nothing else is done beside.
      adapter_sharers: devices of a host that share an adapter; the rates of links between hosts are
        each one's part of it while all of them send.
      fuses: work is priced kernel by kernel, as XLA for GPUs fuses it; `overhead_s` is the start of
        a kernel.
      device_kind: as JAX names it, for reports.
      source: where the rates come from: "measured", "system NAME" or "given".
    """

    axes: tuple[MeshAxis, ...]
    conv_flops_per_s: float
    dense_flops_per_s: float
    memory_bytes_per_s: float
    dtype_flops_per_s: tuple[tuple[str, float], ...] = ()
    overhead_s: float = 0.0
    links: tuple[LinkFit, ...] = ()
    first_touch_byte_s: tuple[tuple[float, float], ...] = ()
    update_pass_byte_s: float = 0.0
    wait_s: float = 0.0
    wait_work_s: float = 0.0
    step_s: float = 0.0
    leaf_s: float = 0.0
    input_byte_s: float = 0.0
    bucket_bytes: float = 0.0
    exposed_share: float = 1.0
    adapter_sharers: int = 1
    fuses: bool = False
    device_kind: str = "unknown"
    source: str = "given"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: two axes share a name, or a rate is not a positive finite number.
        """
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"DeviceGraph: mesh axis names {names} must differ: rename one")
        for name in ("conv_flops_per_s", "dense_flops_per_s", "memory_bytes_per_s"):
            check_rate("DeviceGraph", name, getattr(self, name))
        for dtype, rate in self.dtype_flops_per_s:
            check_rate("DeviceGraph", f"dtype_flops_per_s of {dtype}", rate)
        for name in (
            "overhead_s",
            "update_pass_byte_s",
            "wait_s",
            "wait_work_s",
            "step_s",
            "leaf_s",
            "input_byte_s",
        ):
            check_seconds("DeviceGraph", name, getattr(self, name))
        if not 0 < self.exposed_share <= 1:
            raise ValueError(
                f"DeviceGraph: exposed_share is {self.exposed_share}; give a share above 0 and at "
                "most 1, where 1 stands for devices that synchronise and do nothing else meanwhile"
            )
        if not (0 <= self.bucket_bytes < math.inf):
            raise ValueError(
                f"DeviceGraph: bucket_bytes is {self.bucket_bytes}; give a finite number of bytes "
                "of at least 0, where 0 stands for collectives that are not joined"
            )
        for _, byte_s in self.first_touch_byte_s:
            check_seconds("DeviceGraph", "first_touch_byte_s", byte_s)
        if self.adapter_sharers < 1:
            raise ValueError(
                f"DeviceGraph: adapter_sharers is {self.adapter_sharers}; give how many devices "
                "share an adapter, 1 where each has its own"
            )

    @property
    def num_devices(self) -> int:
        """Product of the axis sizes."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Mesh axis name -> devices along it."""
        return {axis.name: axis.size for axis in self.axes}

    @property
    def axis_groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of interchangeable axes together, slowest link level first.

        Axes of size 1 are in none: they split nothing.
        """
        groups: dict[tuple[int, int], list[str]] = {}
        for axis in sorted(self.axes, key=lambda a: (a.level, -a.size)):
            if axis.size > 1:
                groups.setdefault((axis.level, axis.size), []).append(axis.name)
        return tuple(tuple(group) for group in groups.values())

    @functools.cached_property
    def _fits(self) -> dict[tuple[str, tuple[int, ...]], LinkFit]:
        return {(fit.kind, fit.axes_per_group): fit for fit in self.links}

    def first_touch_s(self, temporary_bytes: float) -> float:
        """Seconds for each byte of a step's temporaries, of which it takes so many in all."""
        reached = [byte_s for size, byte_s in self.first_touch_byte_s if size <= temporary_bytes]
        return reached[-1] if reached else 0.0

    def wait_after_s(self, work_s: float) -> float:
        """Seconds that devices wait for one another at a collective behind so much work of each."""
        if self.wait_work_s == 0:
            return self.wait_s
        return self.wait_s * work_s / (work_s + self.wait_work_s)

    def collective_s(self, collective: Collective) -> float:
        """Seconds of one collective."""
        latency_s, byte_s = self.link_rate(collective.kind, collective.axes)
        return latency_s + byte_s * collective.num_bytes

    def link_rate(self, kind: str, names: tuple[str, ...]) -> tuple[float, float]:
        """Seconds of a collective beside its bytes, and for each byte of a device's operand.

        As measured; else by the rates of the axes, level by level as NCCL does it (`staged`).
        """
        groups = tuple(sum(name in names for name in group) for group in self.axis_groups)
        if fit := self._fits.get((kind, groups)):
            return fit.latency_s, fit.byte_s
        return staged(kind, [crossed for _, crossed in self._crossed(names)])

    def link_stages(self, kind: str, names: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
        """Where a collective spends the time of its bytes.

        Returns:
          (link level, seconds for each byte of a device's operand), inside first; they add up to
          `link_rate`'s. Of a time that was measured over several levels, parts as the axes' rates
          have it.
        """
        crossed = self._crossed(names)
        seconds = stage_seconds(kind, [level for _, level in crossed])
        scale = self.link_rate(kind, names)[1] / sum(seconds) if seconds else 0.0
        return tuple(
            (level, scale * part) for (level, _), part in zip(crossed, seconds, strict=True)
        )

    def _crossed(self, names: tuple[str, ...]) -> list[tuple[int, Crossed]]:
        """The link levels that a collective over some axes crosses, inside first."""
        axes = [axis for axis in self.axes if axis.name in names and axis.size > 1]
        levels = []
        for level in sorted({axis.level for axis in axes}, reverse=True):
            among = [axis for axis in axes if axis.level == level]
            crossed = Crossed(
                parts=math.prod(axis.size for axis in among),
                start_s=max(axis.latency_s for axis in among),
                bytes_per_s=min(axis.bytes_per_s for axis in among),
            )
            levels.append((level, crossed))
        return levels

    def flops_per_s(self, kind: str, dtype: str) -> float:
        """Operations per second of one device.

        Args:
          kind: "conv" for convolutions, anything else for matrix products.
          dtype: of the operands, as numpy names it.
        """
        rate = self.conv_flops_per_s if kind == "conv" else self.dense_flops_per_s
        return dict(self.dtype_flops_per_s).get(dtype, rate)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceGraph:
        """From what `to_json` wrote.

        Raises:
          ValueError: fields are missing or unknown, or a value is not allowed.
        """
        try:
            fields = {
                "axes": tuple(_from_json(MeshAxis, axis) for axis in data["axes"]),
                "links": tuple(_from_json(LinkFit, link) for link in data.get("links", ())),
                "first_touch_byte_s": tuple(
                    (_of_kind("bytes", "float", size), _of_kind("seconds", "float", byte_s))
                    for size, byte_s in data.get("first_touch_byte_s", ())
                ),
                "dtype_flops_per_s": tuple(
                    (_of_kind("dtype", "str", dtype), _of_kind("rate", "float", rate))
                    for dtype, rate in data.get("dtype_flops_per_s", ())
                ),
            }
            return _from_json(cls, {**data, **fields})
        except KeyError as error:
            problem = f"{error} is missing"
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            problem = str(error)
        raise ValueError(
            f"DeviceGraph.from_json: {problem}; expected the fields that to_json writes"
        )


_KINDS: dict[Any, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "tuple[int, ...]": (list, tuple),
}
"""What a field of a kind may be in a file."""

T = TypeVar("T")


def _from_json(kind: Callable[..., T], data: Mapping[str, Any]) -> T:
    """A dataclass from plain data, whose fields are checked before they are used."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{data!a:.60} given in place of the fields of a {kind.__name__}")
    given = dict(data)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in given and field.type in _KINDS:
            given[field.name] = _of_kind(field.name, field.type, given[field.name])
    return kind(**given)


def _of_kind(name: str, kind: Any, value: Any) -> Any:
    right = isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
    if not right or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise ValueError(f"{name} is {value!a:.60}, no {kind}")
    return tuple(value) if isinstance(value, list) else value


BUCKET_BYTES = 30 * 2**20
"""What XLA for GPUs joins to one collective, at most.

Source: `xla_gpu_all_reduce_combine_threshold_bytes` and the like, xla/debug_options_flags.cc.
"""

EXPOSED_SHARE = 0.6
"""Of gradients' synchronisation, what XLA for GPUs hides behind nothing.

Its schedule puts the sums behind the backward pass, beside the last gradients of dense layers and
the updates. In the programs that JAX 0.10.2 compiles of AlexNet and VGG-16 for 8 H200s, 58 and 61 %
of their time is exposed (`make bench-gpu`).
"""


def prime_factors(n: int) -> tuple[int, ...]:
    """Prime factors of n, largest first; () for 1."""
    factors = []
    divisor = 2
    while n > 1:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return tuple(reversed(factors))


_LEVELS = ("pod", "host", "device")
"""Names of link levels, slowest first."""


def axis_shape(devices_per_level: Sequence[int]) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and levels of the mesh axes for numbers of devices per link level.

    Args:
      devices_per_level: slowest level first: (hosts, devices per host), (devices,) for one level,
        up to (pods, hosts per pod, devices per host).

    Raises:
      ValueError: more levels than have names.

    Returns:
      (name, size, level) of every axis, such as ("host0", 2, 0), ("device0", 2, 1).
    """
    if len(devices_per_level) > len(_LEVELS):
        raise ValueError(
            f"{devices_per_level} are {len(devices_per_level)} link levels, of {_LEVELS}"
        )
    names = _LEVELS[len(_LEVELS) - len(devices_per_level) :]
    return tuple(
        (f"{names[level]}{i}", size, level)
        for level, count in enumerate(devices_per_level)
        for i, size in enumerate(prime_factors(count))
    )
