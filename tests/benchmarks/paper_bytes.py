"""Bytes of a step as the paper counts them in its Figure 8."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from jaxlwp.cost import gradient_sums, layer_collectives
from jaxlwp.graph import ComputationGraph, Use
from jaxlwp.space import Config, cdiv, degree, wire_share


def moved_bytes(graph: ComputationGraph, configs: Sequence[Config], sizes: dict[str, int]) -> float:
    """Bytes of a step, all devices together.

    A layer runs on as many devices as its config splits it over. Each fetches what it reads and
    does not have; where there are gradients, as much goes back. Every device with a copy of a
    parameter sends its gradient to a server and receives the new value.
    """
    total = 0.0
    for layer, config in zip(graph.layers, configs, strict=True):
        devices = degree(tuple(config.used_axes), sizes)
        for each in layer_collectives(layer, config, sizes):
            total += devices * wire_share(each.kind, degree(each.axes, sizes)) * each.num_bytes
        for each in gradient_sums(layer, config, sizes):
            total += devices * 2 * each.num_bytes
    for edge in graph.edges:
        if not edge.use.argument:
            ends = configs[edge.source], configs[edge.target]
            total += (1 + edge.use.gradient) * fetched_bytes(edge.use, *ends, sizes)
    return total


def fetched_bytes(use: Use, source: Config, target: Config, sizes: Mapping[str, int]) -> int:
    """Bytes that the reader's devices fetch: what they read without what they have."""
    shape, total = use.moved.shape, 0
    there, wanted = source.layout(use.source_labels), target.layout(use.labels)
    # Devices over which a layer is not split have nothing to do with it: the first one stands in.
    places = [range(size if axis in target.used_axes else 1) for axis, size in sizes.items()]
    for place in itertools.product(*places):
        at = dict(zip(sizes, place, strict=True))
        reads = [_rows(n, axes, at, sizes) for n, axes in zip(shape, wanted, strict=True)]
        total += math.prod(map(len, reads))
        if all(at[axis] == 0 for axis in sizes if axis not in source.used_axes):
            has = [_rows(n, axes, at, sizes) for n, axes in zip(shape, there, strict=True)]
            total -= math.prod(
                max(0, min(a.stop, b.stop) - max(a.start, b.start))
                for a, b in zip(reads, has, strict=True)
            )
    return total * use.moved.itemsize


def _rows(size: int, axes: Sequence[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> range:
    """The rows of a dimension that the device at a place has."""
    block = cdiv(size, degree(axes, sizes))
    number = 0
    for axis in axes:
        number = number * sizes[axis] + at[axis]
    return range(min(number * block, size), min((number + 1) * block, size))
