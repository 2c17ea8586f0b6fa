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
from jaxlwp._spmd import device_index, permute
from jaxlwp.ops import Reach


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Geometry of a halo exchange along one dimension.

    Attributes:
      block: rows of each device's input block, padding included.
      rows: input rows that each device's output block reads.
      starts: first of these rows, relative to the device's own block.
      left: rows received from the left.
      right: rows received from the right.
      extent: rows that the operator sees, base dilation and its padding included.
      lows: per device, the zeros that base dilation leaves before the first of the rows.
      base_dilation: distance of the rows in what the operator sees.
    """

    block: int
    rows: int
    starts: tuple[int, ...]
    left: int
    right: int
    extent: int
    lows: tuple[int, ...]
    base_dilation: int

    @property
    def exchanged(self) -> int:
        """Rows that each device sends forward (and receives back in the transpose)."""
        return self.left + self.right

    @property
    def left_over(self) -> tuple[int, int, int] | None:
        """Padding (low, high) and base dilation still to be applied; None if devices differ."""
        high = self.extent - self.lows[0] - (self.rows - 1) * self.base_dilation - 1
        return (self.lows[0], high, self.base_dilation) if len(set(self.lows)) == 1 else None


def plan_halo(size: int, out_size: int, reach: Reach, parts: int) -> Halo:
    """Geometry for an input of `size` and an output of `out_size` rows over `parts` devices."""
    block, out_block = cdiv(size, parts), cdiv(out_size, parts)
    spans = [(i * out_block, (i + 1) * out_block) for i in range(parts)]
    reads = [reach.reads(*span) for span in spans]
    rows = max(1, *(stop - first for first, stop in reads))
    starts = tuple(first - i * block for i, (first, _) in enumerate(reads))
    lows, highs, steps = zip(*(reach.left_over(*span) for span in spans), strict=True)
    first, stop = reads[0]
    # Rows beyond the outermost device need no exchange: they are padding.
    return Halo(
        block=block,
        rows=rows,
        starts=starts,
        left=min(max(0, -min(starts)), (parts - 1) * block),
        right=min(max(0, max(starts) + rows - block), (parts - 1) * block),
        extent=lows[0] + (stop - first - 1) * steps[0] + 1 + highs[0] if steps[0] > 1 else rows,
        lows=lows,
        base_dilation=steps[0],
    )


def assemble(
    pieces: Sequence[Any], dim: int, axes: Sequence[str], halo: Halo, size: int, fill: Any
) -> Any:
    """The rows that this device's output block reads.

    Args:
      pieces: rows received from the left, this device's block, rows received from the right, in
        image order.
      dim: array dimension.
      axes: mesh axes that split it.
      halo: from `plan_halo`.
      size: rows of the whole array; rows outside of it are `fill`.
      fill: what the operator's padding holds.

    Returns:
      Block with `halo.rows` rows along `dim`.
    """
    low = max(0, -min(halo.starts)) - halo.left
    high = max(0, max(halo.starts) + halo.rows - halo.block) - halo.right
    y = lax.concatenate(pieces, dim) if len(pieces) > 1 else pieces[0]
    fill = jnp.asarray(fill, y.dtype)
    if low or high:
        config = [(0, 0, 0)] * y.ndim
        config[dim] = (low, high, 0)
        y = lax.pad(y, jnp.zeros((), y.dtype), config)
    index = device_index(tuple(axes))
    first = halo.left + low
    position = lax.broadcasted_iota(jnp.int32, y.shape, dim) - first + index * halo.block
    y = jnp.where((position >= 0) & (position < size), y, fill)
    return _from(y, dim, [start + first for start in halo.starts], halo.rows, index)


def _from(x: Any, dim: int, starts: Sequence[int], rows: int, index: Any) -> Any:
    """`rows` rows from a start that depends on the device."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + rows, axis=dim)
    return lax.dynamic_slice_in_dim(x, jnp.asarray(starts, jnp.int32)[index], rows, dim)


def dilate(x: Any, dim: int, axes: Sequence[str], halo: Halo) -> Any:
    """The rows with their base dilation and padding, where each device's padding differs.

    Returns:
      Block with `halo.extent` rows along `dim`.
    """
    lows, step = halo.lows, halo.base_dilation
    dilated = (halo.rows - 1) * step + 1
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (max(lows), max(0, halo.extent - min(lows) - dilated), step - 1)
    y = lax.pad(x, jnp.zeros((), x.dtype), config)
    starts = [max(lows) - low for low in lows]
    return _from(y, dim, starts, halo.extent, device_index(tuple(axes)))


def hops(halo: Halo, wanted: int) -> list[tuple[int, int]]:
    """Pairs (distance, rows) of the pieces in which `wanted` rows come from one side."""
    pieces: list[tuple[int, int]] = []
    while wanted > 0:
        pieces.append((len(pieces) + 1, min(wanted, halo.block)))
        wanted -= pieces[-1][1]
    return pieces


def receive(x: Any, dim: int, axes: tuple[str, ...], parts: int, rows: int, step: int) -> Any:
    """The last (or for a negative step the first) rows of the neighbour `step` to the left."""
    begin = x.shape[dim] - rows if step > 0 else 0
    piece = lax.slice_in_dim(x, begin, begin + rows, axis=dim)
    pairs = [(i, i + step) for i in range(parts) if 0 <= i + step < parts]
    return permute(piece, axes, pairs)
