"""Memory that a strategy takes on each device, and what each layer has of it under each config.

Two questions, two answers. What does *this strategy* take: its program is traced on one device's
blocks, differentiated, and its buffers are followed from the first kernel to the last (`_buffers`);
the state is donated, as in the compiled step. What would a layer take *under each of its configs*:
arrays of bytes for a search, from local shapes alone; which values are kept for the backward pass
is found out once, on the program that is not split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxlwp.graph import ComputationGraph, Edge, Layer, Use
from jaxlwp.kernels import LIBRARY, differentiated
from jaxlwp.lower import Lowered
from jaxlwp.memory._buffers import Buffers, predict
from jaxlwp.ops import Labels
from jaxlwp.program import Value
from jaxlwp.space import Config, Layout, copied_bytes, even_layout, local_shape


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per device that a training step takes.

    Attributes:
      parameter_bytes: the parameters.
      optimizer_bytes: the optimizer's state.
      batch_bytes: the other arguments.
      gradient_bytes: the gradients of the parameters, all of them; part of `peak_bytes` as far as
        they are there at that moment.
      kept_bytes: what the forward pass leaves for the backward pass: activations, masks, filters
        in the order that cuDNN wants.
      temporary_bytes: what is there besides when most is.
      layer_kept_bytes: `kept_bytes` by layer, in the graph's order.
    """

    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    gradient_bytes: int
    kept_bytes: int
    temporary_bytes: int
    layer_kept_bytes: tuple[int, ...] = field(repr=False, default=())

    @property
    def argument_bytes(self) -> int:
        """What is there before and after a step."""
        return self.parameter_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def peak_bytes(self) -> int:
        """What has to fit: the arguments, and what lives beside them at the worst moment."""
        return self.argument_bytes + self.kept_bytes + self.temporary_bytes


def strategy_memory(
    graph: ComputationGraph,
    configs: Sequence[Config],
    axis_sizes: dict[str, int],
    optimizer_bytes: int = 0,
) -> Memory:
    """Memory of a training step under a strategy.

    Args:
      graph: the computation graph.
      configs: the config of each layer.
      axis_sizes: devices along each mesh axis; the devices need not exist.
      optimizer_bytes: of the optimizer's state on each device.
    """
    lowered = Lowered(graph=graph, configs=tuple(configs), axis_sizes=axis_sizes)
    local = differentiated(lowered, named=True, alike=True)
    buffers = predict(local.program, local.gradients, local.loss)
    layouts = lowered.input_layouts()
    sizes = [
        _bytes(graph.program.values[value], layout, axis_sizes)
        for value, layout in zip(graph.program.inputs, layouts, strict=True)
    ]
    return Memory(
        parameter_bytes=sum(sizes[: graph.num_parameters]),
        optimizer_bytes=optimizer_bytes,
        batch_bytes=sum(sizes[graph.num_parameters :]),
        gradient_bytes=sum(sizes[position] for position in local.trained),
        kept_bytes=sum(node.num_bytes for node in buffers.kept),
        temporary_bytes=buffers.live_bytes - sum(node.num_bytes for node in buffers.kept),
        layer_kept_bytes=_by_layer(graph, buffers),
    )


def _by_layer(graph: ComputationGraph, buffers: Buffers) -> tuple[int, ...]:
    """Kept bytes of each layer: a step in between belongs to the layer that it leads to."""
    totals = [0] * len(graph.layers)
    for node, tag in zip(buffers.kept, buffers.tags, strict=True):
        if tag is not None:
            totals[graph.homes[int(tag)][0]] += node.num_bytes
    return tuple(totals)


def _itemsize(dtype: Any) -> int:
    return Value((), dtype).itemsize


def _bytes(info: Value, layout: Layout, axis_sizes: Mapping[str, int]) -> int:
    return math.prod(local_shape(info.shape, layout, axis_sizes)) * info.itemsize


# --- bytes of a layer under each of its configs ----------------------------------------------

IntArray = npt.NDArray[np.int64]


class MemoryCosts(NamedTuple):
    """Bytes per device of one layer under each of its configs; every array has shape (configs,).

    Attributes:
      parameter_bytes: the parameters that the layer owns.
      gradient_bytes: their gradients.
      optimizer_bytes: their optimizer state.
      kept_bytes: what it keeps for the backward pass.
      temporary_bytes: what it needs besides while it runs backward, about.
    """

    parameter_bytes: IntArray
    gradient_bytes: IntArray
    optimizer_bytes: IntArray
    kept_bytes: IntArray
    temporary_bytes: IntArray

    def part(self, numbers: npt.NDArray[np.intp]) -> MemoryCosts:
        """Those of some configs, by index."""
        return MemoryCosts(*(array[numbers] for array in self))


@dataclass(frozen=True, kw_only=True)
class MemoryTables:
    """Bytes per device of every layer under every config, and of every edge.

    Attributes:
      layers: per layer.
      edges: the graph's edges, as pairs of layer indices.
      copied_bytes: per edge (i, j), shape (configs of i, configs of j): the copy that j keeps for
        the backward pass of a tensor that it wants in another layout than i has it.
    """

    layers: tuple[MemoryCosts, ...]
    edges: tuple[tuple[int, int], ...]
    copied_bytes: tuple[IntArray, ...] = field(repr=False)

    def for_optimizer(self, optimizer_slots: float) -> MemoryTables:
        """The same with another optimizer, of so many bytes for each byte of a parameter."""
        layers = (
            cost._replace(optimizer_bytes=(optimizer_slots * cost.parameter_bytes).astype(np.int64))
            for cost in self.layers
        )
        return replace(self, layers=tuple(layers))

    def estimate(self, choices: Sequence[int]) -> int:
        """About the peak of a strategy, from the bytes of its layers and edges alone.

        Parameters, optimizer state and what is kept are there together; the largest layer's
        temporaries come on top of them, and when nothing is kept any more, the gradients.
        """
        chosen = [
            [int(part[choice]) for part in cost]
            for cost, choice in zip(self.layers, choices, strict=True)
        ]
        parameter, gradient, optimizer, kept, temporary = zip(*chosen, strict=True)
        copied = sum(
            int(table[choices[i], choices[j]])
            for (i, j), table in zip(self.edges, self.copied_bytes, strict=True)
        )
        besides = max(sum(kept) + copied + max(temporary), sum(gradient))
        return int(sum(parameter) + sum(optimizer) + besides)


def memory_costs(
    graph: ComputationGraph,
    configs: Sequence[Sequence[Config]],
    axis_sizes: dict[str, int],
    optimizer_slots: float = 1.0,
) -> MemoryTables:
    """Bytes of every layer under every config, for a search that has to stay within a memory.

    Args:
      graph: the computation graph.
      configs: the configs of each layer.
      axis_sizes: devices along each mesh axis.
      optimizer_slots: bytes of optimizer state for each byte of a parameter: 1 for SGD with
        momentum, 2 for Adam.
    """
    kept, readers = _kept_blocks(graph)
    edges = graph.edges

    def reader_of(use: Use) -> int | None:
        """The layer that has the value among what it keeps, in its own layout."""
        return readers[use.value][0] if use.value in readers else None

    return MemoryTables(
        layers=tuple(
            _layer_memory(layer, choices, axis_sizes, kept[layer.index], optimizer_slots)
            for layer, choices in zip(graph.layers, configs, strict=True)
        ),
        edges=tuple((edge.source, edge.target) for edge in edges),
        copied_bytes=tuple(
            _copied_bytes(edge, configs, axis_sizes, counted=edge.target == reader_of(edge.use))
            for edge in edges
        ),
    )


def _copied_bytes(
    edge: Edge,
    configs: Sequence[Sequence[Config]],
    axis_sizes: dict[str, int],
    *,
    counted: bool,
) -> IntArray:
    """Bytes of the copy that an edge's reader keeps, shape (configs, configs).

    None if the reader has the tensor among what it keeps anyway (`counted`). A reader that needs no
    copy for its gradient, a sum, has one here all the same: without it, a search for little memory
    would change layouts at every sum, and the copies that this takes meanwhile are in no estimate.
    """
    use, sides = edge.use, (configs[edge.source], configs[edge.target])
    if use.argument or not use.gradient or counted:
        return np.zeros((len(sides[0]), len(sides[1])), dtype=np.int64)
    there = [config.layout(use.source_labels) for config in sides[0]]
    here = [config.layout(use.labels) for config in sides[1]]
    return copied_bytes(use.info.shape, use.info.itemsize, there, here, axis_sizes)


class _Block(NamedTuple):
    """A value of which a layer keeps its block, `factor` times."""

    info: Value
    labels: Labels
    factor: float


def _kept_blocks(
    graph: ComputationGraph,
) -> tuple[list[list[_Block]], dict[int, tuple[int, Labels]]]:
    """What each layer keeps, by the program that is not split.

    What is kept for the gradient of a weight is kept by the layer that reads it, in the layout in
    which that layer reads it: all-gathered, where its channels are split. For these values, that
    layer and the names of their dimensions there come second.
    """
    whole = (Config(),) * len(graph.layers)
    local = differentiated(
        Lowered(graph=graph, configs=whole, axis_sizes={"device": 1}), named=True, alike=True
    )
    buffers = predict(local.program, local.gradients, local.loss)
    readers: dict[int, tuple[int, Labels]] = {}
    for layer in graph.layers:
        for member in layer.members:
            if member.equation.name not in LIBRARY:
                continue
            for side in (0, 1):  # the weight of a matrix product may be either
                if member.gradient[1 - side]:
                    label = layer.index, member.signature.operands[side]
                    readers.setdefault(member.equation.operands[side], label)
    result: list[list[_Block]] = [[] for _ in graph.layers]
    for node, tag in zip(buffers.kept, buffers.tags, strict=True):
        if tag is None or node.kind == "filter":
            continue
        info = graph.program.values[int(tag)]
        place, labels = readers.get(int(tag)) or graph.homes[int(tag)]
        size = math.prod(info.shape) * info.itemsize
        result[place].append(_Block(info, labels, node.num_bytes / max(size, 1)))
    for layer in graph.layers if local.gradients else ():
        result[layer.index] += [_Block(*filters, 1.0) for filters in _filters(layer)]
    return result, readers


def _filters(layer: Layer) -> list[tuple[Value, Labels]]:
    """Filters of convolutions: each is there a second time, in the library's order."""
    return [
        (member.equation.operand_values[1], member.signature.operands[1])
        for member in layer.members
        if member.equation.name == "conv_general_dilated"
    ]


def _layer_memory(
    layer: Layer,
    configs: Sequence[Config],
    axis_sizes: dict[str, int],
    kept: Sequence[_Block],
    optimizer_slots: float,
) -> MemoryCosts:
    def blocks(info: Value, labels: Labels, *, stored: bool = False) -> IntArray:
        layouts = [config.layout(labels) for config in configs]
        if stored:  # arguments are split evenly
            layouts = [even_layout(info.shape, layout, axis_sizes) for layout in layouts]
        return np.array([_bytes(info, layout, axis_sizes) for layout in layouts], dtype=np.int64)

    zero = np.zeros(len(configs), dtype=np.int64)
    own = [u for u in layer.uses if u.argument and u.gradient and u.source == layer.index]
    parameter_bytes = sum((blocks(u.info, u.source_labels, stored=True) for u in own), start=zero)
    kept_bytes = sum(
        ((block.factor * blocks(block.info, block.labels)).astype(np.int64) for block in kept),
        start=zero,
    )
    temporary_bytes = zero
    for member in layer.members:
        eqn, signature = member.equation, member.signature
        values = (*eqn.operand_values, *eqn.result_values)
        labels = (*signature.operands, *signature.results)
        moved = sum((blocks(v, n) for v, n in zip(values, labels, strict=True)), start=zero)
        if eqn.name == "reduce_window_max":  # places of the maxima, and zeros to scatter into
            out = eqn.result_values[0]
            places = 4 * len(out.shape) // out.itemsize + 1
            moved = moved + places * blocks(out, signature.results[0])
        temporary_bytes = np.maximum(temporary_bytes, moved)
    return MemoryCosts(
        parameter_bytes=parameter_bytes,
        gradient_bytes=parameter_bytes,
        optimizer_bytes=(optimizer_slots * parameter_bytes).astype(np.int64),
        kept_bytes=kept_bytes,
        temporary_bytes=temporary_bytes,
    )
