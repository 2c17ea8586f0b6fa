"""Prices of many changes of layout at once: every pair of configs on an edge.

An edge has up to ten thousand pairs of layouts, and a network hundreds of edges. Yet few of these
changes differ in more than the names of mesh axes and the places of dimensions that are not split:
each kind is planned once. And what a change sends is a number of blocks of the array, so that a
list of changes is priced for arrays of many sizes: all that have the same greatest common divisors
with the number of devices, and therefore the same moves to choose from.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlwp.devices import DeviceGraph
from jaxlwp.solver import FloatArray
from jaxlwp.space import COLLECTIVES, Layout, degree, move_exchanges, plan_options

IntArray = NDArray[np.int64]

Wanted = tuple[Layout, frozenset[str]]
"""What a reader asks for: a layout, and the axes over which it is active."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Changes:
    """Changes of layout as exchanges of blocks; made by `changes`.

    A change has one or several sequences of moves: the first that sends least is carried out.

    Attributes:
      count: how many changes there are.
      change: for each sequence, ascending, the change that it carries out.
      sequence: for each exchange, ascending, the sequence that it is part of.
      block: for each exchange, the row of `degrees` that says what its blocks are.
      weight: for each exchange, blocks that a device sends, times the number of devices.
      latency_s: for each exchange, seconds beside the bytes, however often it runs.
      byte_s: for each exchange, seconds for each byte of a block, likewise.
      joined: for each exchange that shares its start with others of its bucket, blocks of which a
        device's operand is made; 0 for one that starts alone.
      bucket_bytes: what a bucket holds.
      degrees: shape (blocks, rank), into how many parts each dimension is split.
    """

    count: int
    change: IntArray
    sequence: IntArray
    block: IntArray
    weight: IntArray
    latency_s: FloatArray
    byte_s: FloatArray
    joined: IntArray
    bucket_bytes: float
    degrees: IntArray

    def seconds(self, shape: Sequence[int], itemsize: int) -> FloatArray:
        """Shape (count,): seconds of every change for an array of the given global shape."""
        if math.prod(shape) == 0:
            return np.zeros(self.count)
        blocks = np.prod(-(-np.array(shape, dtype=np.int64) // self.degrees), axis=1)
        elements = blocks[self.block]
        latency_s = self.latency_s
        if self.bucket_bytes:
            share = itemsize * self.joined * elements / self.bucket_bytes
            latency_s = latency_s * np.where(self.joined > 0, np.minimum(share, 1.0), 1.0)
        total_s = self._sums(latency_s + itemsize * self.byte_s * elements)
        if len(self.change) == self.count:
            return total_s
        sent = self._sums(self.weight * elements)  # whole numbers: the same compares as equal
        first = np.searchsorted(self.change, np.arange(self.count))
        least = sent == np.minimum.reduceat(sent, first)[self.change]
        numbers = np.where(least, np.arange(len(least)), len(least))
        return total_s[np.minimum.reduceat(numbers, first)]

    def _sums(self, values: NDArray[Any]) -> FloatArray:
        """Sums over the exchanges of each sequence."""
        sums = np.bincount(self.sequence, weights=values, minlength=len(self.change))
        return sums.astype(np.float64, copy=False)


@functools.lru_cache(maxsize=64)
def changes(
    sources: tuple[Layout, ...],
    targets: tuple[Wanted, ...],
    every_pair: bool,
    shape: tuple[int, ...],
    forward: int,
    backward: int,
    devices: DeviceGraph,
    wait_s: float = 0.0,
    bucket_bytes: float = 0.0,
) -> Changes:
    """The changes between layouts.

    Args:
      sources: layouts before.
      targets: what the readers ask for.
      every_pair: every source with every target, as a flattened matrix with the sources as rows;
        otherwise each source with the target in its place.
      shape: for each size of the arrays, its greatest common divisor with the number of devices.
      forward: how many times the moves run.
      backward: how many times their transposes run.
      devices: mesh axes and their rates.
      wait_s: seconds that devices wait for one another, once before the moves and once before
        their transposes; 0 for what no layer waits for.
      bucket_bytes: of collectives that share a start, and wait for no layer; 0 if each starts. An
        exchange pays for its share of a start, so that prices stay those of pairs.
    """
    assert not (wait_s and bucket_bytes)
    rows, columns = np.arange(len(sources)), np.arange(len(targets))
    if every_pair:
        rows, columns = np.repeat(rows, len(targets)), np.tile(columns, len(sources))
    active = [[axis.name in axes for axis in devices.axes] for _, axes in targets]
    pairs = _pairs(
        _places(sources, devices).take(rows),
        _places([layout for layout, _ in targets], devices).take(columns),
        np.array(active, dtype=bool)[columns],
        np.array([axis.size for axis in devices.axes], dtype=np.int64),
        np.array(shape, dtype=np.int64),
    )
    keys, plan_of = np.unique(pairs.keys, axis=0, return_inverse=True)
    plans = [_plan(tuple(key), len(devices.axes)) for key in keys.tolist()]
    return _spread(
        plans, plan_of.reshape(-1), pairs, (forward, backward), devices, wait_s, bucket_bytes
    )


# --- which changes are alike -------------------------------------------------------------------


class _Places(NamedTuple):
    """Where each mesh axis is in each of some layouts."""

    dim: IntArray  # shape (layouts, axes): the dimension that the axis splits, or -1
    rank: IntArray  # shape (layouts, axes): how many axes split that dimension before it
    degrees: IntArray  # shape (layouts, dimensions)

    def take(self, rows: IntArray) -> _Places:
        return _Places(self.dim[rows], self.rank[rows], self.degrees[rows])


def _places(layouts: Sequence[Layout], devices: DeviceGraph) -> _Places:
    number = {axis.name: n for n, axis in enumerate(devices.axes)}
    dim = np.full((len(layouts), len(number)), -1)
    rank = np.zeros_like(dim)
    for row, layout in enumerate(layouts):
        for d, axes in enumerate(layout):
            for r, axis in enumerate(axes):
                dim[row, number[axis]], rank[row, number[axis]] = d, r
    sizes = devices.axis_sizes
    degrees = [[degree(axes, sizes) for axes in layout] for layout in layouts]
    return _Places(dim, rank, np.array(degrees, dtype=np.int64).reshape(len(layouts), -1))


class _Pairs(NamedTuple):
    """Changes of layout without what their moves do not depend on, and the way back.

    Left out are the dimensions that are never split, and the names of the mesh axes. An axis
    becomes a number: its size, where it is before and after (0 for nowhere, else counted over the
    split dimensions), whether the reader is active over it. The axes are sorted by that number.
    """

    keys: IntArray  # shape (changes, 1 + axes + dimensions); see `_plan`
    axes: IntArray  # shape (changes, axes): the mesh axis behind each axis of the key
    dims: IntArray  # shape (changes, dimensions): the dimension behind each one of the key


def _pairs(
    before: _Places, after: _Places, active: NDArray[np.bool_], sizes: IntArray, shape: IntArray
) -> _Pairs:
    every = np.arange(len(shape))
    splits = [(end.dim[:, :, None] == every).sum(axis=1) for end in (before, after)]
    most = np.maximum(*splits)
    split = most > 0
    place = np.pad(np.cumsum(split, axis=1), ((0, 0), (0, 1)))  # column -1 for nowhere: 0
    numbers = np.broadcast_to(sizes, active.shape)
    for end in (before, after):
        where = np.take_along_axis(place, end.dim, axis=1) * len(sizes) + end.rank
        numbers = numbers * _num_places(len(shape), len(sizes)) + where
    numbers = numbers * 2 + active
    uneven = 2 * (shape % before.degrees != 0) + (shape % after.degrees != 0)
    # What only one axis splits is never moved in parts: even or not, the moves are the same.
    uneven = np.where(most > 1, uneven, 3)
    axes = np.argsort(numbers, axis=1, kind="stable")
    dims = np.argsort(~split, axis=1, kind="stable")
    keys = (
        split.sum(axis=1, keepdims=True),
        np.take_along_axis(numbers, axes, axis=1),
        np.take_along_axis(uneven, dims, axis=1),
    )
    return _Pairs(np.concatenate(keys, axis=1), axes, dims)


def _num_places(rank: int, axes: int) -> int:
    """A bound of the numbers that say where an axis is: dimension (0 for none) and position."""
    return (rank + 1) * axes


_Piece = tuple[int, ...]
"""An exchange: number of its kind, axes as bits, backward, blocks, weight, degree of each dim."""


@functools.cache
def _plan(key: tuple[int, ...], axes: int) -> tuple[tuple[_Piece, ...], ...]:
    """The sequences of moves of a change, as exchanges.

    Args:
      key: how many dimensions are split, a number for each axis (see `_Pairs`), and for each
        dimension 2 if it is uneven before, plus 1 if it is uneven after.
      axes: how many axes there are.
    """
    rank = len(key) - 1 - axes
    layouts = [[[""] * axes for _ in range(rank + 1)] for _ in range(2)]
    axis_sizes: dict[str, int] = {}
    active = set()
    for n, number in enumerate(key[1 : 1 + axes]):
        number, reads = divmod(number, 2)
        number, after = divmod(number, _num_places(rank, axes))
        axis_sizes[str(n)], before = divmod(number, _num_places(rank, axes))
        active.update([str(n)] * reads)
        for layout, where in zip(layouts, (before, after), strict=True):
            layout[where // axes][where % axes] = str(n)
    dims = slice(1, 1 + key[0])  # without the place called nowhere
    source, target = (tuple(tuple(filter(None, d)) for d in layout[dims]) for layout in layouts)
    uneven = tuple((bool(odd & 2), bool(odd & 1)) for odd in key[1 + axes :][: key[0]])
    options = plan_options(source, target, frozenset(active), uneven, tuple(axis_sizes.items()))
    unsplit = (1,) * (rank - key[0])
    return tuple(
        tuple(
            (
                COLLECTIVES.index(exchange.kind),
                sum(1 << int(axis) for axis in exchange.axes),
                exchange.backward,
                exchange.blocks,
                exchange.weight(axis_sizes),
                *exchange.degrees,
                *unsplit,
            )
            for exchange in move_exchanges(source, moves, axis_sizes)
        )
        for moves in options
    )


# --- prices --------------------------------------------------------------------------------------

_JOINED = np.array([kind in ("all-reduce", "all-gather", "reduce-scatter") for kind in COLLECTIVES])
"""The kinds that XLA joins. Source: its passes AllReduceCombiner and the like."""


def _spread(
    plans: Sequence[Sequence[Sequence[_Piece]]],
    plan_of: IntArray,
    pairs: _Pairs,
    runs: tuple[int, int],
    devices: DeviceGraph,
    wait_s: float,
    bucket_bytes: float,
) -> Changes:
    """The plans' sequences and exchanges for every change, in its own axes and dimensions."""
    sequences = [sequence for plan in plans for sequence in plan]
    change, sequence_of = _members([len(plan) for plan in plans], plan_of)
    sequence, piece_of = _members([len(pieces) for pieces in sequences], sequence_of)
    rank = pairs.dims.shape[1]
    flat = itertools.chain.from_iterable(itertools.chain.from_iterable(sequences))
    pieces = np.fromiter(flat, dtype=np.int64).reshape(-1, 5 + rank)[piece_of]
    kind, bits, backward, blocks, weight = pieces[:, :5].T
    owner = change[sequence]
    axes = np.zeros_like(bits)
    for n in range(len(devices.axes)):
        axes |= (bits >> n & 1) << pairs.axes[owner, n]
    latency_s, byte_s = _link_rates(devices)
    times = np.array(runs)[backward]
    waits_s = np.zeros(len(owner))
    waits_s[np.unique(2 * sequence + backward, return_index=True)[1]] = wait_s
    degrees = np.empty((len(owner), rank), dtype=np.int64)
    np.put_along_axis(degrees, pairs.dims[owner], pieces[:, 5:], axis=1)
    numbers = degrees @ (devices.num_devices + 1) ** np.arange(rank)
    _, first, block = np.unique(numbers, return_index=True, return_inverse=True)
    return Changes(
        count=len(plan_of),
        change=change,
        sequence=sequence,
        block=block,
        weight=weight,
        latency_s=(latency_s[kind, axes] + waits_s) * times,
        byte_s=byte_s[kind, axes] * blocks * times,
        joined=np.where(_JOINED[kind], blocks, 0) if bucket_bytes else np.zeros_like(blocks),
        bucket_bytes=bucket_bytes,
        degrees=degrees[first],
    )


def _members(sizes: Sequence[int], groups: IntArray) -> tuple[IntArray, IntArray]:
    """Members of groups; members are numbered group by group.

    Args:
      sizes: how many members each group has.
      groups: some groups, in any order.

    Returns:
      For every member of every group in `groups`: the position of the group there, the member.
    """
    counts = np.array(sizes, dtype=np.int64)
    starts = (np.cumsum(counts) - counts)[groups]
    counts = counts[groups]
    owner = np.repeat(np.arange(len(groups)), counts)
    place = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    return owner, starts[owner] + place


@functools.lru_cache(maxsize=8)
def _link_rates(devices: DeviceGraph) -> tuple[FloatArray, FloatArray]:
    """Seconds of a collective beside its bytes, and for each byte; shape (kinds, sets of axes)."""
    names = [axis.name for axis in devices.axes]
    rates = np.zeros((2, len(COLLECTIVES), 1 << len(names)))
    for bits in range(1, 1 << len(names)):
        axes = tuple(name for n, name in enumerate(names) if bits >> n & 1)
        for n, kind in enumerate(COLLECTIVES):
            rates[:, n, bits] = devices.link_rate(kind, axes)
    return rates[0], rates[1]
