"""The paper's cost model: work, bytes over bandwidth, and parameter servers; nothing else.

Jia et al. (ICML 2018), section 5: a step is the plain sum of t_C, the work of every layer, t_X, the
bytes that tensors move over the bandwidth of the links, and t_S, the synchronisation of every
layer's parameters by a server. No latencies, waits, or optimizer updates. It is also an example of
a `CostModel` of one's own: all that it needs is in the face of `jaxlwp.cost`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxlwp.cost._collectives import layer_collectives
from jaxlwp.cost._fetched import fetched_bytes
from jaxlwp.cost._model import AnalyticCostModel, LayerCosts
from jaxlwp.devices import DeviceGraph, LinkFit
from jaxlwp.graph import ComputationGraph, Layer, Use
from jaxlwp.solver import FloatArray
from jaxlwp.space import (
    COLLECTIVES,
    Collective,
    Config,
    degree,
    layout_axes,
    local_shape,
    wire_share,
)

SERVERS = ("device", "host", "replicas")
"""Where a layer's parameter server is; see `PaperCostModel`."""

TRANSFERS = ("parallel", "total")
"""How bytes that move become seconds; see `PaperCostModel`."""


@dataclass(frozen=True, kw_only=True)
class PaperCostModel:
    """Work, bytes over bandwidth, and a parameter server for every layer.

    Every device fetches each part of a tensor from a device that has it, once for itself. What the
    paper writes of the seconds, "the size of the data to be moved and the known communication
    bandwidth", can be read in two ways; `transfers` says which.

    The paper does not split input channels: leave that out of the space with
    `Constraints(forbid=("reduction",))`.

    Attributes:
      devices: mesh axes, with the rates of devices and links. Of what else it has nothing counts.
      servers: where a layer's server is. All that hold its parameters (of a part of them, if they
        are split) send it their gradients, and then it sends them the new values.
        "device": one of these devices, over its own links. "host": the same, but what the devices
        of a host send to another one takes as long as if one of them did: either links between
        hosts have the rate of a device's share of the adapter, and the shares of all are the
        server's meanwhile, or they have the adapter's rate, and hosts add gradients up first.
        "replicas": each of these devices is the server of an equal part.
      transfers: how bytes that move become seconds. "parallel": all devices fetch at the same time;
        of what a device fetches, that from other hosts goes over its share of the adapters, the
        rest over the links inside; the slowest counts, and a layer with fewer parts than there are
        devices runs on all of them, as in programs of jaxlwp. "total": the bytes of all devices
        together over the bandwidth of one link of their level; a layer runs on as many devices as
        it has parts, and only these fetch.
    """

    devices: DeviceGraph
    servers: str = "device"
    transfers: str = "parallel"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: an unknown place of the servers, or way of transfers.
        """
        for name, known in (("servers", SERVERS), ("transfers", TRANSFERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PaperCostModel: {name} is {getattr(self, name)!r}; "
                    f"give one of {', '.join(known)}"
                )

    @functools.cached_property
    def _rates(self) -> AnalyticCostModel:
        """Prices by rates alone."""
        devices = DeviceGraph(
            axes=tuple(replace(axis, latency_s=0.0) for axis in self.devices.axes),
            conv_flops_per_s=self.devices.conv_flops_per_s,
            dense_flops_per_s=self.devices.dense_flops_per_s,
            dtype_flops_per_s=self.devices.dtype_flops_per_s,
            memory_bytes_per_s=self.devices.memory_bytes_per_s,
            links=tuple(_fetching(self.devices)),
        )
        return AnalyticCostModel(devices=devices)

    def step_s(self, graph: ComputationGraph) -> float:
        """See `CostModel`: nothing beside the layers."""
        return 0.0

    def behind(self, work_s: Sequence[float]) -> PaperCostModel:
        """See `CostModel`: nothing depends on how long layers take."""
        return self

    def layer(self, layer: Layer, configs: Sequence[Config]) -> LayerCosts:
        """See `CostModel`: t_C, and t_S; halos and partial sums are part of the paper's t_X."""
        plain = self._rates.layer(layer, configs)
        sizes = self.devices.axis_sizes
        sync_s = [sum(map(self._sync_s, gradient_sums(layer, config, sizes))) for config in configs]
        moves_s = plain.exchange_s
        if self.transfers == "total":
            moves_s = np.array([self._inside_s(layer, config) for config in configs])
        return LayerCosts(plain.compute_s, moves_s, np.array(sync_s), np.zeros(len(configs)))

    def transfer_s(
        self, use: Use, sources: Sequence[Config], targets: Sequence[Config]
    ) -> FloatArray:
        """See `CostModel`: t_X."""
        if self.transfers == "parallel":
            return self._rates.transfer_s(use, sources, targets)
        seconds = np.zeros((len(sources), len(targets)))
        if use.argument:  # parameters lie where they are used, and batches where they are wanted
            return seconds
        for level, num_bytes in fetched_bytes(use, sources, targets, self.devices).items():
            seconds += num_bytes / _link_bytes_per_s(self.devices, level)
        return (1 + use.gradient) * seconds

    def _inside_s(self, layer: Layer, config: Config) -> float:
        """Seconds of a layer's halos and partial sums: those of all its devices together."""
        sizes = self.devices.axis_sizes
        seconds = 0.0
        for each in layer_collectives(layer, config, sizes):
            sent = wire_share(each.kind, degree(each.axes, sizes)) * each.num_bytes
            levels = list(_levels(self.devices, each.axes))
            others = sum(beyond for _, beyond, _ in levels)
            seconds += sum(sent * beyond / others / b for _, beyond, b in levels)
        return degree(tuple(config.used_axes), sizes) * seconds

    def _sync_s(self, collective: Collective) -> float:
        """Seconds of synchronising a parameter: gradients to servers, and values back."""
        if self.servers == "replicas":
            return self._rates.devices.collective_s(collective)
        # What the slowest of the server's links receives, and then sends.
        return max(
            2 * collective.num_bytes * (beyond if self.servers == "device" else beyond / inside) / b
            for inside, beyond, b in _levels(self.devices, collective.axes)
        )


def gradient_sums(layer: Layer, config: Config, axis_sizes: dict[str, int]) -> Iterator[Collective]:
    """The sums of the gradients of a layer's own parameters, where several devices hold a part.

    Parameters lie where they are used, in parts of any size. (The programs of jaxlwp store them in
    even parts, as JAX does, and bring them to where they are used: `argument_collectives`.)
    """
    for use in layer.uses:
        if not (use.argument and use.gradient and use.source == layer.index):
            continue
        layout = config.layout(use.labels)
        working = {axis for name in use.active for axis in config.axes(name)}
        axes = tuple(axis for axis in axis_sizes if axis in working - layout_axes(layout))
        if axes:
            num_bytes = use.moved.itemsize * math.prod(
                local_shape(use.moved.shape, layout, axis_sizes)
            )
            yield Collective(kind="all-reduce", axes=axes, num_bytes=num_bytes, backward=True)


def _link_bytes_per_s(devices: DeviceGraph, level: int) -> float:
    """Bytes per second of a link of a level."""
    return min(axis.bytes_per_s for axis in devices.axes if axis.level == level)


def _levels(devices: DeviceGraph, axes: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """The link levels that axes cross, as one device of the group sees them, inside first.

    Yields:
      Devices of the group inside the level (itself included), devices that it reaches over the
      level and not inside, and bytes per second of a device there.
    """
    among = [axis for axis in devices.axes if axis.name in axes and axis.size > 1]
    inside = 1
    for level in sorted({axis.level for axis in among}, reverse=True):
        here = [axis for axis in among if axis.level == level]
        parts = math.prod(axis.size for axis in here)
        yield inside, inside * (parts - 1), min(axis.bytes_per_s for axis in here)
        inside *= parts


def _fetching(devices: DeviceGraph) -> Iterator[LinkFit]:
    """Collectives in which every device fetches each part for itself, whatever its neighbours do.

    An all-reduce adds up parts (every device the server of one) and hands them out.
    """
    groups = devices.axis_groups
    for counts in itertools.product(*(range(len(group) + 1) for group in groups)):
        axes = [name for group, count in zip(groups, counts, strict=True) for name in group[:count]]
        levels = list(_levels(devices, axes))
        others = sum(beyond for _, beyond, _ in levels)
        for kind in COLLECTIVES if others else ():
            # A permute is with one other device, which may be the farthest.
            shares = [1.0 if kind == "collective-permute" else n / others for _, n, _ in levels]
            slowest_s = max(share / b for share, (_, _, b) in zip(shares, levels, strict=True))
            yield LinkFit(
                kind=kind,
                axes_per_group=counts,
                latency_s=0.0,
                byte_s=wire_share(kind, others + 1) * slowest_s,
            )
