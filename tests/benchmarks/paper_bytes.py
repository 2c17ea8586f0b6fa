"""Bytes of a step as the paper counts them in its Figure 8."""

from __future__ import annotations

from collections.abc import Sequence

import jaxlwp
from jaxlwp.cost import fetched_bytes, gradient_sums, layer_collectives
from jaxlwp.graph import ComputationGraph
from jaxlwp.space import Config, degree, wire_share


def moved_bytes(
    graph: ComputationGraph, configs: Sequence[Config], devices: jaxlwp.DeviceGraph
) -> float:
    """Bytes of a step, all devices together.

    A layer runs on as many devices as its config splits it over. Each fetches what it reads and
    does not have; where there are gradients, as much goes back. Every device with a copy of a
    parameter sends its gradient to a server and receives the new value.
    """
    total, sizes = 0.0, devices.axis_sizes
    for layer, config in zip(graph.layers, configs, strict=True):
        parts = degree(tuple(config.used_axes), sizes)
        for each in layer_collectives(layer, config, sizes):
            total += parts * wire_share(each.kind, degree(each.axes, sizes)) * each.num_bytes
        for each in gradient_sums(layer, config, sizes):
            total += parts * 2 * each.num_bytes
    for edge in graph.edges:
        if not edge.use.argument:
            ends = [configs[edge.source]], [configs[edge.target]]
            fetched = fetched_bytes(edge.use, *ends, devices)
            total += (1 + edge.use.gradient) * sum(each[0, 0] for each in fetched.values())
    return total
