"""Tables of seconds: every layer under each of its configs, every edge under each pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeGuard

from jaxlwp.cost._model import AnalyticCostModel, CostModel, LayerCosts
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.solver import CostTables, FloatArray
from jaxlwp.space import Config, enumerate_configs


class MovedTables(NamedTuple):
    """Bytes that each device sends in a step: halos, partial sums, layouts, gradients.

    Attributes:
      layers: per layer, shape (configs,).
      edges: per edge, shape (configs of the source, configs of the target).
    """

    layers: tuple[FloatArray, ...]
    edges: tuple[FloatArray, ...]


def layer_configs(
    layers: Sequence[Layer], devices: DeviceGraph, *, interchangeable: bool = True
) -> tuple[tuple[Config, ...], ...]:
    """All configs of each layer; see `enumerate_configs`."""
    found: dict[object, tuple[Config, ...]] = {}

    def of_layer(layer: Layer) -> tuple[Config, ...]:
        # A size matters up to the number of devices only: few layers differ.
        sizes = {n: (min(*s, devices.num_devices),) for n, s in layer.dimensions.items()}
        even = {n: math.gcd(s, devices.num_devices) for n, s in layer.even.items()}
        key = (*sizes.items(), *even.items())
        if key not in found:
            found[key] = enumerate_configs(
                sizes=sizes,
                even=even,
                axis_groups=devices.axis_groups,
                axis_sizes=devices.axis_sizes,
                interchangeable=interchangeable,
            )
        return found[key]

    return tuple(of_layer(layer) for layer in layers)


def build_tables(
    graph: ComputationGraph, configs: Sequence[Sequence[Config]], model: CostModel
) -> CostTables:
    """Price every config of every layer and every pair of configs on every edge.

    Args:
      graph: the computation graph.
      configs: the configs of each layer.
      model: the cost model.

    Returns:
      The cost tables, in seconds, with layers and edges in the graph's order.
    """
    sides: dict[tuple[Config, ...], int] = {}
    side_of = [sides.setdefault(tuple(choices), len(sides)) for choices in configs]
    layers: dict[object, LayerCosts] = {}
    costs = []
    for layer, side in zip(graph.layers, side_of, strict=True):
        kernels = model.kernels[layer.index : layer.index + 1] if _fused(model) else ()
        key = layer.key, kernels, side
        if key not in layers:
            layers[key] = model.layer(layer, configs[layer.index])
        costs.append(layers[key])
    edges = graph.edges
    transfers: dict[object, FloatArray] = {}
    moved = []
    for edge in edges:
        alike = edge.use.key, side_of[edge.source], side_of[edge.target]
        if alike not in transfers:
            ends = configs[edge.source], configs[edge.target]
            transfers[alike] = model.transfer_s(edge.use, *ends)
        moved.append(transfers[alike])
    return CostTables(
        compute_s=tuple(cost.compute_s for cost in costs),
        exchange_s=tuple(cost.exchange_s for cost in costs),
        overhead_s=tuple(cost.overhead_s for cost in costs),
        step_s=model.step_s(graph),
        sync_s=tuple(cost.sync_s for cost in costs),
        edges=tuple((edge.source, edge.target) for edge in edges),
        transfer_s=tuple(moved),
        names=tuple(layer.name for layer in graph.layers),
    )


def moved_tables(
    graph: ComputationGraph, configs: Sequence[Sequence[Config]], devices: DeviceGraph
) -> MovedTables:
    """What every config of every layer and every pair of configs on an edge sends, in bytes.

    Args:
      graph: the computation graph.
      configs: the configs of each layer.
      devices: mesh axes; their rates do not matter.
    """
    axes = tuple(replace(axis, latency_s=0.0, bytes_per_s=1.0) for axis in devices.axes)
    unit = replace(devices, axes=axes, links=(), first_touch_byte_s=())
    tables = build_tables(graph, configs, AnalyticCostModel(devices=unit))
    return MovedTables(
        layers=tuple(a + b for a, b in zip(tables.exchange_s, tables.sync_s, strict=True)),
        edges=tables.transfer_s,
    )


def _fused(model: CostModel) -> TypeGuard[AnalyticCostModel]:
    return isinstance(model, AnalyticCostModel) and bool(model.kernels)
