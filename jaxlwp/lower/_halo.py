"""Halo exchange: a windowed operator whose spatial dimension is split needs its neighbours' rows.

Input and output are cut into blocks of ceil(size / parts). A device's window rows start at a
position that need not be its own block's, so it receives what it lacks from its neighbours (from
several when their blocks are thinner than that) and cuts out the rows that its block of the output
reads. Beyond the image's ends lies the array's border, if it has one (`_border`), and then
the operator's padding. A border's rows are among those that a device holds or receives: where the
border is made of the image's other end, the devices form a ring, the last one the first's left.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlwp.mesh import device_index, permute
from jaxlwp.ops import Reach
from jaxlwp.program import Border, Pieces, join, rows_of, runs
from jaxlwp.space import cdiv


@dataclass(frozen=True, kw_only=True)
class Received:
    """What devices receive from each other, so that each has the rows that it reads.

    Attributes:
      pieces: first row and one past the last, counted from a device's own block's first row; each
        piece is of one other device's block.
      ring: the first device's left neighbour is the last one.
      moved: for each device the rows of its window that are elsewhere, where they lie in the
        border, and where they are; both counted from its window's start.
    """

    pieces: tuple[tuple[int, int], ...]
    ring: bool
    moved: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Geometry of a halo exchange along one dimension.

    Attributes:
      size: rows of the whole array.
      block: rows of each device's input block, padding included.
      rows: input rows that each device's output block reads.
      starts: first of these rows, relative to the device's own block.
      border: rows that stand beyond the array's ends.
      received: what devices receive from each other.
      extent: rows that the operator sees, base dilation and its padding included.
      lows: per device, the zeros that base dilation leaves before the first of the rows.
      base_dilation: distance of the rows in what the operator sees.
    """

    size: int
    block: int
    rows: int
    starts: tuple[int, ...]
    border: Border
    received: Received
    extent: int
    lows: tuple[int, ...]
    base_dilation: int

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


@functools.lru_cache(maxsize=1 << 14)
def plan_halo(size: int, out_size: int, reach: Reach, parts: int) -> Halo:
    """Geometry for an input of `size` and an output of `out_size` rows over `parts` devices."""
    block, out_block = cdiv(size, parts), cdiv(out_size, parts)
    spans = [(i * out_block, (i + 1) * out_block) for i in range(parts)]
    reads = [reach.reads(*span) for span in spans]
    rows = max(1, *(stop - first for first, stop in reads))
    lows, highs, steps = zip(*(reach.left_over(*span) for span in spans), strict=True)
    first, stop = reads[0]
    windows = [range(start, start + rows) for start, _ in reads]
    return Halo(
        size=size,
        block=block,
        rows=rows,
        starts=tuple(window.start - i * block for i, window in enumerate(windows)),
        border=reach.border,
        received=_received(size, block, windows, reach.border),
        extent=lows[0] + (stop - first - 1) * steps[0] + 1 + highs[0] if steps[0] > 1 else rows,
        lows=lows,
        base_dilation=steps[0],
    )


def _received(size: int, block: int, windows: Sequence[range], border: Border) -> Received:
    """What devices receive, each as much as any of them lacks, if their windows are these rows."""
    inside = [
        (max(window.start, 0) - i * block, min(window.stop, size) - i * block)
        for i, window in enumerate(windows)
    ]
    inside = [(start, stop) for start, stop in inside if start < stop] or [(0, 0)]
    left, right = min(start for start, _ in inside), max(stop for _, stop in inside)
    spans = [(left, right)]  # rows that some device reads, counted from its own block's first
    ring, moved, around = False, [], len(windows) * block
    for i, window in enumerate(windows):
        begin, found = i * block, []
        for position, row in _border_rows(window, size, border):
            # Where the row is nearest: in the array, or in its copies before and after it.
            place = min(
                (row, row - around, row + around),
                key=lambda p: (
                    max(0, min(left, 0) - (p - begin), p - begin + 1 - max(right, block)),
                    p != position,
                ),
            )
            ring = ring or place != row
            left, right = min(left, place - begin), max(right, place - begin + 1)
            spans.append((place - begin, place - begin + 1))
            if place != position:
                found.append((position - window.start, place - window.start))
        moved.append(tuple(found))
    if len({window.start - i * block for i, window in enumerate(windows)}) > 1:
        spans = [(left, right)]  # each device cuts its window out of all that it has
    return Received(pieces=tuple(_cut_in_blocks(spans, block)), ring=ring, moved=tuple(moved))


def _cut_in_blocks(spans: Sequence[tuple[int, int]], block: int) -> Iterator[tuple[int, int]]:
    """For each other device's block the rows from the first to the last that are in some span."""
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    for begin in range(first // block * block, last, block):
        parts = [(max(start, begin), min(stop, begin + block)) for start, stop in spans]
        parts = [(start, stop) for start, stop in parts if start < stop]
        if parts and begin != 0:
            yield min(start for start, _ in parts), max(stop for _, stop in parts)


def _border_rows(positions: range, size: int, border: Border) -> Iterator[tuple[int, int]]:
    """Those of the positions that lie in the border, and the rows that stand there."""
    before = range(max(positions.start, -len(border.before)), min(positions.stop, 0))
    after = range(max(positions.start, size), min(positions.stop, size + len(border.after)))
    for position in itertools.chain(before, after):
        row = border.row(position, size)
        assert row is not None
        yield position, row


@dataclass(frozen=True)
class Neighbour:
    """Rows that every device receives from one other device along a dimension.

    Attributes:
      start: where they stand, counted from the first row of one's own block.
      rows: how many.
      step: how many devices to the left the sender is; negative to the right.
      begin: the first of the rows, in the sender's block.
    """

    start: int
    rows: int
    step: int
    begin: int


def neighbours(halo: Halo) -> Iterator[Neighbour]:
    """What every device receives."""
    for start, stop in halo.received.pieces:
        yield Neighbour(start, stop - start, -(start // halo.block), start % halo.block)


def receive(x: Any, axes: tuple[str, ...], parts: int, step: int, ring: bool) -> Any:
    """What another device sends, which is `step` devices to the left."""
    pairs = [(i, (i + step) % parts) for i in range(parts) if ring or 0 <= i + step < parts]
    return permute(x, axes, pairs)


def assemble(pieces: Pieces, dim: int, axes: tuple[str, ...], halo: Halo, fill: Any) -> Any:
    """The rows that this device's output block reads.

    Args:
      pieces: one's own block and what is received, in image order; rows counted from the first of
        one's own block.
      dim: array dimension.
      axes: mesh axes that split it.
      halo: from `plan_halo`.
      fill: what the operator's padding holds, beyond the array and its border.

    Returns:
      Block with `halo.rows` rows along `dim`.
    """
    index = device_index(axes)
    start = halo.starts[0]
    if len(set(halo.starts)) > 1:
        pieces, start = _of_window(pieces, dim, halo, index), 0
    y = join(_with_border(pieces, dim, start, halo, index), dim)
    if halo.padded:
        first = _of_device(halo.starts, index) + index * halo.block
        position = lax.broadcasted_iota(jnp.int32, y.shape, dim) + first
        before, after = halo.border.before, halo.border.after
        inside = (position >= -len(before)) & (position < halo.size + len(after))
        y = jnp.where(inside, y, jnp.asarray(fill, y.dtype))
    return y


def _of_window(pieces: Pieces, dim: int, halo: Halo, index: Any) -> Pieces:
    """The rows of a device's window, counted from its start, which depends on the device.

    With them come rows around it of which the border is made.
    """
    places = [place for rows in halo.received.moved for _, place in rows]
    low, stop = min([0, *places]), max([halo.rows, *(place + 1 for place in places)])
    first = min(halo.starts) + low
    y = join(rows_of(pieces, dim, range(first, max(halo.starts) + stop)), dim)
    return [(low, _from(y, dim, [i + low - first for i in halo.starts], stop - low, index))]


def _with_border(pieces: Pieces, dim: int, start: int, halo: Halo, index: Any) -> list[Any]:
    """The rows of the window from `start` on, those in the border taken from where they are.

    Few devices see the border, and they see different parts of it: each variant is cut out, and
    every device selects its own.
    """
    moved = [dict(rows) for rows in halo.received.moved]
    result: list[Any] = []
    done = 0
    for first, _, count in runs(sorted(frozenset().union(*moved))):
        result += rows_of(pieces, dim, range(start + done, start + first))
        done = first + count
        cases = [tuple(start + own.get(row, row) for row in range(first, done)) for own in moved]
        distinct = list(dict.fromkeys(cases))
        made = [rows_of(pieces, dim, case) for case in distinct]
        if len(distinct) > 1:
            which = _of_device([distinct.index(case) for case in cases], index)
            made = [[lax.select_n(which, *(join(case, dim) for case in made))]]
        result += made[0]
    return result + rows_of(pieces, dim, range(start + done, start + halo.rows))


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
    return _from(y, dim, starts, halo.extent, device_index(tuple(axes)))
