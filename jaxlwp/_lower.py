"""The lowered function: the traced program, evaluated on one device's blocks.

The whole program runs inside one `jax.shard_map` over all mesh axes, so every collective in it is
one that jaxlwp put there: a change of layout (`_reshard`), a halo exchange (`_halo`), or a sum of
partial results. `shard_map` tracks over which axes each value varies, and automatic
differentiation turns every collective into its transpose, so users keep their own
`jax.value_and_grad`.

Blocks of an unevenly split dimension end in padding. Wherever elements mix (contractions, windows,
reductions, broadcast parameters) padding is replaced by the neutral element on the way in, and by
zero on the way out, which stops whatever it holds, NaN included, in both directions.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlwp._config import Config, Layout
from jaxlwp._graph import ComputationGraph
from jaxlwp._group import pull, whole
from jaxlwp._halo import dilate, exchange, plan_halo
from jaxlwp._layout import degree, even_layout, layout_axes, local_shape
from jaxlwp._program import Checkpoint, Equation
from jaxlwp._reshard import reshard
from jaxlwp.ops import RULES, Labels, Local, Signature, rule_of

LAYER_SCOPE = "jaxlwp.layer"
"""Name scope of a layer's operators in the lowered function, before the layer's index."""


@dataclass(frozen=True)
class Placed:
    """A value on one device: its block, varying over exactly the axes of its layout."""

    block: Any
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program bound to one config per layer.

    Attributes:
      graph: the computation graph.
      configs: the config of each layer.
      axis_sizes: devices along each mesh axis.
    """

    graph: ComputationGraph
    configs: tuple[Config, ...]
    axis_sizes: dict[str, int]

    def input_layouts(self) -> tuple[Layout, ...]:
        """How each argument is stored: as its first reader wants it, evenly split."""
        return tuple(self.argument_layout(value) for value in self.graph.program.inputs)

    def argument_layout(self, value: int) -> Layout:
        """Layout in which an argument of the function is stored."""
        return stored_layout(self.graph, self.configs, value, self.axis_sizes)

    def output_layouts(self) -> tuple[Layout, ...]:
        """Layout of each output, evenly split."""
        return tuple(self._output_layout(value) for value in self.graph.program.outputs)

    def _output_layout(self, value: int) -> Layout:
        shape = self.graph.program.values[value].shape
        if value in self.graph.homes:
            layer, labels = self.graph.homes[value]
            return even_layout(shape, self.configs[layer].layout(labels), self.axis_sizes)
        if value in self.graph.owners:
            return self.argument_layout(value)
        return ((),) * len(shape)

    def __call__(self, *blocks: Any) -> tuple[Any, ...]:
        """Evaluate on blocks of the arguments, inside `jax.shard_map`; returns output blocks."""
        run = Run(self, blocks)
        run.evaluate(range(len(self.graph.program.equations)), depth=0)
        outputs = zip(self.graph.program.outputs, self.output_layouts(), strict=True)
        return tuple(run.output(value, layout) for value, layout in outputs)


def stored_layout(
    graph: ComputationGraph,
    configs: Sequence[Config],
    value: int,
    axis_sizes: dict[str, int],
) -> Layout:
    """Layout in which an argument is stored: its owner's, as far as it splits evenly."""
    shape = graph.program.values[value].shape
    if value not in graph.owners:
        return ((),) * len(shape)
    layer, labels = graph.owners[value]
    return even_layout(shape, configs[layer].layout(labels), axis_sizes)


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


class Run:
    """One evaluation: the values made so far.

    `blocks` are those of the program's arguments; None for a run that evaluates some equations
    only, whose operands are put into `cache`.
    """

    def __init__(self, lowered: Lowered, blocks: Sequence[Any] | None) -> None:
        self.lowered, self.graph = lowered, lowered.graph
        self.axis_sizes = lowered.axis_sizes
        self.program = lowered.graph.program
        self.made: dict[int, Placed] = {}
        self.cache: dict[Any, Any] = {}
        self.memo: dict[Any, tuple[tuple[Any, ...], Any]] = {}
        if blocks is not None:
            for value, block in zip(self.program.inputs, blocks, strict=True):
                self.made[value] = Placed(block, lowered.argument_layout(value))
        for value, constant in self.program.constants.items():
            layout: Layout = ((),) * len(self.program.values[value].shape)
            self.made[value] = Placed(constant, layout)

    def evaluate(self, positions: Sequence[int], depth: int) -> None:
        """Evaluate equations in order.

        Args:
          positions: of the equations in the program.
          depth: how many calls of `jax.checkpoint` around them are dealt with already.
        """
        equations = self.program.equations

        def call_of(position: int) -> Checkpoint | None:
            calls = equations[position].checkpoints
            return calls[depth] if len(calls) > depth else None

        for call, group in itertools.groupby(positions, call_of):
            if call is not None:
                self.checkpoint(call, tuple(group), depth + 1)
                continue
            for position in group:
                if position in self.graph.assigned:
                    layer, signature = self.graph.assigned[position]
                    self.execute(equations[position], signature, layer)

    def checkpoint(self, call: Checkpoint, positions: Sequence[int], depth: int) -> None:
        """Evaluate the equations of a `jax.checkpoint`: only what others read is kept."""
        kept = read_elsewhere(self.graph, positions)

        def body() -> list[Any]:
            inner = copy.copy(self)
            inner.made, inner.cache = dict(self.made), dict(self.cache)
            inner.memo = dict(self.memo)
            inner.evaluate(positions, depth)
            return [inner.made[value].block for value in kept]

        body = jax.checkpoint(body, policy=call.policy, prevent_cse=call.prevent_cse)
        for value, block in zip(kept, body(), strict=True):
            layer, labels = self.graph.homes[value]
            self.made[value] = Placed(block, self.lowered.configs[layer].layout(labels))

    def execute(self, eqn: Equation, signature: Signature, layer: int) -> None:
        """Evaluate an equation that belongs to a layer."""
        config = self.lowered.configs[layer]
        with jax.named_scope(f"{LAYER_SCOPE}{layer}"):
            results = self.apply(eqn, signature, signature.names, layer)
        for value, block, labels in zip(eqn.results, results, signature.results, strict=True):
            self.made[value] = Placed(block, config.layout(labels))

    def output(self, value: int, layout: Layout) -> Any:
        if value not in self.made:
            return self.get(value, (None,) * len(layout), frozenset(), layer=0)
        return self.moved(value, layout, layout_axes(layout))

    def moved(self, value: int, layout: Layout, active: frozenset[str]) -> Any:
        """Block of a made value in another layout; readers that want the same share it."""
        key = (value, layout, active)
        if key not in self.cache:
            self.cache[key] = self.move(*key)
        return self.cache[key]

    def move(self, value: int, layout: Layout, active: frozenset[str]) -> Any:
        placed = self.made[value]
        block = placed.block
        if value in self.program.constants and (active or layout_axes(layout)):
            block = jnp.asarray(block)
        return reshard(
            block,
            shape=self.program.values[value].shape,
            source=placed.layout,
            target=layout,
            active=active,
            axis_sizes=self.axis_sizes,
        )

    def get(self, value: int, labels: Labels, active: frozenset[str], layer: int) -> Any:
        """Block of a value as a layer wants it; lazy values are evaluated here.

        Args:
          value: index of the value.
          labels: the layer's names of its dimensions.
          active: dimension names over which the layer's work is split.
          layer: index of the layer.
        """
        key = (value, labels, active, layer)
        if key not in self.cache:
            self.cache[key] = self.fetch(*key)
        return self.cache[key]

    def fetch(self, value: int, labels: Labels, active: frozenset[str], layer: int) -> Any:
        config = self.lowered.configs[layer] if self.lowered.configs else Config()
        layout = config.layout(labels)
        axes = frozenset(axis for name in active for axis in config.axes(name))
        if value in self.made:
            return self.moved(value, layout, axes)
        eqn = self.program.equations[self.graph.lazy[value]]
        position = eqn.results.index(value)
        signature = pull(eqn, position, labels)
        if signature is not None:
            return self.apply(eqn, signature, active, layer)[position]
        block = self.apply(eqn, whole(eqn), frozenset(), layer)[position]
        return reshard(
            block,
            shape=eqn.result_values[position].shape,
            source=((),) * len(labels),
            target=layout,
            active=axes,
            axis_sizes=self.axis_sizes,
        )

    def apply(
        self, eqn: Equation, signature: Signature, active: frozenset[str], layer: int
    ) -> tuple[Any, ...]:
        """Evaluate one equation on blocks: operands in place, halo, operator, sum, mask."""
        config = self.lowered.configs[layer] if self.lowered.configs else Config()
        blocks = [
            self.get(operand, labels, active, layer)
            for operand, labels in zip(eqn.operands, signature.operands, strict=True)
        ]
        fills: list[Any] = [0]
        if signature.fill is not None:
            fills = [
                blocks[1] if signature.fill == "value" else _fill(signature, value.dtype)
                for value in eqn.operand_values
            ]
            blocks = [
                self.once(self.mask, block, value.shape, config.layout(labels), fill)
                for block, value, labels, fill in zip(
                    blocks, eqn.operand_values, signature.operands, fills, strict=True
                )
            ]
        elif _elementwise(eqn):
            blocks = self.spread(eqn, signature, config, blocks)
        haloed = {}
        for name in sorted(signature.windows):
            if config.axes(name):
                blocks[0], haloed[name] = self.with_halo(
                    blocks[0], eqn, signature, name, config, fills[0]
                )
        reduced_axes = tuple(
            axis for axis in self.axis_sizes for n in signature.reduced if axis in config.axes(n)
        )
        varying = tuple(
            axis for axis in self.axis_sizes for name in active if axis in config.axes(name)
        )
        local = self.local(eqn, signature, config)
        local = dataclasses.replace(
            local, haloed=haloed, reduced_axes=reduced_axes, varying=varying
        )
        found = rule_of(eqn)
        results = found[0].lower(eqn, blocks, local) if found else eqn.bind(*blocks)
        if reduced_axes and not (found and found[0].combines):
            results = tuple(lax.psum(block, reduced_axes) for block in results)
        return self.masked_results(eqn, signature, config, results)

    def local(self, eqn: Equation, signature: Signature, config: Config) -> Local:
        shapes, offsets, real = [], [], []
        for labels, value in zip(signature.results, eqn.result_values, strict=True):
            layout = config.layout(labels)
            shape = local_shape(value.shape, layout, self.axis_sizes)
            start = tuple(
                lax.axis_index(axes) * size if axes else 0
                for axes, size in zip(layout, shape, strict=True)
            )
            shapes.append(shape)
            offsets.append(start)
            real.append(
                tuple(
                    jnp.clip(whole - first, 0, size)
                    if whole % degree(axes, self.axis_sizes)
                    else None
                    for whole, axes, first, size in zip(
                        value.shape, layout, start, shape, strict=True
                    )
                )
            )
        return Local(
            names=signature.operands[0] if signature.operands else (),
            result_shapes=tuple(shapes),
            offsets=tuple(offsets),
            real=tuple(real),
        )

    def with_halo(
        self,
        block: Any,
        eqn: Equation,
        signature: Signature,
        name: str,
        config: Config,
        fill: Any,
    ) -> tuple[Any, tuple[int, int, int]]:
        """The rows that the operator reads, and what padding and base dilation they still need."""
        dim = signature.operands[0].index(name)
        out = signature.results[0].index(name)
        size, out_size = eqn.operand_values[0].shape[dim], eqn.result_values[0].shape[out]
        axes = config.axes(name)
        halo = plan_halo(size, out_size, signature.windows[name], degree(axes, self.axis_sizes))
        block = self.once(exchange, block, dim, axes, halo, size, fill, self.once)
        if halo.left_over is None:
            return dilate(block, dim, axes, halo), (0, 0, 1)
        return block, halo.left_over

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's value, made once for the same arguments.

        Several convolutions that read one tensor share the rows they receive. The compiler would
        merge the exchanges of the forward pass, but not their transposes.
        """
        key = (
            function,
            *(id(x) if isinstance(x, (jax.Array, np.ndarray)) else x for x in arguments),
        )
        if key not in self.memo:  # the arguments are kept too: their ids stay theirs
            self.memo[key] = arguments, function(*arguments)
        return self.memo[key][1]

    def mask(self, block: Any, shape: Sequence[int], layout: Layout, fill: Any) -> Any:
        """The block with `fill` in its padding."""
        for dim, (size, axes) in enumerate(zip(shape, layout, strict=True)):
            if size % degree(axes, self.axis_sizes):
                start = lax.axis_index(axes) * block.shape[dim]
                position = lax.broadcasted_iota(jnp.int32, block.shape, dim) + start
                block = jnp.where(position < size, block, jnp.asarray(fill, block.dtype))
        return block

    def spread(
        self, eqn: Equation, signature: Signature, config: Config, blocks: Sequence[Any]
    ) -> list[Any]:
        """Make operands that an elementwise operator broadcasts into padding full, padding zeroed.

        Their cotangents are summed over the padding, where the other operand may hold what turns
        even a zero cotangent into NaN (log 0, 1 / 0). Zeroing the result would be too late.
        """
        labels, shape = signature.results[0], eqn.result_values[0].shape
        layout = config.layout(labels)
        return [
            self.mask(
                jnp.broadcast_to(block, local_shape(shape, layout, self.axis_sizes)),
                shape,
                layout,
                0,
            )
            if self.broadcasts(operand, operand_labels, labels, shape, layout)
            else block
            for operand, operand_labels, block in zip(
                eqn.operands, signature.operands, blocks, strict=True
            )
        ]

    def broadcasts(
        self,
        operand: int,
        operand_labels: Labels,
        labels: Labels,
        shape: Sequence[int],
        layout: Layout,
    ) -> bool:
        """Whether an operand with a cotangent is broadcast over a result's padding."""
        uneven = {
            label
            for label, size, axes in zip(labels, shape, layout, strict=True)
            if size % degree(axes, self.axis_sizes)
        }
        return operand in self.graph.gradients and not uneven <= set(operand_labels)

    def masked_results(
        self, eqn: Equation, signature: Signature, config: Config, results: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Zero the padding where elements have mixed or a parameter was broadcast into it."""
        masked = []
        for block, value, labels in zip(results, eqn.result_values, signature.results, strict=True):
            layout = config.layout(labels)
            broadcast = not _elementwise(eqn) and any(
                self.broadcasts(operand, operand_labels, labels, value.shape, layout)
                for operand, operand_labels in zip(eqn.operands, signature.operands, strict=True)
            )
            if signature.fill is not None or broadcast:
                block = self.mask(block, value.shape, layout, 0)
            masked.append(block)
        return tuple(masked)


def _elementwise(eqn: Equation) -> bool:
    rule = RULES.get(eqn.name)
    return rule is not None and rule.kind == "elementwise"


def _fill(signature: Signature, dtype: Any) -> Any:
    """The neutral element that padding holds."""
    if signature.fill in (None, "zero"):
        return 0
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if signature.fill == "lowest" else jnp.inf
    info: Any = np.iinfo(dtype)
    return info.min if signature.fill == "lowest" else info.max
