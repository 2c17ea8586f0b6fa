"""What lies beyond an array's ends: rows of the array itself, where padding wraps or reflects.

Along one dimension an array of n rows is read at positions below 0 and from n on. A `Border` says
which of its rows stand there. Wrapping, reflecting, symmetric and repeated padding differ in these
rows only, so nothing else in the project knows them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Border:
    """The rows of an array that stand before its first row and after its last one.

    Attributes:
      before: the rows at the positions -len(before) to -1.
      after: the rows at the positions n, n + 1, ... of an array of n rows.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def row(self, position: int, size: int) -> int | None:
        """The row that stands at a position of an array of `size` rows; None beyond the border."""
        if 0 <= position < size:
            return position
        if -len(self.before) <= position < 0:
            return self.before[position]
        return self.after[position - size] if 0 <= position - size < len(self.after) else None


Pieces = Sequence[tuple[int, Any]]
"""Arrays, and the rows at which they begin, in order: parts of an array, with gaps between them."""


def extend(x: Any, dim: int, border: Border) -> Any:
    """The array with its border along `dim`."""
    before, after = (rows_of([(0, x)], dim, rows) for rows in (border.before, border.after))
    return join([*before, x, *after], dim)


def join(arrays: Sequence[Any], dim: int) -> Any:
    """One array of arrays that follow each other along `dim`."""
    return arrays[0] if len(arrays) == 1 else lax.concatenate(list(arrays), dim)


def rows_of(pieces: Pieces, dim: int, rows: Sequence[int]) -> list[Any]:
    """Rows of an array that is given in pieces.

    Args:
      pieces: parts of the array along `dim`.
      dim: array dimension.
      rows: the wanted rows, in any order. Zeros stand for those that lie in no piece.

    Returns:
      Arrays that follow each other: slices of the pieces, reversed or repeated.
    """
    result: list[Any] = []
    for first, step, count in runs(rows):
        low = min(first, first + step * (count - 1))
        cut = _cut(pieces, dim, low, low + 1 + abs(step) * (count - 1))
        if step == 0:
            shape = list(cut[0].shape)
            shape[dim] = count
            cut = [lax.broadcast_in_dim(cut[0], shape, range(len(shape)))]
        result += [lax.rev(piece, (dim,)) for piece in cut[::-1]] if step < 0 else cut
    return result


def runs(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows as runs (first, step, count) of step 1, -1 or 0."""
    if isinstance(rows, range) and rows.step == 1:  # of a long array
        return [(rows.start, 1, len(rows))] if rows else []
    result: list[tuple[int, int, int]] = []
    for row in rows:
        if result:
            first, step, count = result[-1]
            found = row - (first + step * (count - 1))
            if found == step or (count == 1 and abs(found) <= 1):
                result[-1] = first, found, count + 1
                continue
        result.append((row, 1, 1))
    return result


def _cut(pieces: Pieces, dim: int, start: int, stop: int) -> list[Any]:
    """The rows `start` to `stop - 1`, in as many arrays as they lie in."""
    result: list[Any] = []
    shape, dtype = list(pieces[0][1].shape), pieces[0][1].dtype

    def fill(begin: int, end: int) -> None:
        if begin < end:
            shape[dim] = end - begin
            result.append(jnp.zeros(shape, dtype))

    for offset, piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.shape[dim])
        if low < high:
            fill(start, low)
            whole = high - low == piece.shape[dim]
            result.append(
                piece if whole else lax.slice_in_dim(piece, low - offset, high - offset, axis=dim)
            )
            start = high
    fill(start, stop)
    return result
