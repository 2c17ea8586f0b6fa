"""The program of one device as data: its steps in order, every collective among them.

`build` turns a graph and one config per layer into steps: operators on blocks, moves from one
layout to another, halo exchanges, sums of partial results, padding. `_lower` carries the steps out,
`_collectives` reads off what they communicate. What is priced is what runs, since it is the same
list.

*Nothing is done twice.* A step is known by what it does and by the blocks that it reads; one that
is there already is not added again. So a tensor that several layers read in one layout is brought
into it once, operators that read one tensor through one window share one halo exchange, and work
that is evaluated where it is read (`Draft`, "lazy") is evaluated once for all who read it alike.

*What differs only in its gradient.* A reader that is active over an axis over which its operand is
not split returns a partial gradient on each device, so its block is *varying* over that axis. Two
readers that differ in this alone receive the same data, whose gradients come back on different
ways. `_received_once` lets the second take what the first has received (`Again`); only its
transpose is its own. Without that it would be for the compiler to find out.

*Checkpoints.* What is made inside a call of `jax.checkpoint` is not there after it, except for what
others read (`Region`).
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxlwp.graph import ComputationGraph, pull, whole
from jaxlwp.lower._halo import Halo, Neighbour, cut, neighbours, plan_halo
from jaxlwp.ops import RULES, Labels, Signature, rule_of
from jaxlwp.program import Border, Checkpoint, Equation, Value
from jaxlwp.space import (
    Config,
    Layout,
    Move,
    degree,
    even_layout,
    layout_axes,
    local_shape,
    plan_moves,
)

AxisSizes = tuple[tuple[str, int], ...]
"""Names and sizes of the mesh axes."""


@dataclass(frozen=True, eq=False)
class Block:
    """What one device holds of a value; each is made by one step, or given.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      varying: mesh axes over which devices use different ones, or use one differently.
    """

    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset[str]


# --- what a step does -----------------------------------------------------------------------------


class Op:
    """What a step does; equal ones of equal operands make equal results."""

    @property
    def plain(self) -> Op:
        """The same, as regards data: it may differ in the axes over which results are varying."""
        return self


@dataclass(frozen=True)
class Change(Op):
    """One move of a change of layout.

    Attributes:
      move: the move.
      before: layout before.
      shape: global shape.
      axes: the mesh axes.
    """

    move: Move
    before: Layout
    shape: tuple[int, ...]
    axes: AxisSizes

    @property
    def plain(self) -> Op:
        """See `Op`."""
        return replace(self, move=replace(self.move, varying=False))


@dataclass(frozen=True)
class Fill(Op):
    """Replaces padding: by a number, or by the second operand (a scalar)."""

    shape: tuple[int, ...]
    layout: Layout
    axes: AxisSizes
    value: Any


@dataclass(frozen=True)
class Spread(Op):
    """Broadcasts a block to a shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut(Op):
    """Cuts a block in three, along a dimension: what is sent, what is not, what is sent."""

    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Receive(Op):
    """Receives rows of another device along a dimension, in a ring or not."""

    dim: int
    axes: tuple[str, ...]
    parts: int
    piece: Neighbour
    ring: bool


@dataclass(frozen=True)
class Assemble(Op):
    """Puts received rows and one's own block together, and cuts out what the operator reads.

    Its operands are the pieces, which begin at the rows `starts`, and what fills the padding unless
    `value` does.
    """

    dim: int
    axes: tuple[str, ...]
    halo: Halo
    starts: tuple[int, ...]
    value: Any


@dataclass(frozen=True)
class Extend(Op):
    """Puts an array's border around it, along a dimension that is not split."""

    dim: int
    border: Border


@dataclass(frozen=True)
class Dilate(Op):
    """Puts zeros between rows, and around them, as each device needs them."""

    dim: int
    axes: tuple[str, ...]
    halo: Halo


@dataclass(frozen=True)
class AddUp(Op):
    """Adds up partial results."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Operate(Op):
    """Evaluates an operator on blocks.

    Attributes:
      position: of its equation in the program.
      layouts: of the results.
      haloed: see `Local`; by position of the dimension in the first operand.
      reduced_axes: see `Local`.
      varying: see `Local`.
      axes: the mesh axes.
      eqn: the equation.
      names: labels of the first operand.
    """

    position: int
    layouts: tuple[Layout, ...]
    haloed: tuple[tuple[int, tuple[int, int, int]], ...]
    reduced_axes: tuple[str, ...]
    varying: tuple[str, ...]
    axes: AxisSizes
    eqn: Equation = field(compare=False, repr=False)
    names: Labels = field(compare=False)

    @property
    def combines(self) -> bool:
        """Its lowering combines partial results over the mesh itself."""
        rule = RULES.get(self.eqn.name)
        return bool(self.reduced_axes) and rule is not None and rule.combines

    @property
    def plain(self) -> Op:
        """See `Op`."""
        split = frozenset(axis for layout in self.layouts for axis in layout_axes(layout))
        needed = split.union(self.reduced_axes)
        return replace(self, varying=tuple(axis for axis in self.varying if axis in needed))


@dataclass(frozen=True)
class Again(Op):
    """Takes what another step has received (the second operand) as if it had done `op` itself."""

    op: Op

    @property
    def plain(self) -> Op:
        """See `Op`."""
        return self.op.plain


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    Attributes:
      op: what it does.
      operands: the blocks that it reads.
      results: the blocks that it makes.
      layer: index of the layer for which it is done, the first one that wants it; None for the
        function's outputs.
    """

    op: Op
    operands: tuple[Block, ...]
    results: tuple[Block, ...]
    layer: int | None


@dataclass(frozen=True, eq=False)
class Region:
    """The steps of one call of `jax.checkpoint`, and those of its results that others read."""

    call: Checkpoint
    items: tuple[Step | Region, ...]
    kept: tuple[Block, ...]


Items = Sequence["Step | Region"]


def every_step(items: Items) -> Iterator[Step]:
    """All steps in order, those in regions too."""
    for item in items:
        if isinstance(item, Region):
            yield from every_step(item.items)
        else:
            yield item


@dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """What one device evaluates.

    Attributes:
      inputs: blocks that are given, the function's arguments.
      constants: blocks that are known, and their values.
      items: the steps.
      outputs: the results.
      values: block -> index of the value of the graph's program that it is made for, for the
        results of operators that belong to a layer.
    """

    inputs: tuple[Block, ...]
    constants: dict[Block, Any]
    items: tuple[Step | Region, ...]
    outputs: tuple[Block, ...]
    values: dict[Block, int]


# --- building -------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A value on one device: its block, varying over exactly the axes of its layout."""

    block: Block
    layout: Layout


Made = ChainMap[int, Placed]
"""Values that are there."""

Read = ChainMap[tuple[int, Layout, frozenset[str]], Block]
"""Blocks as readers want them: by value, layout, and axes over which the reader is active."""

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
            items=_received_once(self.items),
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
    ) -> Block:
        """A block brought from one layout to another."""
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
            (block,) = self.step(Change(move, before, shape, self.axes), (block,), (after,))
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
        key = value, layout, active
        if key not in self.read:
            self.read[key] = self.fetch(*key)
        return self.read[key]

    def fetch(self, value: int, layout: Layout, active: frozenset[str]) -> Block:
        info = self.graph.program.values[value]
        if value in self.made:
            block, source = self.made[value]
            return self.changed(block, info.shape, source, layout, active)
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

    def apply(
        self,
        position: int,
        signature: Signature,
        axes_of: Callable[[str | None], tuple[str, ...]],
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
        fills = [_fill(signature, info.dtype) for info in eqn.operand_values]
        if signature.fill == "value":
            fills = [blocks[1]] * len(blocks)
        if signature.fill is not None:
            blocks = [
                self.filled(block, info.shape, layout, fill)
                for block, info, layout, fill in zip(
                    blocks, eqn.operand_values, operands, fills, strict=True
                )
            ]
        elif _elementwise(eqn):
            blocks = self.spread(eqn, signature, results[0], blocks)
        haloed = {}
        for name in sorted(signature.windows):
            if axes_of(name):
                dim = signature.operands[0].index(name)
                blocks[0], haloed[dim] = self.with_halo(
                    blocks[0], eqn, signature, name, axes_of(name), fills[0]
                )
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
            or (not _elementwise(eqn) and self.pads(eqn, signature, labels, info, layout))
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
        self,
        block: Block,
        eqn: Equation,
        signature: Signature,
        name: str,
        axes: tuple[str, ...],
        fill: Any,
    ) -> tuple[Block, tuple[int, int, int]]:
        """The rows that the operator reads, and what padding and base dilation they still need."""
        dim = signature.operands[0].index(name)
        out = signature.results[0].index(name)
        size, out_size = eqn.operand_values[0].shape[dim], eqn.result_values[0].shape[out]
        halo = plan_halo(size, out_size, signature.windows[name], degree(axes, self.axis_sizes))
        pieces = self.with_neighbours(block, dim, axes, halo)
        scalar = (fill,) if isinstance(fill, Block) else ()
        starts = tuple(start for start, _ in pieces)
        op = Assemble(dim, axes, halo, starts, None if scalar else fill)
        varying = block.varying.union(axes, *(x.varying for x in scalar))
        (block,) = self.step(
            op,
            (*(piece for _, piece in pieces), *scalar),
            (Block(_with(block.shape, dim, halo.rows), block.dtype, varying),),
        )
        if halo.left_over is not None:
            return block, halo.left_over
        (block,) = self.step(
            Dilate(dim, axes, halo),
            (block,),
            (replace(block, shape=_with(block.shape, dim, halo.extent)),),
        )
        return block, (0, 0, 1)

    def with_neighbours(
        self, block: Block, dim: int, axes: tuple[str, ...], halo: Halo
    ) -> list[tuple[int, Block]]:
        """One's own block, in pieces, and what is received, in order; with their first rows."""

        def piece(rows: int) -> Block:
            return replace(block, shape=_with(block.shape, dim, rows))

        sizes = cut(halo)
        own = [block]
        if len(sizes) > 1:
            own = list(self.step(Cut(dim, sizes), (block,), [piece(rows) for rows in sizes]))
        offsets = itertools.accumulate(sizes, initial=0)
        pieces = list(zip(offsets, own, strict=False))
        for each in neighbours(halo):
            op = Receive(dim, axes, len(halo.starts), each, halo.received.ring)
            (received,) = self.step(op, (own[each.piece],), (piece(each.rows),))
            pieces.append((each.start, received))
        return sorted(pieces, key=lambda piece: piece[0])

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
        result = []
        for operand, labels, block in zip(eqn.operands, signature.operands, blocks, strict=True):
            if self.broadcasts(operand, labels, signature.results[0], shape, layout):
                (block,) = self.step(Spread(local), (block,), (replace(block, shape=local),))
                block = self.filled(block, shape, layout, 0)
            result.append(block)
        return result

    def pads(
        self, eqn: Equation, signature: Signature, labels: Labels, info: Value, layout: Layout
    ) -> bool:
        """Whether an operator broadcasts an operand with a cotangent into a result's padding."""
        return any(
            self.broadcasts(operand, operand_labels, labels, info.shape, layout)
            for operand, operand_labels in zip(eqn.operands, signature.operands, strict=True)
        )

    def broadcasts(
        self,
        operand: int,
        operand_labels: Labels,
        labels: Labels,
        shape: Sequence[int],
        layout: Layout,
    ) -> bool:
        """Whether an operand with a cotangent is broadcast over a result's padding."""
        if operand not in self.graph.gradients:
            return False
        uneven = {
            label
            for label, size, axes in zip(labels, shape, layout, strict=True)
            if size % degree(axes, self.axis_sizes)
        }
        return not uneven <= set(operand_labels)


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _elementwise(eqn: Equation) -> bool:
    rule = RULES.get(eqn.name)
    return rule is not None and rule.kind == "elementwise" and rule_of(eqn) is not None


def _fill(signature: Signature, dtype: Any) -> Any:
    """The neutral element that padding holds."""
    if signature.fill in (None, "zero", "value"):
        return 0
    lowest = signature.fill == "lowest"
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return int(info.min if lowest else info.max)
    return -np.inf if lowest else np.inf


# --- receiving once -------------------------------------------------------------------------------


def receives(op: Op) -> bool:
    """Whether a step's data come from other devices, forward."""
    if isinstance(op, Change):
        return op.move.kind in ("all_to_all", "all_gather", "permute")
    return isinstance(op, (Receive, AddUp))


def _received_once(items: Items) -> tuple[Step | Region, ...]:
    """The steps, those that receive the same data as an earlier one taking what that received."""
    groups = _groups(items)
    if all(len(group) == 1 for group in groups.values()):
        return tuple(items)
    return _Sharing(items, groups).rewritten(items)


def _groups(items: Items) -> dict[Step, list[Step]]:
    """Steps that receive, each with those that receive the same while it is there."""
    groups: dict[Step, list[Step]] = {}
    numbers: dict[Any, int] = {}
    data: dict[Block, Any] = {}  # equal for blocks that hold the same data

    def number(key: Any) -> int:
        return numbers.setdefault(key, len(numbers))

    def of(block: Block) -> Any:
        return data.get(block, block)

    def visit(items: Items, seen: ChainMap[int, Step]) -> None:
        for item in items:
            if isinstance(item, Region):
                visit(item.items, seen.new_child())
                continue
            if isinstance(item.op, Change) and item.op.move.kind == "cast":
                data[item.results[0]] = of(item.operands[0])
                continue
            key = number((item.op.plain, tuple(map(of, item.operands))))
            for n, block in enumerate(item.results):
                data[block] = number((key, n))
            if receives(item.op):
                first = seen.setdefault(key, item)
                groups.setdefault(first, []).append(item)

    visit(items, ChainMap())
    return groups


class _Sharing:
    """Puts one step that receives before each group of steps that receive the same."""

    def __init__(self, items: Items, groups: Mapping[Step, Sequence[Step]]) -> None:
        self.producers = {b: step for step in every_step(items) for b in step.results}
        self.several = {
            step: group for group in groups.values() if len(group) > 1 for step in group
        }
        self.received: dict[Step, Block] = {}  # by the first of a group
        self.bare: dict[Block, Block] = {}

    def rewritten(self, items: Items) -> tuple[Step | Region, ...]:
        result: list[Step | Region] = []
        for item in items:
            if isinstance(item, Region):
                result.append(self.region(item))
            elif item in self.several:
                result += self.shared(item)
            else:
                result.append(item)
        return tuple(result)

    def region(self, region: Region) -> Region:
        outside = dict(self.bare)
        items = self.rewritten(region.items)
        # What was made inside is not there any more, but for the blocks that are kept.
        self.bare = outside
        for step in every_step(region.items):
            for block in step.results:
                self.producers.pop(block)
        return replace(region, items=items)

    def shared(self, step: Step) -> list[Step]:
        """A step of a group, and what has to come before it."""
        added: list[Step] = []
        first = self.several[step][0]
        if first not in self.received:
            operand = self.untyped(step.operands[0], added)
            varying = operand.varying
            axes = _gathered(step.op)
            block = replace(step.results[0], varying=varying.difference(axes))
            added.append(Step(step.op.plain, (operand,), (block,), step.layer))
            self.received[first] = block
        block = self.received[first]
        if not block.varying <= step.results[0].varying:
            return [*added, step]
        again = Step(Again(step.op), (*step.operands, block), step.results, step.layer)
        self.producers[step.results[0]] = again
        return [*added, again]

    def untyped(self, block: Block, added: list[Step]) -> Block:
        """A block of the same data that is varying over no more axes than it must be."""
        if block not in self.bare:
            self.bare[block] = self._untyped(block, added)
        return self.bare[block]

    def _untyped(self, block: Block, added: list[Step]) -> Block:
        step = self.producers.get(block)
        if step is None:
            return block
        if isinstance(step.op, Again):
            return step.operands[1]
        if isinstance(step.op, Change) and step.op.move.kind == "cast":
            return self.untyped(step.operands[0], added)
        if receives(step.op):
            return block
        plain = step.op.plain
        if isinstance(plain, Operate) and block.varying <= frozenset(plain.varying):
            return block  # of a layer: its results vary over the axes of its layout alone
        operands = tuple(self.untyped(operand, added) for operand in step.operands)
        if operands == step.operands and plain == step.op:
            return block
        varying = frozenset[str]().union(*(operand.varying for operand in operands))
        if isinstance(plain, Operate):
            varying |= frozenset(plain.varying)
        elif isinstance(plain, Change):
            varying |= frozenset(plain.move.axes)
        results = tuple(replace(result, varying=varying) for result in step.results)
        added.append(Step(plain, operands, results, step.layer))
        self.bare.update(zip(step.results, results, strict=True))
        return results[step.results.index(block)]


def _gathered(op: Op) -> tuple[str, ...]:
    """Mesh axes over which the result is the same on all devices, though the operand is not."""
    if isinstance(op, AddUp):
        return op.axes
    return op.move.axes if isinstance(op, Change) and op.move.kind == "all_gather" else ()
