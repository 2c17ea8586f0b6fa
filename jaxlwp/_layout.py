"""Layouts of arrays over a mesh, and the moves that turn one layout into another.

The single place that decides how an array is brought from one layout to another. The lowering
carries the moves out, the cost model adds up their bytes: what is priced is what runs.

A value is *varying* over the mesh axes that split it and replicated over the others. A consumer
that is active over an axis by which its operand is not split (a convolution split by channel reads
the whole input) returns a partial gradient on each device: the operand is then *cast* to varying,
and the transpose of the cast is the all-reduce of that gradient. After an all-gather the same need
turns the backward slice into a reduce-scatter.

A dimension of size s split over d parts has blocks of ceil(s / d); the last blocks hold padding.
Blocks of an uneven dimension do not nest, so such a dimension is gathered whole.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxlwp._config import Layout

MoveKind = Literal["slice", "cast", "all_to_all", "all_gather", "permute"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One step of a change of layout.

    Attributes:
      kind: "slice" keeps one's own part of a replicated dimension, "cast" marks the value as
        varying, "all_to_all" moves mesh axes from one dimension to another, "all_gather" removes
        mesh axes from a dimension, "permute" rearranges blocks among devices.
      axes: mesh axes that take part, major to minor.
      dim: array dimension that is sliced, gathered, or left by an all-to-all.
      to_dim: array dimension that an all-to-all splits.
      varying: an all-gather's result is used differently by each device (see module docstring).
      after: the layout after this move.
    """

    kind: MoveKind
    axes: tuple[str, ...]
    dim: int = -1
    to_dim: int = -1
    varying: bool = False
    after: Layout


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


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def degree(axes: Sequence[str], axis_sizes: Mapping[str, int]) -> int:
    """Number of parts into which the mesh axes split a dimension."""
    return math.prod(axis_sizes[axis] for axis in axes)


def layout_axes(layout: Layout) -> frozenset[str]:
    """All mesh axes that split some dimension."""
    return frozenset(axis for axes in layout for axis in axes)


def local_shape(
    shape: Sequence[int], layout: Layout, axis_sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Shape of each device's block, padding included."""
    return tuple(cdiv(s, degree(axes, axis_sizes)) for s, axes in zip(shape, layout, strict=True))


def even_layout(shape: Sequence[int], layout: Layout, axis_sizes: Mapping[str, int]) -> Layout:
    """The layout with the minor axes dropped where a dimension does not divide evenly.

    Arrays at the border of a jitted function (parameters, batch, outputs) must be split evenly.
    """
    result = []
    for size, axes in zip(shape, layout, strict=True):
        kept = axes
        while size % degree(kept, axis_sizes):
            kept = kept[:-1]
        result.append(kept)
    return tuple(result)


def plan_moves(
    *,
    shape: Sequence[int],
    source: Layout,
    target: Layout,
    active: frozenset[str],
    axis_sizes: Mapping[str, int],
) -> tuple[Move, ...]:
    """The moves from `source` to `target` for a consumer that is active over the axes `active`.

    Args:
      shape: global shape.
      source: layout of the value; it is replicated over all other axes.
      target: layout that the consumer asks for.
      active: axes over which the consumer's work differs; must contain the target's axes.
      axis_sizes: devices along each mesh axis.

    Returns:
      Moves in order; empty if nothing is to be done.
    """
    if source == target and active <= layout_axes(source):
        return ()
    total = math.prod(axis_sizes.values())
    # Dimensions that every split divides behave alike whatever their size: one cache entry.
    sizes = tuple(0 if size % total == 0 else size for size in shape)
    return _plan(sizes, source, target, active, tuple(axis_sizes.items()))


@functools.cache
def _plan(
    sizes: tuple[int, ...],
    source: Layout,
    target: Layout,
    active: frozenset[str],
    axes: tuple[tuple[str, int], ...],
) -> tuple[Move, ...]:
    """Cheapest of: the greedy sequence, and a permutation of blocks followed by it."""
    axis_sizes = dict(axes)
    best, stuck = _greedy(sizes, source, target, active, axis_sizes)
    if not stuck:
        return best
    used = tuple(axis for axis in axis_sizes if axis in layout_axes(source))
    scale = tuple(size or math.prod(axis_sizes.values()) for size in sizes)

    def cost(moves: tuple[Move, ...]) -> float:
        priced = move_collectives(scale, 1, source, moves, axis_sizes, gradient=True)
        return sum(wire_bytes(c, axis_sizes) for c in priced)

    for arranged in _rearrangements(sizes, source, axis_sizes):
        rest, _ = _greedy(sizes, arranged, target, active, axis_sizes)
        moves = (Move(kind="permute", axes=used, after=arranged), *rest)
        if cost(moves) < cost(best):
            best = moves
    return best


def _rearrangements(
    sizes: tuple[int, ...], source: Layout, axis_sizes: Mapping[str, int]
) -> list[Layout]:
    """Layouts over the same mesh axes with the same local shape as `source`."""
    flat = [axis for axes in source for axis in axes]
    result = []
    for order in itertools.permutations(flat):
        rest = iter(order)
        layout = tuple(tuple(itertools.islice(rest, len(axes))) for axes in source)
        same = all(
            degree(a, axis_sizes) == degree(b, axis_sizes)
            for a, b in zip(source, layout, strict=True)
        )
        if same and layout != source:
            result.append(layout)
    return result


class _Change:
    """State of the greedy search: what is still to be removed from and added to each dimension."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        source: Layout,
        target: Layout,
        axis_sizes: Mapping[str, int],
    ) -> None:
        def uneven(size: int, axes: tuple[str, ...]) -> bool:
            return size % degree(axes, axis_sizes) != 0

        self.now = [list(axes) for axes in source]
        self.remove: list[list[str]] = []
        self.add: list[list[str]] = []
        self.whole_out, self.whole_in = [], []
        for size, old, new in zip(sizes, source, target, strict=True):
            common = 0
            while common < min(len(old), len(new)) and old[common] == new[common]:
                common += 1
            if old != new and (uneven(size, old) or uneven(size, new)):
                common = 0
            self.remove.append(list(old[common:]))
            self.add.append(list(new[common:]))
            self.whole_out.append(uneven(size, old))
            self.whole_in.append(uneven(size, new))

    def layout(self) -> Layout:
        return tuple(tuple(axes) for axes in self.now)

    def drop(self, dim: int, count: int) -> tuple[str, ...]:
        axes = tuple(self.remove[dim][-count:])
        del self.remove[dim][-count:], self.now[dim][-count:]
        return axes

    def take(self, dim: int, count: int) -> tuple[str, ...]:
        axes = tuple(self.add[dim][:count])
        del self.add[dim][:count]
        self.now[dim].extend(axes)
        return axes


def _greedy(
    sizes: tuple[int, ...],
    source: Layout,
    target: Layout,
    active: frozenset[str],
    axis_sizes: Mapping[str, int],
) -> tuple[tuple[Move, ...], bool]:
    """Slices first (they shrink the block), then all-to-alls, then gathers.

    Returns the moves and whether an axis had to be gathered only to be sliced again.
    """
    change = _Change(sizes, source, target, axis_sizes)
    moves = list(_slices(change))
    broadcast = tuple(
        a for a in axis_sizes if a in active - layout_axes(source) - layout_axes(target)
    )
    if broadcast:
        moves.append(Move(kind="cast", axes=broadcast, after=change.layout()))
    stuck = False
    while any(change.remove) or any(change.add):
        move = _next_slice(change) or _next_all_to_all(change) or _next_gather(change, active)
        if move is None:
            stuck = True
            dim = next(d for d, axes in enumerate(change.remove) if axes)
            count = len(change.remove[dim]) if change.whole_out[dim] else 1
            axes = change.drop(dim, count)
            move = Move(kind="all_gather", axes=axes, dim=dim, after=change.layout())
        moves.append(move)
    # An axis that was gathered invarying inside a stuck sequence and is not split again must end
    # varying where the consumer is active over it.
    lost = _lost_axes(moves, active - layout_axes(target), layout_axes(source), axis_sizes)
    if lost:
        moves.append(Move(kind="cast", axes=lost, after=change.layout()))
    return tuple(moves), stuck


def _lost_axes(
    moves: Sequence[Move],
    wanted: frozenset[str],
    start: frozenset[str],
    axis_sizes: Mapping[str, int],
) -> tuple[str, ...]:
    """Axes over which the consumer is active but the moved value is replicated."""
    varying = set(start)
    for move in moves:
        if move.kind == "all_gather" and not move.varying:
            varying -= set(move.axes)
        elif move.kind in ("slice", "cast"):
            varying |= set(move.axes)
    return tuple(axis for axis in axis_sizes if axis in wanted - varying)


def _slices(change: _Change) -> list[Move]:
    moves = []
    while (move := _next_slice(change)) is not None:
        moves.append(move)
    return moves


def _next_slice(change: _Change) -> Move | None:
    busy = {axis for axes in change.remove for axis in axes}
    for dim, wanted in enumerate(change.add):
        if change.remove[dim] or not wanted:
            continue
        count = len(list(itertools.takewhile(lambda axis: axis not in busy, wanted)))
        if count == 0 or (change.whole_in[dim] and count < len(wanted)):
            continue
        axes = change.take(dim, count)
        return Move(kind="slice", axes=axes, dim=dim, after=change.layout())
    return None


def _next_all_to_all(change: _Change) -> Move | None:
    for dim, gone in enumerate(change.remove):
        for to_dim, wanted in enumerate(change.add):
            if dim == to_dim or not gone or not wanted or change.remove[to_dim]:
                continue
            for count in range(min(len(gone), len(wanted)), 0, -1):
                if gone[-count:] != wanted[:count]:
                    continue
                if change.whole_out[dim] and count < len(gone):
                    continue
                if change.whole_in[to_dim] and count < len(wanted):
                    continue
                axes = change.drop(dim, count)
                change.take(to_dim, count)
                return Move(
                    kind="all_to_all", axes=axes, dim=dim, to_dim=to_dim, after=change.layout()
                )
    return None


def _next_gather(change: _Change, active: frozenset[str]) -> Move | None:
    coming = {axis for axes in change.add for axis in axes}
    for dim, gone in enumerate(change.remove):
        if not gone or gone[-1] in coming:
            continue
        varying = gone[-1] in active
        count = 0
        while count < len(gone):
            axis = gone[-1 - count]
            if axis in coming or (axis in active) != varying:
                break
            count += 1
        if change.whole_out[dim] and count < len(gone):
            if set(gone) & coming:
                continue
            # Blocks of an uneven dimension come together in one gather; if only some axes are
            # active, gather as replicated and cast afterwards.
            count, varying = len(gone), False
        axes = change.drop(dim, count)
        return Move(kind="all_gather", axes=axes, dim=dim, varying=varying, after=change.layout())
    return None


def move_collectives(
    shape: Sequence[int],
    itemsize: int,
    source: Layout,
    moves: Sequence[Move],
    axis_sizes: Mapping[str, int],
    *,
    gradient: bool,
) -> tuple[Collective, ...]:
    """The collectives that the moves perform.

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
    result: list[Collective] = []

    def emit(kind: str, axes: tuple[str, ...], elements: int, backward: bool) -> None:
        if elements and (gradient or not backward):
            result.append(
                Collective(kind=kind, axes=axes, num_bytes=elements * itemsize, backward=backward)
            )

    layout = source
    for move in moves:
        before = math.prod(local_shape(shape, layout, axis_sizes))
        after = math.prod(local_shape(shape, move.after, axis_sizes))
        if move.kind == "slice":
            emit("all-gather", move.axes, after, True)
        elif move.kind == "cast":
            emit("all-reduce", move.axes, after, True)
        elif move.kind == "all_to_all":
            # The dimension that is split next is padded before, the other trimmed afterwards.
            block = list(local_shape(shape, layout, axis_sizes))
            parts = degree(move.axes, axis_sizes)
            block[move.to_dim] = cdiv(block[move.to_dim], parts) * parts
            emit("all-to-all", move.axes, math.prod(block), False)
            emit("all-to-all", move.axes, math.prod(block), True)
        elif move.kind == "all_gather":
            emit("all-gather", move.axes, before, False)
            if move.varying:
                full = before * degree(move.axes, axis_sizes)
                emit("reduce-scatter", move.axes, full, True)
        else:
            emit("collective-permute", move.axes, before, False)
            emit("collective-permute", move.axes, before, True)
        layout = move.after
    return tuple(result)


def wire_bytes(collective: Collective, axis_sizes: Mapping[str, int]) -> float:
    """Bytes that one device sends under the ring algorithm.

    Source: the usual ring counts; an all-reduce is a reduce-scatter and an all-gather.
    """
    parts = degree(collective.axes, axis_sizes)
    share = (parts - 1) / parts
    factor = {
        "all-reduce": 2 * share,
        "all-gather": float(parts - 1),
        "reduce-scatter": share,
        "all-to-all": share,
        "collective-permute": 1.0,
    }[collective.kind]
    return factor * collective.num_bytes
