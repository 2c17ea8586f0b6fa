"""The device graph: mesh axes of prime size, grouped by link level, and the rates of the devices.

Rates are plain numbers, measured by `calibrate`, taken from a preset, or given by hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlwp._layout import Collective, wire_share


@dataclass(frozen=True, kw_only=True)
class MeshAxis:
    """One axis of the mesh and the links along it.

    Attributes:
      name: as in the JAX Mesh.
      size: devices along it.
      level: link level, 0 is the slowest (between hosts); axes of one level and size are
        interchangeable.
      latency_s: seconds that one step of a collective costs beside the bytes.
      bytes_per_s: bytes per second that each device sends along it.
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
            raise ValueError(f"MeshAxis {self.name!r}: size {self.size} must be at least 1")
        check_rate(f"MeshAxis {self.name!r}", "bytes_per_s", self.bytes_per_s)
        if not (0 <= self.latency_s < math.inf):
            raise ValueError(
                f"MeshAxis {self.name!r}: latency_s is {self.latency_s}; it must be a finite "
                "number of seconds of at least 0: give a measured one or 0.0"
            )


def check_rate(place: str, name: str, value: float) -> None:
    """Check a rate.

    Raises:
      ValueError: the rate is not a positive finite number.
    """
    if not (0 < value < math.inf):
        raise ValueError(
            f"{place}: {name} is {value}; a rate must be a positive finite number: measure it "
            "(calibrate) or give one by hand"
        )


@dataclass(frozen=True, kw_only=True)
class DeviceGraph:
    """Devices as the cost model sees them.

    Attributes:
      axes: mesh axes, slowest link level first.
      conv_flops_per_s: floating-point operations per second of one device in convolutions, all
        devices busy at once.
      dense_flops_per_s: the same in matrix products.
      memory_bytes_per_s: bytes per second that one device reads and writes, all busy at once.
      overhead_s: fixed seconds per operator.
      device_kind: as JAX names it, for reports.
      source: where the rates come from: "measured", "preset NAME" or "given".
    """

    axes: tuple[MeshAxis, ...]
    conv_flops_per_s: float
    dense_flops_per_s: float
    memory_bytes_per_s: float
    overhead_s: float = 0.0
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
        if not (0 <= self.overhead_s < math.inf):
            raise ValueError(
                f"DeviceGraph: overhead_s is {self.overhead_s}; it must be at least 0 and finite"
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
        """Names of interchangeable axes together, slowest link level first."""
        groups: dict[tuple[int, int], list[str]] = {}
        for axis in sorted(self.axes, key=lambda a: (a.level, -a.size)):
            groups.setdefault((axis.level, axis.size), []).append(axis.name)
        return tuple(tuple(group) for group in groups.values())

    def collective_s(self, collective: Collective) -> float:
        """Seconds of one collective."""
        latency_s, byte_s = self.link_rate(collective.kind, collective.axes)
        return latency_s + byte_s * collective.num_bytes

    def link_rate(self, kind: str, names: tuple[str, ...]) -> tuple[float, float]:
        """Seconds of a collective beside its bytes, and for each byte of a device's operand.

        Ring steps times the latency, and bytes over the slowest link.
        """
        axes = [axis for axis in self.axes if axis.name in names]
        parts = math.prod(axis.size for axis in axes)
        steps = {"all-reduce": 2 * (parts - 1), "collective-permute": 1}.get(kind, parts - 1)
        latency_s = steps * max(axis.latency_s for axis in axes)
        return latency_s, wire_share(kind, parts) / min(axis.bytes_per_s for axis in axes)

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
            axes = tuple(MeshAxis(**axis) for axis in data["axes"])
            return cls(**{**data, "axes": axes})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"DeviceGraph.from_json: {error}; expected the fields that to_json writes"
            ) from error


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


def axis_shape(devices_per_level: Sequence[int]) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and levels of the mesh axes for numbers of devices per link level.

    Args:
      devices_per_level: slowest level first: (hosts, devices per host), or (devices,) for one.

    Returns:
      (name, size, level) of every axis, such as ("host0", 2, 0), ("device0", 2, 1).
    """
    names = ("device",) if len(devices_per_level) == 1 else ("host", "device")
    return tuple(
        (f"{names[level]}{i}", size, level)
        for level, count in enumerate(devices_per_level)
        for i, size in enumerate(prime_factors(count))
    )
