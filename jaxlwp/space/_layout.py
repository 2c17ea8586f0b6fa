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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jaxlwp.space._config import Layout

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


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def degree(axes: Sequence[str], axis_sizes: Mapping[str, int]) -> int:
    """Number of parts into which the mesh axes split a dimension."""
    parts = 1
    for axis in axes:  # half the time of `math.prod`, and nothing is called as often
        parts *= axis_sizes[axis]
    return parts


def layout_axes(layout: Layout) -> frozenset[str]:
    """All mesh axes that split some dimension."""
    return frozenset().union(*layout)


def local_shape(
    shape: Sequence[int], layout: Layout, axis_sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Shape of each device's block, padding included."""
    return tuple(cdiv(s, degree(axes, axis_sizes)) for s, axes in zip(shape, layout, strict=True))


def copied_bytes(
    shape: Sequence[int],
    itemsize: int,
    sources: Sequence[Layout],
    targets: Sequence[Layout],
    axis_sizes: dict[str, int],
) -> NDArray[np.int64]:
    """Bytes per device of what is laid out anew, shape (sources, targets): 0 where it stays."""
    numbers = {layout: n for n, layout in enumerate(dict.fromkeys((*sources, *targets)))}
    differ = np.not_equal.outer([numbers[x] for x in sources], [numbers[x] for x in targets])
    num_bytes = [itemsize * math.prod(local_shape(shape, x, axis_sizes)) for x in targets]
    return differ * np.array(num_bytes, dtype=np.int64)


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
