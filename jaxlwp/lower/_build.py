"""From the configs of all layers to the steps of one device.

Layers are visited in the order of the program. Each operator's operands are brought into the
layouts that its signature asks for, halos are received, padding is filled, partial sums are added.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxlwp.graph import ComputationGraph, pull, whole
from jaxlwp.lower._filters import FilterKind, filter_kinds
from jaxlwp.lower._halo import plan_halo
from jaxlwp.lower._haloed import Haloed, put_together, with_halo
from jaxlwp.lower._joined import joined
from jaxlwp.lower._padding import broadcasts, elementwise, neutral, uneven_dimensions
from jaxlwp.lower._sharing import received_once
from jaxlwp.lower._steps import (
    AddUp,
    AxisSizes,
    Block,
    Change,
    DeviceProgram,
    Extend,
    Fill,
    Filter,
    Op,
    Operate,
    Region,
    Spread,
    Step,
    Vary,
)
from jaxlwp.ops import Labels, Signature
from jaxlwp.program import Checkpoint, Equation, Value
from jaxlwp.space import (
    Config,
    Layout,
    degree,
    even_layout,
    layout_axes,
    local_shape,
    plan_moves,
)


class Placed(NamedTuple):
    """A value on one device: its block, varying over exactly the axes of its layout."""

    block: Block
    layout: Layout


Made = ChainMap[int, Placed]
"""Values that are there."""

Read = ChainMap[tuple[int, Layout, frozenset[str]], Block]
"""Blocks as readers want them: by value, layout, and axes over which the reader is active."""

AxesOf = Callable[[str | None], tuple[str, ...]]
"""The mesh axes that split a dimension of a signature."""

Steps = ChainMap[tuple[Op, tuple[Block, ...]], tuple[Block, ...]]
"""Results of the steps that are there."""


def stored_layout(
    graph: ComputationGraph,
    configs: Sequence[Config],
    value: int,
    axis_sizes: Mapping[str, int],
) -> Layout:
    """Layout in which an argument is stored: its owner's, as far as it splits evenly."""
    shape = graph.program.values[value].shape
    if value not in graph.owners:
        return ((),) * len(shape)
    layer, labels = graph.owners[value]
    return even_layout(shape, configs[layer].layout(labels), axis_sizes)


def output_layout(
    graph: ComputationGraph,
    configs: Sequence[Config],
    value: int,
    axis_sizes: Mapping[str, int],
) -> Layout:
    """Layout of an output of the function: its layer's, as far as it splits evenly."""
    shape = graph.program.values[value].shape
    if value in graph.homes:
        layer, labels = graph.homes[value]
        return even_layout(shape, configs[layer].layout(labels), axis_sizes)
    return stored_layout(graph, configs, value, axis_sizes)


def read_elsewhere(graph: ComputationGraph, positions: Sequence[int]) -> tuple[int, ...]:
    """Values that layers make at the given positions and that something after them reads."""
    inside = frozenset(positions)
    wanted = set(graph.program.outputs)
    for position, eqn in reversed(list(enumerate(graph.program.equations))):
        # A lazy operator is evaluated by those who read it.
        lazy = position in inside and position not in graph.assigned
        if position not in inside or (lazy and wanted.intersection(eqn.results)):
            wanted.update(eqn.operands)
    made = (value for i in positions for value in graph.program.equations[i].results)
    return tuple(value for value in made if value in wanted and value in graph.homes)


def build(
    graph: ComputationGraph, configs: Sequence[Config], axis_sizes: Mapping[str, int]
) -> DeviceProgram:
    """The steps of a graph under a strategy.

    Args:
      graph: the computation graph.
      configs: the config of each layer.
      axis_sizes: devices along each mesh axis.
    """
    builder = Builder(graph, configs, axis_sizes)
    inputs = tuple(
        builder.argument(value, stored_layout(graph, configs, value, axis_sizes))
        for value in graph.program.inputs
    )
    builder.evaluate(range(len(graph.program.equations)), depth=0)
    layouts = (output_layout(graph, configs, v, axis_sizes) for v in graph.program.outputs)
    outputs = [
        builder.output(value, layout)
        for value, layout in zip(graph.program.outputs, layouts, strict=True)
    ]
    return builder.program(inputs, outputs)


def build_layer(
    graph: ComputationGraph,
    configs: Sequence[Config],
    axis_sizes: Mapping[str, int],
    reads: Sequence[tuple[int, Layout, frozenset[str]]],
    positions: Sequence[int],
    makes: Sequence[int],
) -> DeviceProgram:
    """The steps of some equations alone.

    Args:
      graph: the computation graph.
      configs: the config of each layer.
      axis_sizes: devices along each mesh axis.
      reads: what is given: values, their layouts, and the axes over which their readers are active.
      positions: of the equations.
      makes: values that are the results.
    """
    builder = Builder(graph, configs, axis_sizes)
    inputs = tuple(builder.given(*each) for each in reads)
    builder.evaluate(positions, depth=0)
    return builder.program(inputs, [builder.made[value].block for value in makes])


class Builder:
    """Makes the steps of a program, in order, each of them once."""

    def __init__(
        self, graph: ComputationGraph, configs: Sequence[Config], axis_sizes: Mapping[str, int]
    ) -> None:
        self.graph, self.configs, self.axis_sizes = graph, configs, dict(axis_sizes)
        self.axes: AxisSizes = tuple(self.axis_sizes.items())
        self.filters = filter_kinds(graph)
        self.layer: int | None = None
        self.items: list[Step | Region] = []
        self.values: dict[Block, int] = {}
        # What is there, by call of `jax.checkpoint`, innermost first.
        self.made: Made = ChainMap()
        self.read: Read = ChainMap()
        self.steps: Steps = ChainMap()
        self.constants: dict[Block, Any] = {}
        for value, constant in graph.program.constants.items():
            info = graph.program.values[value]
            block = Block(info.shape, info.dtype, frozenset())
            self.constants[block] = constant
            self.made[value] = Placed(block, ((),) * len(info.shape))

    def program(self, inputs: Sequence[Block], outputs: Sequence[Block]) -> DeviceProgram:
        """The program made so far."""
        return DeviceProgram(
            inputs=tuple(inputs),
            constants=self.constants,
            items=joined(received_once(self.items), backward=bool(self.graph.gradients)),
            outputs=tuple(outputs),
            values=self.values,
        )

    def argument(self, value: int, layout: Layout) -> Block:
        """Add an argument of the function."""
        info = self.graph.program.values[value]
        shape = local_shape(info.shape, layout, self.axis_sizes)
        block = Block(shape, info.dtype, layout_axes(layout))
        self.made[value] = Placed(block, layout)
        return block

    def given(self, value: int, layout: Layout, active: frozenset[str]) -> Block:
        """Add a value that is there already, as a reader wants it."""
        info = self.graph.program.values[value]
        shape = local_shape(info.shape, layout, self.axis_sizes)
        block = Block(shape, info.dtype, layout_axes(layout))
        self.read[value, layout, active] = self.changed(
            block, info.shape, layout, layout, active.union(layout_axes(layout))
        )
        return block

    # --- steps ---

    def step(self, op: Op, operands: Iterable[Block], results: Sequence[Block]) -> Any:
        """The results of a step, which is added unless it is there already."""
        key = op, tuple(operands)
        if key not in self.steps:
            self.steps[key] = tuple(results)
            self.items.append(Step(*key, tuple(results), self.layer))
        return self.steps[key]

    def changed(
        self,
        block: Block,
        shape: tuple[int, ...],
        source: Layout,
        target: Layout,
        active: frozenset[str],
        *,
        as_vector: bool = False,
    ) -> Block:
        """A block brought from one layout to another; it may become varying as a vector."""
        moves = plan_moves(
            shape=shape, source=source, target=target, active=active, axis_sizes=self.axis_sizes
        )
        before = source
        for move in moves:
            varying = block.varying
            if move.kind in ("slice", "cast") or move.varying:
                varying = varying.union(move.axes)
            elif move.kind == "all_gather":
                varying = varying.difference(move.axes)
            after = Block(local_shape(shape, move.after, self.axis_sizes), block.dtype, varying)
            op: Op = Change(move, before, shape, self.axes)
            if as_vector and move.kind == "cast":
                op = Vary(move.axes)
            (block,) = self.step(op, (block,), (after,))
            before = move.after
        return block

    def filled(self, block: Block, shape: tuple[int, ...], layout: Layout, fill: Any) -> Block:
        """A block with `fill`, a number or a block, in its padding."""
        parts = (degree(axes, self.axis_sizes) for axes in layout)
        if not any(size % n for size, n in zip(shape, parts, strict=True)):
            return block
        scalar = (fill,) if isinstance(fill, Block) else ()
        op = Fill(shape, layout, self.axes, None if scalar else fill)
        varying = block.varying.union(*(x.varying for x in scalar), layout_axes(layout))
        (result,) = self.step(op, (block, *scalar), (replace(block, varying=varying),))
        return result  # type: ignore[no-any-return]

    # --- equations ---

    def evaluate(self, positions: Sequence[int], depth: int) -> None:
        """Add the steps of equations in order.

        Args:
          positions: of the equations in the program.
          depth: how many calls of `jax.checkpoint` around them are dealt with already.
        """
        equations = self.graph.program.equations

        def call_of(position: int) -> Checkpoint | None:
            calls = equations[position].checkpoints
            return calls[depth] if len(calls) > depth else None

        for call, group in itertools.groupby(positions, call_of):
            if call is not None:
                self.checkpoint(call, tuple(group), depth + 1)
                continue
            for position in group:
                if position in self.graph.assigned:
                    self.execute(position, *self.graph.assigned[position])

    def checkpoint(self, call: Checkpoint, positions: Sequence[int], depth: int) -> None:
        """Add a call of `jax.checkpoint`: only what others read is there after it."""
        items, made, read, steps = self.items, self.made, self.read, self.steps
        self.items = []
        self.made, self.read, self.steps = made.new_child(), read.new_child(), steps.new_child()
        self.evaluate(positions, depth)
        kept = {value: self.made[value] for value in read_elsewhere(self.graph, positions)}
        blocks = tuple(dict.fromkeys(placed.block for placed in kept.values()))
        if self.items:
            items.append(Region(call, tuple(self.items), blocks))
        self.items, self.made, self.read, self.steps = items, made, read, steps
        self.made.update(kept)

    def execute(self, position: int, layer: int, signature: Signature) -> None:
        """Add the steps of an equation that belongs to a layer."""
        self.layer = layer
        config, eqn = self.configs[layer], self.graph.program.equations[position]
        active = frozenset(axis for name in signature.names for axis in config.axes(name))
        results = self.apply(position, signature, config.axes, active)
        for value, block, labels in zip(eqn.results, results, signature.results, strict=True):
            self.made[value] = Placed(block, config.layout(labels))
            self.values[block] = value

    def output(self, value: int, layout: Layout) -> Block:
        """An output of the function in its layout."""
        self.layer = None
        return self.get(value, layout, layout_axes(layout))

    def get(self, value: int, layout: Layout, active: frozenset[str]) -> Block:
        """Block of a value as a reader wants it; lazy values are evaluated here.

        Args:
          value: index of the value.
          layout: in which it is wanted.
          active: mesh axes over which the reader's work is split.
        """
        key = self.graph.casts.get(value, value), layout, active
        if key not in self.read:
            self.read[key] = self.fetch(*key)
        return self.read[key]

    def fetch(self, value: int, layout: Layout, active: frozenset[str]) -> Block:
        info = self.graph.program.values[value]
        if value in self.graph.casts:
            self.cast(value)
        if value in self.made:
            block, source = self.made[value]
            kind = self.filters.get(value)
            if kind in (FilterKind.TURNED, FilterKind.KEPT):
                op = Filter(kept=kind is FilterKind.KEPT)
                (block,) = self.step(op, (block,), (replace(block),))
            as_vector = kind is FilterKind.SUMMED
            return self.changed(block, info.shape, source, layout, active, as_vector=as_vector)
        position = self.graph.lazy[value]
        eqn = self.graph.program.equations[position]
        result = eqn.results.index(value)
        # Only dimensions that are split need a name.
        labels = tuple(str(dim) if axes else None for dim, axes in enumerate(layout))
        split = {str(dim): axes for dim, axes in enumerate(layout)}
        signature = pull(eqn, result, labels)
        if signature is not None:
            made = self.apply(position, signature, lambda name: split.get(name or "", ()), active)
            return made[result]
        nothing: Layout = ((),) * len(info.shape)
        if layout == nothing:  # no rule: it is evaluated whole
            block = self.apply(position, whole(eqn), lambda name: (), frozenset())[result]
        else:
            block = self.get(value, nothing, frozenset())
        return self.changed(block, info.shape, nothing, layout, active)

    def cast(self, value: int) -> None:
        """Make a cast of an argument, in the layout in which the argument is stored.

        So it is moved, and its gradients are added up, in the dtype of the cast.
        """
        equations, position = self.graph.program.equations, self.graph.lazy[value]
        (operand,) = equations[position].operands
        while operand in self.graph.lazy:
            (operand,) = equations[self.graph.lazy[operand]].operands
        if value in self.made or operand not in self.made:
            return  # in a layer alone, arguments are there as readers want them
        eqn = equations[position]
        layout = self.made[operand].layout
        split = {str(dim): axes for dim, axes in enumerate(layout)}
        labels = tuple(str(dim) if axes else None for dim, axes in enumerate(layout))
        signature = pull(eqn, 0, labels)
        assert signature is not None
        active = layout_axes(layout)
        (block,) = self.apply(position, signature, lambda name: split.get(name or "", ()), active)
        self.made[value] = Placed(block, layout)

    def apply(
        self,
        position: int,
        signature: Signature,
        axes_of: AxesOf,
        active: frozenset[str],
    ) -> tuple[Block, ...]:
        """Add one equation: operands in place, halo, operator, sum, padding.

        Args:
          position: of the equation in the program.
          signature: its signature.
          axes_of: the mesh axes that split a dimension of the signature.
          active: mesh axes over which the work is split.
        """
        eqn = self.graph.program.equations[position]

        def layout_of(labels: Labels) -> Layout:
            return tuple(map(axes_of, labels))

        operands = [layout_of(labels) for labels in signature.operands]
        results = [layout_of(labels) for labels in signature.results]
        blocks = [self.get(v, x, active) for v, x in zip(eqn.operands, operands, strict=True)]
        fills = [neutral(signature.fill, info.dtype) for info in eqn.operand_values]
        if signature.fill == "value":
            fills = [blocks[1]] * len(blocks)
        if signature.fill is not None:
            blocks = [
                self.filled(block, info.shape, layout, fill)
                for block, info, layout, fill in zip(
                    blocks, eqn.operand_values, operands, fills, strict=True
                )
            ]
        elif elementwise(eqn):
            blocks = self.spread(eqn, signature, results[0], blocks)
        haloed: dict[int, tuple[int, int, int]] = {}
        if signature.windows:
            blocks[0], haloed = self.with_halo(blocks[0], eqn, signature, axes_of, fills[0])
        for dim, border in eqn.borders.items():
            if not operands[0][dim]:
                shape = list(blocks[0].shape)
                shape[dim] += len(border.before) + len(border.after)
                extended = replace(blocks[0], shape=tuple(shape))
                (blocks[0],) = self.step(Extend(dim, border), (blocks[0],), (extended,))
        reduced = frozenset(axis for name in signature.reduced for axis in axes_of(name))
        made = self.operate(position, eqn, signature, results, blocks, haloed, reduced, active)
        return tuple(
            self.filled(block, info.shape, layout, 0)
            if signature.fill is not None
            or (not elementwise(eqn) and self.pads(eqn, signature, labels, info, layout))
            else block
            for block, info, labels, layout in zip(
                made, eqn.result_values, signature.results, results, strict=True
            )
        )

    def operate(
        self,
        position: int,
        eqn: Equation,
        signature: Signature,
        layouts: Sequence[Layout],
        blocks: Sequence[Block],
        haloed: Mapping[int, tuple[int, int, int]],
        reduced: frozenset[str],
        active: frozenset[str],
    ) -> tuple[Block, ...]:
        """Add the operator itself and the sum of its partial results."""
        op = Operate(
            position=position,
            layouts=tuple(layouts),
            haloed=tuple(sorted(haloed.items())),
            reduced_axes=self.ordered(reduced),
            varying=self.ordered(active),
            axes=self.axes,
            eqn=eqn,
            names=signature.operands[0] if signature.operands else (),
        )
        varying = frozenset(op.varying if not blocks else ()).union(*(b.varying for b in blocks))
        if op.combines:
            varying -= reduced
        shapes = (
            local_shape(info.shape, layout, self.axis_sizes)
            for info, layout in zip(eqn.result_values, layouts, strict=True)
        )
        made: tuple[Block, ...] = self.step(
            op,
            blocks,
            [
                Block(shape, info.dtype, varying)
                for shape, info in zip(shapes, eqn.result_values, strict=True)
            ],
        )
        if not reduced or op.combines:
            return made
        summed = [replace(block, varying=block.varying - reduced) for block in made]
        return tuple(
            self.step(AddUp(op.reduced_axes), (block,), (after,))[0]
            for block, after in zip(made, summed, strict=True)
        )

    def ordered(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Mesh axes in the order of the mesh."""
        wanted = frozenset(axes)
        return tuple(axis for axis in self.axis_sizes if axis in wanted)

    def with_halo(
        self, block: Block, eqn: Equation, signature: Signature, axes_of: AxesOf, fill: Any
    ) -> tuple[Block, dict[int, tuple[int, int, int]]]:
        """The rows that an operator reads of its first operand, along every dimension.

        Returns:
          The block; and by split dimension the padding and base dilation that it still needs.
        """
        haloed: Haloed = block
        left_over: dict[int, tuple[int, int, int]] = {}
        for name in sorted(signature.windows):
            axes = axes_of(name)
            if axes:
                dim = signature.operands[0].index(name)
                out = signature.results[0].index(name)
                size, out_size = eqn.operand_values[0].shape[dim], eqn.result_values[0].shape[out]
                parts = degree(axes, self.axis_sizes)
                halo = plan_halo(size, out_size, signature.windows[name], parts)
                haloed = with_halo(self.step, haloed, dim, axes, halo, fill)
                left_over[dim] = (0, 0, 1) if halo.left_over is None else halo.left_over
        return put_together(self.step, haloed), left_over

    # --- padding ---

    def spread(
        self, eqn: Equation, signature: Signature, layout: Layout, blocks: Sequence[Block]
    ) -> list[Block]:
        """Make operands that an elementwise operator broadcasts into padding full, padding zeroed.

        Their cotangents are summed over the padding, where the other operand may hold what turns
        even a zero cotangent into NaN (log 0, 1 / 0). Zeroing the result would be too late.
        """
        shape = eqn.result_values[0].shape
        local = local_shape(shape, layout, self.axis_sizes)
        uneven = uneven_dimensions(signature.results[0], shape, layout, self.axis_sizes)
        result = []
        for operand, labels, block in zip(eqn.operands, signature.operands, blocks, strict=True):
            if broadcasts(self.graph.program, operand, labels, uneven):
                (block,) = self.step(Spread(local), (block,), (replace(block, shape=local),))
                block = self.filled(block, shape, layout, 0)
            result.append(block)
        return result

    def pads(
        self, eqn: Equation, signature: Signature, labels: Labels, info: Value, layout: Layout
    ) -> bool:
        """Whether an operator broadcasts an operand into a result's padding; see `broadcasts`."""
        uneven = uneven_dimensions(labels, info.shape, layout, self.axis_sizes)
        return any(
            broadcasts(self.graph.program, operand, operand_labels, uneven)
            for operand, operand_labels in zip(eqn.operands, signature.operands, strict=True)
        )
