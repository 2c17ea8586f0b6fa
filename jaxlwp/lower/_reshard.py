"""Carries out the moves that `_layout.plan_moves` decides, on one device's block."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlwp.mesh import all_gather, all_to_all, device_index, permute, vary
from jaxlwp.space import Layout, Move, cdiv, degree


def move_block(
    x: Any, move: Move, before: Layout, shape: Sequence[int], axis_sizes: Mapping[str, int]
) -> Any:
    """Carry out one move on a block, inside `jax.shard_map`.

    Args:
      x: this device's block under the layout `before`.
      move: from `plan_moves`.
      before: layout before it.
      shape: global shape.
      axis_sizes: devices along each mesh axis.
    """
    if move.kind == "cast":
        return vary(x, move.axes)
    if move.kind == "slice":
        return take_block(x, move.dim, move.axes, degree(move.axes, axis_sizes))
    if move.kind == "permute":
        return permute(x, move.axes, _permutation(move, before, axis_sizes))
    if move.kind == "all_gather":
        x = all_gather(x, move.axes, move.dim, varying=move.varying)
    else:
        x = _pad_to_multiple(x, move.to_dim, degree(move.axes, axis_sizes))
        x = all_to_all(x, move.axes, split_dim=move.to_dim, concat_dim=move.dim)
    if not move.after[move.dim] and x.shape[move.dim] > shape[move.dim]:
        x = lax.slice_in_dim(x, 0, shape[move.dim], axis=move.dim)
    return x


def _pad_to_multiple(x: Any, dim: int, parts: int) -> Any:
    missing = cdiv(x.shape[dim], parts) * parts - x.shape[dim]
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, missing)
    return jnp.pad(x, widths)


def take_block(x: Any, dim: int, axes: tuple[str, ...], parts: int) -> Any:
    """This device's part of an array that is replicated over `axes`.

    JAX would transpose it to a scatter and an all-reduce of the whole array; the transpose that
    costs half of that is an all-gather.
    """
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return _differentiable_block(x, dim, axes, parts)
    return _block(x, dim, axes, parts)


def _block(x: Any, dim: int, axes: tuple[str, ...], parts: int) -> Any:
    x = vary(_pad_to_multiple(x, dim, parts), axes)
    block = x.shape[dim] // parts
    return lax.dynamic_slice_in_dim(x, device_index(axes) * block, block, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _differentiable_block(x: Any, dim: int, axes: tuple[str, ...], parts: int) -> Any:
    return _block(x, dim, axes, parts)


def _block_forward(x: Any, dim: int, axes: tuple[str, ...], parts: int) -> tuple[Any, Any]:
    return _block(x, dim, axes, parts), jnp.zeros((x.shape[dim], 0), jnp.int32)


def _block_backward(
    dim: int, axes: tuple[str, ...], parts: int, witness: Any, cotangent: Any
) -> tuple[Any]:
    whole = all_gather(cotangent, axes, dim, varying=False)
    return (lax.slice_in_dim(whole, 0, witness.shape[0], axis=dim),)


_differentiable_block.defvjp(_block_forward, _block_backward)


def _permutation(
    move: Move, before: Layout, axis_sizes: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Pairs (sender, receiver), as linear indices over the move's axes."""
    ranges = [range(axis_sizes[axis]) for axis in move.axes]

    def blocks(coordinates: Mapping[str, int], layout: Layout) -> tuple[int, ...]:
        result = []
        for axes in layout:
            index = 0
            for axis in axes:
                index = index * axis_sizes[axis] + coordinates[axis]
            result.append(index)
        return tuple(result)

    devices = [dict(zip(move.axes, c, strict=True)) for c in itertools.product(*ranges)]
    holder = {blocks(device, before): i for i, device in enumerate(devices)}
    return [(holder[blocks(device, move.after)], i) for i, device in enumerate(devices)]
