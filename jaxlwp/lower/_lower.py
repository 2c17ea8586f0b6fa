"""The lowered function: the steps of a device's program, carried out on its blocks.

The whole program runs inside one `jax.shard_map` over all mesh axes, so every collective in it is
one that jaxlwp put there (`_steps`): a change of layout (`_reshard`), a halo exchange (`_halo`), or
a sum of partial results. `shard_map` tracks over which axes each value varies, and automatic
differentiation turns every collective into its transpose, so users keep their own
`jax.value_and_grad`.

Blocks of an unevenly split dimension end in padding. Wherever elements mix (contractions, windows,
reductions, broadcast parameters) padding is replaced by the neutral element on the way in, and by
zero on the way out, which stops whatever it holds, NaN included, in both directions.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlwp.graph import ComputationGraph
from jaxlwp.lower._build import build, output_layout, stored_layout
from jaxlwp.lower._filters import turned
from jaxlwp.lower._halo import assemble, dilate, receive
from jaxlwp.lower._reshard import move_block
from jaxlwp.lower._steps import (
    AddUp,
    Again,
    Assemble,
    Block,
    Change,
    DeviceProgram,
    Dilate,
    Extend,
    Fill,
    Filter,
    Items,
    Op,
    Operate,
    Receive,
    Region,
    Slice,
    Spread,
    Step,
    Vary,
)
from jaxlwp.mesh import (
    all_reduce,
    all_reduce_together,
    device_index,
    put_together,
    taken_apart,
    vary,
)
from jaxlwp.ops import Local, evaluate_whole, rule_of
from jaxlwp.program import extend
from jaxlwp.space import Config, Layout, degree, local_shape

LAYER_SCOPE = "jaxlwp.layer"
"""Name scope of a layer's operators in the lowered function, before the layer's index."""


def layer_index(scope: str) -> int | None:
    """The layer of a plan that a scope of JAX names, the innermost; None if there is none."""
    layers = re.findall(rf"{re.escape(LAYER_SCOPE)}(\d+)", scope)
    return int(layers[-1]) if layers else None


Made = dict[Block, Any]
"""Blocks that are made so far, and their arrays."""

Evaluate = Callable[[Iterable[Step], Made], None]
"""`evaluate(steps, made)` carries out steps of one layer, adding to `made`."""


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

    @functools.cached_property
    def program(self) -> DeviceProgram:
        """What one device evaluates."""
        return build(self.graph, self.configs, self.axis_sizes)

    def input_layouts(self) -> tuple[Layout, ...]:
        """How each argument is stored: as its first reader wants it, evenly split."""
        values = self.graph.program.inputs
        return tuple(stored_layout(self.graph, self.configs, v, self.axis_sizes) for v in values)

    def output_layouts(self) -> tuple[Layout, ...]:
        """Layout of each output, evenly split."""
        values = self.graph.program.outputs
        return tuple(output_layout(self.graph, self.configs, v, self.axis_sizes) for v in values)

    def __call__(self, *blocks: Any) -> tuple[Any, ...]:
        """Evaluate on blocks of the arguments, inside `jax.shard_map`; returns output blocks."""
        return run(self.program, blocks)


def carry_out(steps: Iterable[Step], made: Made) -> None:
    """Carry out steps, adding to `made`."""
    for step in steps:
        blocks = [made[block] for block in step.operands]
        made.update(zip(step.results, results_of(step.op, blocks, step), strict=True))


def run(
    program: DeviceProgram, blocks: Sequence[Any], evaluate: Evaluate = carry_out
) -> tuple[Any, ...]:
    """Carry out the steps of a device's program, inside `jax.shard_map`.

    Args:
      program: the program.
      blocks: this device's blocks of the inputs.
      evaluate: carries out the steps of one layer that follow each other (`step_groups`).
    """
    made: Made = dict(program.constants)
    made.update(zip(program.inputs, blocks, strict=True))
    _run(program.items, made, evaluate)
    return tuple(made[block] for block in program.outputs)


def step_groups(items: Items) -> Iterator[tuple[int | None, Iterator[Any]]]:
    """Steps of one layer that follow each other, with its index; regions, with -1."""
    return itertools.groupby(items, lambda item: getattr(item, "layer", -1))


def _run(items: Items, made: Made, evaluate: Evaluate) -> None:
    for layer, group in step_groups(items):
        if layer is None:
            evaluate(group, made)
        elif layer == -1:
            for region in group:
                _run_region(region, made, evaluate)
        else:
            with jax.named_scope(f"{LAYER_SCOPE}{layer}"):
                evaluate(group, made)


def _run_region(region: Region, made: Made, evaluate: Evaluate) -> None:
    """Evaluate a call of `jax.checkpoint`: only what others read is kept."""

    def body() -> list[Any]:
        inner = dict(made)
        _run(region.items, inner, evaluate)
        return [inner[block] for block in region.kept]

    call = region.call
    body = jax.checkpoint(body, policy=call.policy, prevent_cse=call.prevent_cse)
    made.update(zip(region.kept, body(), strict=True))


# --- steps ----------------------------------------------------------------------------------------


def results_of(op: Op, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    """The results of one step."""
    return _CARRY_OUT[type(op)](op, blocks, step)


def _change(op: Change, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    x = jnp.asarray(blocks[0])  # a constant may be a plain number
    return (move_block(x, op.move, op.before, op.shape, dict(op.axes)),)


def _fill(op: Fill, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    block, axis_sizes = blocks[0], dict(op.axes)
    fill = jnp.asarray(blocks[1] if len(blocks) > 1 else op.value, block.dtype)
    for dim, (size, axes) in enumerate(zip(op.shape, op.layout, strict=True)):
        if size % degree(axes, axis_sizes):
            start = device_index(axes) * block.shape[dim]
            position = lax.broadcasted_iota(jnp.int32, block.shape, dim) + start
            block = jnp.where(position < size, block, fill)
    return (block,)


def _spread(op: Spread, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (jnp.broadcast_to(blocks[0], op.shape),)


def _slice(op: Slice, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (lax.slice_in_dim(blocks[0], op.start, op.stop, axis=op.dim),)


def _receive(op: Receive, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (receive(blocks[0], op.axes, op.parts, op.step, op.ring),)


def _assemble(op: Assemble, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    count = len(op.starts)
    fill = blocks[count] if len(blocks) > count else op.value
    pieces = list(zip(op.starts, blocks[:count], strict=True))
    return (assemble(pieces, op.dim, op.axes, op.halo, fill),)


def _extend(op: Extend, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (extend(blocks[0], op.dim, op.border),)


def _dilate(op: Dilate, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (dilate(blocks[0], op.dim, op.axes, op.halo),)


def _add_up(op: AddUp, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    if len(blocks) == 1:
        return (all_reduce(blocks[0], op.axes),)
    return all_reduce_together(blocks, op.axes)


def _vary(op: Vary, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    if len(blocks) == 1:  # taken apart, it would be a slice, whose transpose is padding
        return (vary(blocks[0].reshape(-1), op.axes).reshape(blocks[0].shape),)
    return taken_apart(vary(put_together(blocks), op.axes), blocks)


def _filter(op: Filter, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    return (turned(blocks[0], kept=op.kept),)


def _operate(op: Operate, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    found = rule_of(op.eqn)
    if found is None:
        return evaluate_whole(op.eqn, blocks)
    return found[0].lower(op.eqn.extended, blocks, _local(op))


def _local(op: Operate) -> Local:
    axis_sizes = dict(op.axes)
    shapes = tuple(
        local_shape(value.shape, layout, axis_sizes)
        for value, layout in zip(op.eqn.result_values, op.layouts, strict=True)
    )

    def places() -> tuple[tuple[tuple[Any, Any], ...], ...]:
        infos = zip(op.eqn.result_values, op.layouts, shapes, strict=True)
        return tuple(
            tuple(
                _place(whole, axes, size, axis_sizes)
                for whole, axes, size in zip(value.shape, layout, shape, strict=True)
            )
            for value, layout, shape in infos
        )

    return Local(
        names=tuple(str(dim) for dim in range(len(op.names))),
        result_shapes=shapes,
        places=places,
        haloed={str(dim): left_over for dim, left_over in op.haloed},
        varying=op.varying,
        reduced_axes=op.reduced_axes,
    )


def _place(
    whole: int, axes: tuple[str, ...], size: int, axis_sizes: dict[str, int]
) -> tuple[Any, Any]:
    """Where a block begins along a dimension, and how much of it is no padding (None: all)."""
    start = device_index(axes) * size
    uneven = whole % degree(axes, axis_sizes)
    return start, jnp.clip(whole - start, 0, size) if uneven else None


def _again(op: Again, blocks: Sequence[Any], step: Step) -> Sequence[Any]:
    """What another step has received, with the transpose of having received it anew."""
    x, received = blocks[0], lax.stop_gradient(blocks[1])
    given, other = step.operands[0], step.operands[1]
    missing = step.results[0].varying - other.varying
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return (vary(received, missing),)

    @jax.custom_vjp
    def again(x: Any, received: Any) -> Any:
        return vary(received, missing)

    def transposed(_: None, cotangent: Any) -> tuple[Any, Any]:
        zeros = vary(jnp.zeros(x.shape, x.dtype), given.varying)
        _, back = jax.vjp(lambda x: results_of(op.op, [x], step)[0], zeros)
        nothing = vary(jnp.zeros(received.shape, received.dtype), other.varying)
        return back(cotangent)[0], nothing

    again.defvjp(lambda x, received: (again(x, received), None), transposed)
    return (again(x, received),)


_CARRY_OUT: dict[type, Callable[[Any, Sequence[Any], Step], Sequence[Any]]] = {
    Change: _change,
    Fill: _fill,
    Spread: _spread,
    Slice: _slice,
    Receive: _receive,
    Assemble: _assemble,
    Extend: _extend,
    Dilate: _dilate,
    AddUp: _add_up,
    Vary: _vary,
    Filter: _filter,
    Operate: _operate,
    Again: _again,
}
