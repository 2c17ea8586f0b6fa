"""Collectives inside `jax.shard_map`: the only module that calls those of JAX.

*The order of mesh axes.* Several axes named together, as in ("data", "model"), number the devices
along them; the first is the major one. Layouts, configs and halo exchanges count in the order in
which they name the axes, which need not be the order of the mesh. JAX's gathers, scatters,
all-to-alls, `axis_index` and PartitionSpecs count in the order given; `ppermute` alone counts in
the order of the mesh, whatever is given (from JAX 0.12 on it refuses any other). `permute` takes
pairs in the order given. All other modules call what is here, so none relies on an order of its
own (`tests/test_architecture.py` holds them to it).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Axes = tuple[str, ...]
"""Mesh axes, major to minor."""


def device_index(axes: Axes) -> Any:
    """Number of this device along the axes; 0 for no axes."""
    return lax.axis_index(axes) if axes else 0


def vary(x: Any, axes: Iterable[str]) -> Any:
    """Mark a replicated value as varying over the axes; its cotangent is summed over them."""
    axes = tuple(axes)
    return lax.pcast(x, axes, to="varying") if axes else x


def all_reduce(x: Any, axes: Axes) -> Any:
    """Sum over the devices along the axes."""
    return lax.psum(x, axes)


def put_together(blocks: Sequence[Any]) -> Any:
    """Arrays of one dtype side by side in one array; `taken_apart` is the way back.

    Rows of numbers, of one rank, stay what they are; other arrays become vectors.
    """
    if _rows(blocks):
        return lax.concatenate(blocks, blocks[0].ndim - 1)
    return lax.concatenate([lax.reshape(block, (block.size,)) for block in blocks], 0)


def taken_apart(together: Any, like: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays that were put together, by their shapes."""
    ends = itertools.accumulate(each.size for each in like)
    return tuple(
        lax.reshape(
            lax.slice_in_dim(together, end - each.size, end, axis=together.ndim - 1), each.shape
        )
        for end, each in zip(ends, like, strict=True)
    )


def _rows(blocks: Sequence[Any]) -> bool:
    """Whether arrays are of one rank, and have no dimension larger than 1 but the last."""
    ranks = {block.ndim for block in blocks}
    return len(ranks) == 1 and all(block.shape[-1:] == (block.size,) for block in blocks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def all_reduce_together(blocks: Sequence[Any], axes: Axes) -> tuple[Any, ...]:
    """Sums of several small arrays of one dtype over the devices along the axes, in one all-reduce.

    Each is differentiated by itself: the transpose of taking the sums apart would be padding.
    """
    return _summed_together(blocks, axes)


@functools.partial(all_reduce_together.defjvp, symbolic_zeros=True)
def _(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (blocks,), (dots,) = primals, tangents
    sums = _summed_together(blocks, axes)
    return sums, tuple(
        jnp.zeros_like(total) if isinstance(dot, SymbolicZero) else all_reduce(dot, axes)
        for total, dot in zip(sums, dots, strict=True)
    )


def _summed_together(blocks: Sequence[Any], axes: Axes) -> tuple[Any, ...]:
    return taken_apart(all_reduce(put_together(blocks), axes), blocks)


def all_reduce_max(x: Any, axes: Axes) -> Any:
    """Maximum over the devices along the axes."""
    return lax.pmax(x, axes)


def all_reduce_min(x: Any, axes: Axes) -> Any:
    """Minimum over the devices along the axes."""
    return lax.pmin(x, axes)


def all_gather(x: Any, axes: Axes, dim: int, *, varying: bool) -> Any:
    """Blocks of a dimension put together in the order of the devices along the axes.

    Args:
      x: this device's block.
      axes: mesh axes that split the dimension.
      dim: the dimension.
      varying: the result is used differently by each device, so its transpose is a reduce-scatter;
        otherwise it is to take one's own block.
    """
    return lax.all_gather(x, axes, axis=dim, tiled=True, to="varying" if varying else "invarying")


def reduce_scatter(x: Any, axes: Axes, dim: int) -> Any:
    """This device's block, along a dimension, of the sum over the devices along the axes."""
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def all_to_all(x: Any, axes: Axes, *, split_dim: int, concat_dim: int) -> Any:
    """Split `split_dim` among the devices along the axes, and put `concat_dim` together.

    XLA takes an all-to-all apart into pieces. A piece that it knows (padding alone, or an operand
    of what was stacked) may get a layout of its own, and XLA for processors refuses pieces of two
    layouts ("HLO all-to-all has operands with different shapes", JAX 0.10.2). There pieces are kept
    from being known: those of `x`, and of the cotangent, which is sent the other way.
    """
    if not _on_processors():
        return lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True)
    x = lax.all_to_all(lax.optimization_barrier(x), axes, split_dim, concat_dim, tiled=True)
    return lax.optimization_barrier(x)


def _on_processors() -> bool:
    """Whether the mesh around is of processors."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def permute(x: Any, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Any:
    """Send blocks among devices; who receives nothing has zeros.

    Args:
      x: this device's block.
      axes: mesh axes along which devices are counted, major to minor.
      pairs: (sender, receiver), numbers of devices along `axes` in the order given.
    """
    sizes = dict(zip(*_mesh_axes(), strict=True))
    in_mesh_order = tuple(name for name in sizes if name in axes)
    if in_mesh_order != axes:
        shape = [sizes[name] for name in axes]
        places = [axes.index(name) for name in in_mesh_order]

        def renumbered(device: int) -> int:
            coordinates = _coordinates(device, shape)
            return _number([coordinates[p] for p in places], [shape[p] for p in places])

        pairs = [(renumbered(sender), renumbered(receiver)) for sender, receiver in pairs]
    return lax.ppermute(x, in_mesh_order, pairs)


def _mesh_axes() -> tuple[tuple[str, ...], tuple[int, ...]]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(mesh.axis_names), tuple(mesh.axis_sizes)


def _coordinates(device: int, shape: Sequence[int]) -> list[int]:
    """Position of a device along each axis, from its number."""
    result = []
    for size in reversed(shape):
        device, position = divmod(device, size)
        result.append(position)
    return result[::-1]


def _number(coordinates: Sequence[int], shape: Sequence[int]) -> int:
    result = 0
    for position, size in zip(coordinates, shape, strict=True):
        result = result * size + position
    return result
