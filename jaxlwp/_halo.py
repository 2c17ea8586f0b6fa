"""Halo exchange: a windowed operator whose spatial dimension is split needs its neighbours' rows.

Input and output are cut into blocks of ceil(size / parts). A device's window rows start at a
position that need not be its own block's, so it receives L rows from the left and R from the right
(over several hops when its block is thinner than that), masks what lies outside the image, and
cuts out the rows that its block of the output reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlwp._layout import cdiv
from jaxlwp.ops import Window


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Geometry of a halo exchange along one dimension.

    Attributes:
      block: rows of each device's input block, padding included.
      rows: input rows that each device's output block reads.
      starts: first of these rows, relative to the device's own block.
      left: rows received from the left.
      right: rows received from the right.
    """

    block: int
    rows: int
    starts: tuple[int, ...]
    left: int
    right: int

    @property
    def exchanged(self) -> int:
        """Rows that each device sends forward (and receives back in the transpose)."""
        return self.left + self.right


def plan_halo(size: int, out_size: int, window: Window, parts: int) -> Halo:
    """Geometry for an input of `size` and an output of `out_size` rows over `parts` devices."""
    block, out_block = cdiv(size, parts), cdiv(out_size, parts)
    rows = (out_block - 1) * window.stride + window.extent
    starts = tuple(i * out_block * window.stride - window.pad_low - i * block for i in range(parts))
    # Rows beyond the outermost device need no exchange: they are padding.
    left = min(max(0, -min(starts)), (parts - 1) * block)
    right = min(max(0, max(starts) + rows - block), (parts - 1) * block)
    return Halo(block=block, rows=rows, starts=starts, left=left, right=right)


def exchange(x: Any, dim: int, axes: Sequence[str], halo: Halo, size: int, fill: Any) -> Any:
    """The rows that this device's output block reads.

    Args:
      x: this device's block, `halo.block` rows along `dim`.
      dim: array dimension.
      axes: mesh axes that split it.
      halo: from `plan_halo`.
      size: rows of the whole array; rows outside of it are `fill`.
      fill: what the operator's padding holds.

    Returns:
      Block with `halo.rows` rows along `dim`.
    """
    left = _hops(x, dim, axes, halo, halo.left, from_left=True)
    right = _hops(x, dim, axes, halo, halo.right, from_left=False)
    low = max(0, -min(halo.starts)) - halo.left
    high = max(0, max(halo.starts) + halo.rows - halo.block) - halo.right
    y = lax.concatenate([*left, x, *right], dim) if left or right else x
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (low, high, 0)
    y = lax.pad(y, jnp.asarray(fill, y.dtype), config)
    index = lax.axis_index(tuple(axes))
    first = halo.left + low
    position = lax.broadcasted_iota(jnp.int32, y.shape, dim) - first + index * halo.block
    y = jnp.where((position >= 0) & (position < size), y, jnp.asarray(fill, y.dtype))
    if len(set(halo.starts)) == 1:
        fixed = halo.starts[0] + first
        return lax.slice_in_dim(y, fixed, fixed + halo.rows, axis=dim)
    start = jnp.asarray(halo.starts, jnp.int32)[index] + first
    return lax.dynamic_slice_in_dim(y, start, halo.rows, dim)


def _hops(
    x: Any, dim: int, axes: Sequence[str], halo: Halo, wanted: int, *, from_left: bool
) -> list[Any]:
    """Pieces received from neighbours at distance 1, 2, ..., in image order."""
    parts = len(halo.starts)
    pieces: list[Any] = []
    distance = 1
    while wanted > 0:
        rows = min(wanted, halo.block)
        begin = halo.block - rows if from_left else 0
        piece = lax.slice_in_dim(x, begin, begin + rows, axis=dim)
        step = distance if from_left else -distance
        pairs = [(i, i + step) for i in range(parts) if 0 <= i + step < parts]
        received = lax.ppermute(piece, tuple(axes), pairs)
        pieces.insert(0 if from_left else len(pieces), received)
        wanted -= rows
        distance += 1
    return pieces
