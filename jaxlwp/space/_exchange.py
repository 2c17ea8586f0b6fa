"""What moves send: collectives, their bytes, and how much of them goes over a link."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxlwp.space._config import Layout
from jaxlwp.space._layout import Move, cdiv, degree


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective operation as data.

    Attributes:
      kind: as in HLO: "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
        "collective-permute".
      axes: mesh axes over which it runs.
      num_bytes: bytes of its operand on each device.
      backward: it runs in the backward pass.
    """

    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    backward: bool = False


class Exchange(NamedTuple):
    """A collective of a change of layout, whatever the array's size.

    Attributes:
      kind: as of a `Collective`.
      axes: likewise.
      backward: likewise.
      blocks: how many blocks of the array its operand on each device consists of.
      degrees: a block is what is left of the array if each dimension is split into so many parts.
    """

    kind: str
    axes: tuple[str, ...]
    backward: bool
    blocks: int
    degrees: tuple[int, ...]

    def block_elements(self, shape: Sequence[int]) -> int:
        """Elements of one block of an array of the given global shape."""
        return math.prod(map(cdiv, shape, self.degrees))

    def weight(self, axis_sizes: Mapping[str, int]) -> int:
        """Blocks that one device sends, times the number of devices: a whole number."""
        parts = degree(self.axes, axis_sizes)
        devices = math.prod(axis_sizes.values())
        return self.blocks * _WIRE[self.kind](parts) * (devices // parts)


def move_exchanges(
    source: Layout, moves: Sequence[Move], axis_sizes: Mapping[str, int]
) -> Iterator[Exchange]:
    """The collectives that the moves perform, each followed by its transpose.

    Args:
      source: layout before the first move.
      moves: from `plan_moves`.
      axis_sizes: devices along each mesh axis.
    """
    before = tuple(degree(axes, axis_sizes) for axes in source)
    for move in moves:
        after = tuple(degree(axes, axis_sizes) for axes in move.after)
        parts = degree(move.axes, axis_sizes)
        if move.kind == "slice":
            yield Exchange("all-gather", move.axes, True, 1, after)
        elif move.kind == "cast":
            yield Exchange("all-reduce", move.axes, True, 1, after)
        elif move.kind == "all_to_all":
            # The dimension that is split next is padded before, the other trimmed afterwards.
            padded = tuple(after[d] if d == move.to_dim else n for d, n in enumerate(before))
            yield Exchange("all-to-all", move.axes, False, parts, padded)
            yield Exchange("all-to-all", move.axes, True, parts, padded)
        elif move.kind == "all_gather":
            yield Exchange("all-gather", move.axes, False, 1, before)
            if move.varying:
                yield Exchange("reduce-scatter", move.axes, True, parts, before)
        else:
            yield Exchange("collective-permute", move.axes, False, 1, before)
            yield Exchange("collective-permute", move.axes, True, 1, before)
        before = after


def move_collectives(
    shape: Sequence[int],
    itemsize: int,
    source: Layout,
    moves: Sequence[Move],
    axis_sizes: Mapping[str, int],
    *,
    gradient: bool,
) -> tuple[Collective, ...]:
    """The collectives that the moves perform on an array.

    Args:
      shape: global shape.
      itemsize: bytes per element.
      source: layout before the first move.
      moves: from `plan_moves`.
      axis_sizes: devices along each mesh axis.
      gradient: the value has a cotangent, so the transposed moves run too.

    Returns:
      Forward collectives in order, each followed by its transpose where `gradient`.
    """
    return tuple(
        Collective(
            kind=exchange.kind,
            axes=exchange.axes,
            num_bytes=exchange.blocks * exchange.block_elements(shape) * itemsize,
            backward=exchange.backward,
        )
        for exchange in move_exchanges(source, moves, axis_sizes)
        if math.prod(shape) and (gradient or not exchange.backward)
    )


_WIRE: dict[str, Callable[[int], int]] = {
    "all-reduce": lambda parts: 2 * (parts - 1),
    "all-gather": lambda parts: (parts - 1) * parts,
    "reduce-scatter": lambda parts: parts - 1,
    "all-to-all": lambda parts: parts - 1,
    "collective-permute": lambda parts: parts,
}
"""Parts of its operand, one for each device, that a device sends under the ring algorithm.

Source: the usual ring counts; an all-reduce is a reduce-scatter and an all-gather.
"""

COLLECTIVES = tuple(_WIRE)
"""Kinds of collectives."""


def wire_share(kind: str, parts: int) -> float:
    """Bytes that a device sends for each byte of its operand."""
    return _WIRE[kind](parts) / parts
