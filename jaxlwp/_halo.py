"""Halo exchange: a windowed operator whose spatial dimension is split needs its neighbours' rows.

Input and output are cut into blocks of ceil(size / parts). A device's window rows start at a
position that need not be its own block's, so it receives L rows from the left and R from the right
(over several hops when its block is thinner than that) and cuts out the rows that its block of the
output reads. Beyond the image's ends lies the array's border, if it has one (`_border`), and then
the operator's padding. A border's rows are among those that a device holds or receives: where the
border is made of the image's other end, the devices form a ring, the last one the first's left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlwp._border import Border, join, rows_of
from jaxlwp._layout import cdiv
from jaxlwp.ops import Reach


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Geometry of a halo exchange along one dimension.

    Attributes:
      size: rows of the whole array.
      block: rows of each device's input block, padding included.
      rows: input rows that each device's output block reads.
      starts: first of these rows, relative to the device's own block.
      left: rows received from the left.
      right: rows received from the right.
      ring: the first device's left neighbour is the last one.
      border: rows that stand beyond the array's ends.
      extent: rows that the operator sees, base dilation and its padding included.
      lows: per device, the zeros that base dilation leaves before the first of the rows.
      base_dilation: distance of the rows in what the operator sees.
    """

    size: int
    block: int
    rows: int
    starts: tuple[int, ...]
    left: int
    right: int
    ring: bool
    border: Border
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

    @property
    def padded(self) -> bool:
        """Whether some device's window reaches beyond the array and its border."""
        low, high = -len(self.border.before), self.size + len(self.border.after)
        return any(
            start + i * self.block < low or start + i * self.block + self.rows > high
            for i, start in enumerate(self.starts)
        )


def plan_halo(size: int, out_size: int, reach: Reach, parts: int) -> Halo:
    """Geometry for an input of `size` and an output of `out_size` rows over `parts` devices."""
    block, out_block = cdiv(size, parts), cdiv(out_size, parts)
    spans = [(i * out_block, (i + 1) * out_block) for i in range(parts)]
    reads = [reach.reads(*span) for span in spans]
    rows = max(1, *(stop - first for first, stop in reads))
    firsts = [first for first, _ in reads]
    left, right, ring = _received(size, block, rows, firsts, reach.border)
    lows, highs, steps = zip(*(reach.left_over(*span) for span in spans), strict=True)
    first, stop = reads[0]
    return Halo(
        size=size,
        block=block,
        rows=rows,
        starts=tuple(first - i * block for i, first in enumerate(firsts)),
        left=left,
        right=right,
        ring=ring,
        border=reach.border,
        extent=lows[0] + (stop - first - 1) * steps[0] + 1 + highs[0] if steps[0] > 1 else rows,
        lows=lows,
        base_dilation=steps[0],
    )


def _received(
    size: int, block: int, rows: int, firsts: Sequence[int], border: Border
) -> tuple[int, int, bool]:
    """Rows from the left, from the right, and whether some of them come around the ends.

    Every device receives as many as the one that lacks most.
    """
    left = right = 0
    for i, first in enumerate(firsts):
        low, high = max(first, 0), min(first + rows, size)
        if low < high:
            left, right = max(left, i * block - low), max(right, high - (i + 1) * block)
    ring, around = False, len(firsts) * block
    for i, first in enumerate(firsts):
        for _, row in _border_rows(range(first, first + rows), size, border):
            # Where the row is nearest: in the array, or in its copies before and after it.
            sides = [
                (i * block - place, place + 1 - (i + 1) * block, place != row)
                for place in (row, row - around, row + around)
            ]
            low, high, turned = min(
                sides, key=lambda side: max(0, side[0] - left) + max(0, side[1] - right)
            )
            left, right, ring = max(left, low), max(right, high), ring or turned
    return left, right, ring


def _border_rows(positions: range, size: int, border: Border) -> Iterator[tuple[int, int]]:
    """Those of the positions that lie in the border, and the rows that stand there."""
    before = range(max(positions.start, -len(border.before)), min(positions.stop, 0))
    after = range(max(positions.start, size), min(positions.stop, size + len(border.after)))
    for position in itertools.chain(before, after):
        row = border.row(position, size)
        assert row is not None
        yield position, row


Once = Callable[..., Any]
"""`once(function, *arguments)`: the function's value, made once for the same arguments."""


def exchange(x: Any, dim: int, axes: Sequence[str], halo: Halo, fill: Any, once: Once) -> Any:
    """The rows that this device's output block reads.

    Args:
      x: this device's block, `halo.block` rows along `dim`.
      dim: array dimension.
      axes: mesh axes that split it.
      halo: from `plan_halo`.
      fill: what the operator's padding holds, beyond the array and its border.
      once: makes what several operators receive once.

    Returns:
      Block with `halo.rows` rows along `dim`.
    """
    left, own, right = _with_neighbours(x, dim, tuple(axes), halo, once)
    index = lax.axis_index(tuple(axes))
    moved = list(_moved(halo))
    # Rows around the window of which the border is made.
    low = max(0, -min(min(rows.values(), default=0) for rows in moved))
    high = max(0, max(max(rows.values(), default=0) for rows in moved) + 1 - halo.rows)
    pieces = _window([*left, *own, *right], dim, halo, low, high, index)
    y = join(_with_border(pieces, dim, halo.rows, low, moved, index), dim)
    if halo.padded:
        first = _of_device(halo.starts, index) + index * halo.block
        position = lax.broadcasted_iota(jnp.int32, y.shape, dim) + first
        before, after = halo.border.before, halo.border.after
        inside = (position >= -len(before)) & (position < halo.size + len(after))
        y = jnp.where(inside, y, jnp.asarray(fill, y.dtype))
    return y


def _moved(halo: Halo) -> Iterator[dict[int, int]]:
    """For each device: rows of its window in the border -> where they are, counted likewise.

    Those that come around the ring may be where they are wanted already.
    """
    around = len(halo.starts) * halo.block
    for i, start in enumerate(halo.starts):
        first = i * halo.block + start
        held = range(i * halo.block - halo.left, (i + 1) * halo.block + halo.right)
        moved = {}
        for position, row in _border_rows(range(first, first + halo.rows), halo.size, halo.border):
            copies = (row, row - around, row + around) if halo.ring else (row,)
            places = [place for place in copies if place in held]
            if position not in places:
                moved[position - first] = places[0] - first
        yield moved


def _window(
    pieces: Sequence[Any], dim: int, halo: Halo, low: int, high: int, index: Any
) -> list[Any]:
    """The rows of a device's window, with `low` more before and `high` more after, in pieces.

    `pieces` are what it has received from the left, its block, and what came from the right.
    """
    starts, rows = [start - low for start in halo.starts], low + halo.rows + high
    missing = max(0, -halo.left - min(starts))
    beyond = max(0, max(starts) + rows - halo.block - halo.right)
    if missing or beyond:
        y = join(pieces, dim)
        config = [(0, 0, 0)] * y.ndim
        config[dim] = (missing, beyond, 0)
        pieces = [lax.pad(y, jnp.zeros((), y.dtype), config)]
    starts = [start + halo.left + missing for start in starts]
    if len(set(starts)) == 1:
        return rows_of(pieces, dim, range(starts[0], starts[0] + rows))
    return [_from(join(pieces, dim), dim, starts, rows, index)]


def _with_border(
    pieces: Sequence[Any],
    dim: int,
    rows: int,
    low: int,
    moved: Sequence[dict[int, int]],
    index: Any,
) -> list[Any]:
    """The rows from `low` on, in pieces, those in the border taken from where they are.

    Few devices see the border, and they see different parts of it: each variant is cut out, and
    every device selects its own.
    """
    result: list[Any] = []
    somewhere = frozenset().union(*moved)
    for _, group in itertools.groupby(range(rows), somewhere.__contains__):
        places = tuple(group)
        cases = [tuple(low + own.get(row, row) for row in places) for own in moved]
        distinct = list(dict.fromkeys(cases))
        made = [rows_of(pieces, dim, case) for case in distinct]
        if len(distinct) > 1:
            which = _of_device([distinct.index(case) for case in cases], index)
            made = [[lax.select_n(which, *(join(case, dim) for case in made))]]
        result += made[0]
    return result


def _of_device(numbers: Sequence[int], index: Any) -> Any:
    """This device's number."""
    return numbers[0] if len(set(numbers)) == 1 else jnp.asarray(numbers, jnp.int32)[index]


def _from(x: Any, dim: int, starts: Sequence[int], rows: int, index: Any) -> Any:
    """`rows` rows from a start that may depend on the device."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + rows, axis=dim)
    return lax.dynamic_slice_in_dim(x, _of_device(starts, index), rows, dim)


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
    return _from(y, dim, starts, halo.extent, lax.axis_index(tuple(axes)))


def hops(halo: Halo, wanted: int) -> list[tuple[int, int]]:
    """Pairs (distance, rows) of the pieces in which `wanted` rows come from one side."""
    pieces: list[tuple[int, int]] = []
    while wanted > 0:
        pieces.append((len(pieces) + 1, min(wanted, halo.block)))
        wanted -= pieces[-1][1]
    return pieces


def _with_neighbours(
    x: Any, dim: int, axes: tuple[str, ...], halo: Halo, once: Once
) -> tuple[list[Any], list[Any], list[Any]]:
    """Pieces from the left, one's own block in pieces, pieces from the right, in image order."""
    own, send_left, send_right = [x], x, x
    if halo.exchanged and halo.exchanged <= halo.block:
        # Cut the block in three: what is sent is a piece of its own, whose gradient is added to
        # that piece. Slices of the block would each return a gradient as large as the block.
        sizes = (halo.right, halo.block - halo.exchanged, halo.left)
        own = list(once(lax.split, x, sizes, dim))
        send_left, send_right = own[0], own[2]
    left = [
        once(_receive, send_right, dim, axes, len(halo.starts), rows, distance, halo.ring)
        for distance, rows in hops(halo, halo.left)
    ]
    right = [
        once(_receive, send_left, dim, axes, len(halo.starts), rows, -distance, halo.ring)
        for distance, rows in hops(halo, halo.right)
    ]
    return left[::-1], own, right


def _receive(
    x: Any, dim: int, axes: tuple[str, ...], parts: int, rows: int, step: int, ring: bool
) -> Any:
    """The last (or for a negative step the first) rows of the neighbour `step` to the left."""
    begin = x.shape[dim] - rows if step > 0 else 0
    piece = lax.slice_in_dim(x, begin, begin + rows, axis=dim)
    pairs = [(i, (i + step) % parts) for i in range(parts) if ring or 0 <= i + step < parts]
    return lax.ppermute(piece, axes, pairs)
