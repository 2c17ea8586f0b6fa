"""What no strategy of the whole space is priced below, without enumerating the space.

A relaxation, solved exactly. Of a layer's config only its degrees count, with links as fast as the
fastest that so many devices have among them; blocks are fractions, without padding; halos are free;
and of a change of layout only the fractions of the tensor that a device has before and wants after:
what it lacks has to reach it, and partial gradients have to be added up. Configs of equal fractions
become one, so that a layer has hundreds where it had millions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxlwp.cost import (
    AnalyticCostModel,
    Kernel,
    first_of_value,
    passes_of,
    spare_sums,
    start_of_kernel_s,
    work_rate,
)
from jaxlwp.devices import DeviceGraph, MeshAxis
from jaxlwp.graph import ComputationGraph, Edge, Layer, Member, Use
from jaxlwp.ops import RULES
from jaxlwp.solver import FloatArray, solve
from jaxlwp.space import COLLECTIVES, dimension_order, wire_share

_Degrees = Mapping[str, FloatArray]
"""For each dimension, its degree under each of some configs."""


def floor_s(graph: ComputationGraph, model: AnalyticCostModel) -> float:
    """Seconds of a step that no strategy is priced below.

    Args:
      graph: the computation graph.
      model: the model that prices, its devices.
    """
    links = _Links.of(model.devices)
    fine = len(model.devices.axes) <= _FINE_AXES
    ends: list[list[tuple[Edge, bool]]] = [[] for _ in graph.layers]
    for edge in graph.edges:
        ends[edge.source].append((edge, True))
        ends[edge.target].append((edge, False))
    made: dict[str, tuple[FloatArray, FloatArray]] = {}
    nodes: list[FloatArray] = []
    columns: list[FloatArray] = []
    for layer, here in zip(graph.layers, ends, strict=True):
        read = [(edge.use.source_labels if out else edge.use.labels, out) for edge, out in here]
        key = f"{layer.key} {read} {[sorted(edge.use.active) for edge, _ in here]}"
        key += str(model.kernels[layer.index : layer.index + 1])
        if key not in made:
            made[key] = _classes(layer, here, model, links, fine=fine)
        nodes.append(made[key][0])
        columns.append(made[key][1])
    tables = []
    for edge in graph.edges:
        source = ends[edge.source].index((edge, True)) * _COLUMNS
        target = ends[edge.target].index((edge, False)) * _COLUMNS
        tables.append(
            (model.devices.exposed_share if edge.use.argument and edge.use.gradient else 1.0)
            * _moved_s(
                edge.use,
                columns[edge.source][:, source : source + _COLUMNS],
                columns[edge.target][:, target : target + _COLUMNS],
                links,
                joined=bool(model.bucket_bytes),
            )
        )
    pairs = [(edge.source, edge.target) for edge in graph.edges]
    found = solve(nodes, pairs, tables, work_limit=_WORK_LIMIT)
    return found.lower_bound_s + model.step_s(graph)


_FINE_AXES = 9
"""Mesh axes up to which samples are told from the other dimensions in a tensor's split."""

_COLUMNS = 4
"""Of an end of an edge: splits of channels, samples and the rest; devices that share a part."""

_WORK_LIMIT = 5e9
"""For the relaxation, some five seconds: what is proven until then is a bound too."""


@dataclass(frozen=True)
class _Links:
    """The fastest that collectives can be; by kind and how many devices take part."""

    latency_s: dict[tuple[str, int], float]
    byte_s: dict[tuple[str, int], float]
    least_latency_s: float
    least_byte_s: float  # for each byte that a device sends

    @classmethod
    def of(cls, devices: DeviceGraph) -> _Links:
        """The least over all sets of mesh axes, every axis as fast as the fastest of its group."""
        devices = replace(devices, axes=tuple(_fastest(axis, devices) for axis in devices.axes))
        latency_s: dict[tuple[str, int], float] = {}
        byte_s: dict[tuple[str, int], float] = {}
        sent_s = math.inf
        sizes = devices.axis_sizes
        for counts in itertools.product(*(range(len(g) + 1) for g in devices.axis_groups)):
            axes = tuple(
                axis
                for group, count in zip(devices.axis_groups, counts, strict=True)
                for axis in group[:count]
            )
            parts = math.prod(sizes[axis] for axis in axes)
            for kind in COLLECTIVES if axes else ():
                rate = devices.link_rate(kind, axes)
                key = kind, parts
                latency_s[key] = min(rate[0], latency_s.get(key, math.inf))
                byte_s[key] = min(rate[1], byte_s.get(key, math.inf))
                sent_s = min(sent_s, rate[1] / wire_share(kind, parts))
        least_s = min(latency_s.values(), default=0.0)
        return cls(latency_s, byte_s, least_s, sent_s if byte_s else 0.0)

    def seconds(self, kind: str, parts: FloatArray, num_bytes: FloatArray) -> FloatArray:
        """Of collectives over so many devices with such operands; 0 where there is one device."""
        result = np.zeros(len(parts))
        for number in np.unique(parts):
            key = kind, int(number)
            if number > 1:
                rows = parts == number
                latency_s = self.latency_s.get(key, self.least_latency_s)
                byte_s = self.byte_s.get(key, 0.0)
                result[rows] = latency_s + byte_s * num_bytes[rows]
        return result


def _fastest(axis: MeshAxis, devices: DeviceGraph) -> MeshAxis:
    """The axis with the best rates of those that it is interchangeable with."""
    alike = [a for a in devices.axes if (a.level, a.size) == (axis.level, axis.size)]
    return replace(
        axis,
        latency_s=min(a.latency_s for a in alike),
        bytes_per_s=max(a.bytes_per_s for a in alike),
    )


def _degrees(layer: Layer, devices: DeviceGraph) -> _Degrees:
    """Every combination of degrees that a layer can have."""
    sizes = [axis.size for axis in devices.axes]
    products = {1}
    for size in sizes:
        products |= {size * product for product in products}
    names = sorted(layer.dimensions, key=dimension_order)
    found = np.ones((1, 0), dtype=np.int64)
    for name in names:
        most, even = min(layer.dimensions[name]), layer.even.get(name, 0)
        options = np.array([p for p in sorted(products) if p <= most and even % p == 0])
        found = np.concatenate(
            [np.repeat(found, len(options), axis=0), np.tile(options, len(found))[:, None]], axis=1
        )
        used = found.prod(axis=1)
        found = found[(used <= devices.num_devices) & (devices.num_devices % used == 0)]
    return {name: found[:, n].astype(np.float64) for n, name in enumerate(names)} | {
        "": np.ones(len(found))
    }


def _product(degrees: _Degrees, names: Iterable[str | None]) -> FloatArray:
    result = degrees[""].copy()
    for name in names:
        if name is not None and name in degrees:
            result *= degrees[name]
    return result


def _classes(
    layer: Layer,
    ends: Sequence[tuple[Edge, bool]],
    model: AnalyticCostModel,
    links: _Links,
    *,
    fine: bool,
) -> tuple[FloatArray, FloatArray]:
    """What a layer costs at least, by what its neighbours see of its degrees.

    Returns:
      Seconds, shape (classes,), and shape (classes, columns * ends): for each end of an edge into
      how many parts its tensor's channels, samples and other dimensions are split, and over how
      many devices the reader's work on one part is.
    """
    degrees = _degrees(layer, model.devices)
    least_s = sum((_sums_s(m, degrees, links) for m in layer.members), 0 * degrees[""])
    least_s = model.serial_share * least_s
    if model.kernels:
        for kernel in model.kernels[layer.index]:
            least_s = least_s + _kernel_s(kernel, degrees, model)
    else:
        for member in layer.members:
            least_s = least_s + _work_s(member, degrees, model)
    for first, use in first_of_value(u for u in layer.uses if u.source == layer.index):
        if use.gradient:
            least_s = least_s + _own_use_s(use, degrees, model, links, first=first)
    for spare in spare_sums(layer):
        parts = _product(degrees, spare.names)
        joined_s = spare.count * links.seconds("all-reduce", parts, 0 * parts)
        least_s = least_s - model.serial_share * joined_s
    columns = []
    for edge, out in ends:
        labels = edge.use.source_labels if out else edge.use.labels
        idle = edge.use.active.difference(n for n in labels if n) if not out else frozenset()
        groups: list[list[str | None]] = [[], [], []]
        for group, label in zip(_groups(edge.use, fine=fine), labels, strict=True):
            groups[group].append(label)
        groups.append(list(idle))
        columns += [_product(degrees, names) for names in groups]
    seen = np.array(columns).reshape(len(columns), -1).T
    rows, inverse = np.unique(seen, axis=0, return_inverse=True)
    result = np.full(len(rows), np.inf)
    np.minimum.at(result, inverse.reshape(-1), least_s)
    return result, rows


def _kernel_s(kernel: Kernel, degrees: _Degrees, model: AnalyticCostModel) -> FloatArray:
    """As the cost model has it, with fractions in place of blocks."""
    devices = model.devices
    moved = sum(
        (
            factor * itemsize * math.prod(shape) / _product(degrees, labels)
            for shape, labels, itemsize, factor in kernel.traffic
        ),
        0 * degrees[""],
    )
    busy_s = moved / devices.memory_bytes_per_s
    if kernel.kind:
        flops = kernel.flops / _product(degrees, kernel.work[1])
        busy_s = np.maximum(busy_s, flops / devices.flops_per_s(kernel.kind, kernel.dtype))
    return kernel.starts * devices.overhead_s + busy_s


def _work_s(member: Member, degrees: _Degrees, model: AnalyticCostModel) -> FloatArray:
    """As the cost model has it, with fractions in place of blocks and without halos."""
    signature, eqn, devices = member.signature, member.equation, model.devices
    tensors = list(
        zip(
            (*eqn.operand_values, *eqn.result_values),
            (*signature.operands, *signature.results),
            strict=True,
        )
    )
    moved = sum(
        (math.prod(v.shape) * v.itemsize / _product(degrees, names) for v, names in tensors),
        0 * degrees[""],
    )
    rule, passes = RULES.get(eqn.name), passes_of(member)
    rate, start_s = work_rate(eqn, devices), start_of_kernel_s(eqn, devices)
    if rule is None or rate is None:
        work_s = passes * (moved / devices.memory_bytes_per_s + start_s)
    else:
        shapes = [v.shape for v in eqn.operand_values], [v.shape for v in eqn.result_values]
        flops = rule.flops(eqn, *shapes) / _product(degrees, signature.names)
        once_s = flops / rate + moved / devices.memory_bytes_per_s
        work_s = passes * (once_s + start_s)
    return work_s


def _sums_s(member: Member, degrees: _Degrees, links: _Links) -> FloatArray:
    """Sums of partial results."""
    signature, eqn = member.signature, member.equation
    sums_s = 0 * degrees[""]
    for value, names in zip(eqn.result_values, signature.results, strict=True):
        num_bytes = math.prod(value.shape) * value.itemsize / _product(degrees, names)
        parts = _product(degrees, signature.reduced)
        sums_s = sums_s + links.seconds("all-reduce", parts, num_bytes)
    return sums_s


def _own_use_s(
    use: Use, degrees: _Degrees, model: AnalyticCostModel, links: _Links, *, first: bool
) -> FloatArray:
    """Update of a parameter; the sum of partial gradients of it, or of a value inside the layer."""
    block = math.prod(use.info.shape) / _product(degrees, use.source_labels)
    result_s = 0 * degrees[""]
    if use.argument and first:
        passes = 3 + 2 * model.optimizer_slots
        result_s = passes * model.devices.update_pass_byte_s * use.info.itemsize * block
    if use.labels == use.source_labels:
        idle = use.active.difference(name for name in use.labels if name)
        parts, num_bytes = _product(degrees, idle), use.moved.itemsize * block
        sums_s = links.seconds("all-reduce", parts, num_bytes)
        if use.argument and model.bucket_bytes:  # it may start together with others
            sums_s = sums_s - links.seconds("all-reduce", parts, 0 * num_bytes)
        result_s = result_s + (model.devices.exposed_share if use.argument else 1.0) * sums_s
    return result_s


def _groups(use: Use, *, fine: bool) -> list[int]:
    """For each dimension of a tensor: 0 for channels, 1 for samples, 2 for others (1 if coarse)."""
    labels = use.source_labels
    channels = labels.index("channel") if "channel" in labels else len(labels) - 1
    return [
        0 if dim == channels else 1 if label == "sample" or not fine else 2
        for dim, label in enumerate(labels)
    ]


def _moved_s(
    use: Use, source: FloatArray, target: FloatArray, links: _Links, *, joined: bool
) -> FloatArray:
    """Shape (sources, targets): what has to reach a device, forward and backward.

    Args:
      use: the tensor.
      source: its splits where it is held.
      target: its splits where it is read.
      links: rates.
      joined: whether collectives of parameters start together.
    """
    num_bytes = math.prod(use.moved.shape) * use.moved.itemsize
    have = 1 / source[:, None, : _COLUMNS - 1]
    want = 1 / target[None, :, : _COLUMNS - 1]
    before, after = have.prod(axis=-1), want.prod(axis=-1)
    # At most so much of the tensor is in both of a device's blocks.
    both = np.minimum(have, want).prod(axis=-1)
    times = 1 + use.recomputed
    received: FloatArray = times * (after - both)
    waits = times * (received > 0)
    if use.gradient:
        # Partial sums of a block on n devices: each receives its share of the n - 1 additions.
        idle = target[None, :, _COLUMNS - 1]
        back = np.maximum(after * (idle - 1) / idle, before - both)
        received = received + back
        waits = waits + (back > 0)
    start_s = 0.0 if use.argument and joined else links.least_latency_s
    seconds: FloatArray = start_s * waits + links.least_byte_s * num_bytes * received
    return seconds
