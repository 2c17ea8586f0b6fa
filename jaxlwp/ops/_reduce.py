"""Reductions over dimensions, and picking one element along a dimension (losses).

They start a layer that later operators on the same operand join, so that a softmax or a
normalisation is one layer with one config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlwp.mesh import all_reduce, all_reduce_max, all_reduce_min
from jaxlwp.ops._rule import (
    Fill,
    Labels,
    Local,
    Rule,
    Signature,
    anonymous,
    bind_lowering,
    elementwise_flops,
)
from jaxlwp.program import Equation

OUTER_SUM = 32
"""Elements along outer dimensions from which on they are added up in a sum of their own."""


def _signature(fill: Fill, split_reduced: bool) -> Any:
    def signature(eqn: Equation) -> Signature | None:
        axes = eqn.params["axes"]
        names: list[str | None] = list(anonymous(len(eqn.operand_values[0].shape)))
        result: Labels = tuple(n for i, n in enumerate(names) if i not in axes)
        if not split_reduced:
            names = [None if i in axes else n for i, n in enumerate(names)]
        return Signature(role="reduce", operands=(tuple(names),), results=(result,), fill=fill)

    return signature


def _lower_sum(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """A sum over dimensions on both sides of one that stays is two sums, the outer one first.

    Group normalisation adds up height, width and the channels of a group. XLA for GPUs would add
    up those few channels first, and write what is nearly as large as the operand, in float32. The
    barrier keeps XLA from making one sum of two.
    """
    shape, axes = operands[0].shape, set(eqn.params["axes"])
    kept = [d for d, size in enumerate(shape) if d not in axes and size > 1]
    inner = {d for d in axes if kept and d > kept[-1]}
    first = math.prod(shape[d] for d in axes - inner)
    if first < OUTER_SUM or math.prod(shape[d] for d in inner) < 2:
        return eqn.bind(*operands)
    outer = tuple(sorted(axes - inner))
    (partial,) = eqn.bind(*operands, axes=outer)
    left = [d for d in range(len(shape)) if d not in outer]
    inner_axes = tuple(n for n, d in enumerate(left) if d in inner)
    return eqn.bind(lax.optimization_barrier(partial), axes=inner_axes)


def _lower_extremum(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """Maximum or minimum over a split dimension, differentiated as JAX does: ties share equally."""
    if not local.reduced_axes:
        return eqn.bind(*operands)
    over = all_reduce_max if eqn.name == "reduce_max" else all_reduce_min
    axes, mesh_axes = eqn.params["axes"], local.reduced_axes

    @jax.custom_jvp
    def extremum(x: Any) -> Any:
        return over(eqn.bind(x)[0], mesh_axes)

    @extremum.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        y = extremum(*primals)
        chosen = (primals[0] == jnp.expand_dims(y, axes)).astype(y.dtype)
        count = all_reduce(jnp.sum(chosen, axes), mesh_axes)
        return y, all_reduce(jnp.sum(tangents[0] * chosen, axes), mesh_axes) / count

    return (extremum(operands[0]),)


def _reduce_flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    return elementwise_flops(eqn, results, operands)


def _take_signature(eqn: Equation) -> Signature | None:
    """`take_along_axis` and the like: indexed dimensions cannot be split, all others can."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices = (value.shape for value in eqn.operand_values)
    sizes = eqn.params["slice_sizes"]
    names = anonymous(len(operand))
    operand_labels: list[str | None] = [None] * len(operand)
    index_labels: list[str | None] = [None] * len(indices)
    result_labels: list[str | None] = [None] * len(eqn.result_values[0].shape)
    for a, b in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        operand_labels[a] = index_labels[b] = names[a]
    collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [d for d in range(len(operand)) if d not in collapsed]
    for dim, offset in zip(kept, numbers.offset_dims, strict=True):
        if sizes[dim] == operand[dim] and dim not in numbers.start_index_map:
            operand_labels[dim] = result_labels[offset] = names[dim]
    free = [d for d in range(len(result_labels)) if d not in numbers.offset_dims]
    # The result's other dimensions are those of the indices, the index vector left out.
    for dim, position in zip(range(len(indices) - 1), free, strict=True):
        result_labels[position] = index_labels[dim]
    return Signature(
        role="reduce",
        operands=(tuple(operand_labels), tuple(index_labels)),
        results=(tuple(result_labels),),
    )


def _lower_take(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    numbers = eqn.params["dimension_numbers"]
    whole = eqn.operand_values[0].shape
    sizes = tuple(
        block if size == full and dim not in numbers.start_index_map else size
        for dim, (size, full, block) in enumerate(
            zip(eqn.params["slice_sizes"], whole, operands[0].shape, strict=True)
        )
    )
    return eqn.bind(*operands, slice_sizes=sizes)


def _reduction(fill: Fill, split_reduced: bool = True, **kwargs: Any) -> Rule:
    return Rule(
        kind="reduce",
        signature=_signature(fill, split_reduced),
        lower=kwargs.get("lower", bind_lowering),
        flops=_reduce_flops,
        combines=kwargs.get("combines", False),
    )


RULES = {
    "reduce_sum": _reduction("zero", lower=_lower_sum),
    "reduce_max": _reduction("lowest", lower=_lower_extremum, combines=True),
    "reduce_min": _reduction("highest", lower=_lower_extremum, combines=True),
    "reduce_prod": _reduction(None, split_reduced=False),
    "reduce_and": _reduction(None, split_reduced=False),
    "reduce_or": _reduction(None, split_reduced=False),
    "argmax": _reduction(None, split_reduced=False),
    "argmin": _reduction(None, split_reduced=False),
    "gather": Rule(kind="take", signature=_take_signature, lower=_lower_take),
}
