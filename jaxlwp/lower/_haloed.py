"""Blocks with the rows around them that an operator reads, each written once.

Along one split dimension a device sends rows of its block, and puts what it receives around it.
Along the next one it sends rows, say columns, of what that makes, corners included. If these were
cut out of a block that is put together, the block would be there, and be read, once for every
split dimension. So nothing is put together before the operator reads it: what is sent is put
together of pieces that are cut alike, and those are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlwp.lower._halo import Halo, neighbours
from jaxlwp.lower._steps import Assemble, Block, Dilate, Op, Receive, Slice

Add = Callable[[Op, Iterable[Block], Sequence[Block]], Any]
"""`add(op, operands, results)`: the results of a step, which is added unless it is there."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A block that is not put together yet.

    Attributes:
      op: what is to be done along a dimension.
      parts: of what.
      scalars: blocks of one element that it reads besides.
      block: what it makes.
    """

    op: Assemble | Dilate
    parts: tuple[Haloed, ...]
    scalars: tuple[Block, ...]
    block: Block


Haloed = Block | Planned
"""A block that is there, or one that is planned."""


def with_halo(
    add: Add, source: Haloed, dim: int, axes: tuple[str, ...], halo: Halo, fill: Any
) -> Haloed:
    """The rows that an operator reads along a dimension, planned; received where need be.

    Args:
      add: adds a step.
      source: one's own block, with what it has around it along other dimensions.
      dim: array dimension.
      axes: mesh axes that split it.
      halo: from `plan_halo`.
      fill: what the operator's padding holds, a number or a block.
    """
    pieces = [(0, source)]
    for each in neighbours(halo):
        sent = put_together(add, _rows(add, source, dim, each.begin, each.begin + each.rows))
        op = Receive(dim, axes, len(halo.starts), each.step, halo.received.ring)
        (received,) = add(op, (sent,), (replace(sent),))
        pieces.append((each.start, received))
    pieces.sort(key=lambda piece: piece[0])
    scalars = (fill,) if isinstance(fill, Block) else ()
    starts = tuple(start for start, _ in pieces)
    own = _block(source)
    varying = own.varying.union(axes, *(x.varying for x in scalars))
    assembled = Planned(
        Assemble(dim, axes, halo, starts, None if scalars else fill),
        tuple(piece for _, piece in pieces),
        scalars,
        replace(_resized(own, dim, halo.rows), varying=varying),
    )
    if halo.left_over is not None:
        return assembled
    dilated = _resized(assembled.block, dim, halo.extent)
    return Planned(Dilate(dim, axes, halo), (assembled,), (), dilated)


def put_together(add: Add, source: Haloed) -> Block:
    """A block that is there."""
    if isinstance(source, Block):
        return source
    parts = [put_together(add, part) for part in source.parts]
    (block,) = add(source.op, (*parts, *source.scalars), (source.block,))
    return block  # type: ignore[no-any-return]


def _rows(add: Add, source: Haloed, dim: int, start: int, stop: int) -> Haloed:
    """Some rows along a dimension: of what is planned along another one, those of its parts."""
    block = _block(source)
    if (start, stop) == (0, block.shape[dim]):
        return source
    rows = _resized(block, dim, stop - start)
    if isinstance(source, Planned):
        parts = tuple(_rows(add, part, dim, start, stop) for part in source.parts)
        return replace(source, parts=parts, block=rows)
    (rows,) = add(Slice(dim, start, stop), (source,), (rows,))
    return rows  # type: ignore[no-any-return]


def _block(source: Haloed) -> Block:
    return source.block if isinstance(source, Planned) else source


def _resized(block: Block, dim: int, size: int) -> Block:
    return replace(block, shape=(*block.shape[:dim], size, *block.shape[dim + 1 :]))
