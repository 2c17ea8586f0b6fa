"""Arrays on a mesh: what each process feeds to its devices, and nothing more.

Where the mesh spans processes, a process has arrays of its own *box* of a global array: the part
that its devices hold, from the first to the last row and column of any of them. Nothing is sent
between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxlwp.devices import check_same
from jaxlwp.program import array_text

Box = tuple[slice, ...]
"""Rows and columns of an array: one slice with start and stop for each dimension."""


def local_box(sharding: NamedSharding, shape: Sequence[int]) -> Box:
    """The part of a global array that the devices of this process hold.

    Args:
      sharding: of the array.
      shape: of the whole array.

    Returns:
      The smallest box that has all of it: where the mesh puts rows that are apart on one process,
      the rows between them are in it. Empty in a process that has no device of the mesh.
    """
    parts = sharding.addressable_devices_indices_map(tuple(shape)).values()
    ranges = [
        [own.indices(size)[:2] for own, size in zip(part, shape, strict=True)]
        for part in parts
        if part is not None
    ]
    if not ranges:
        return (slice(0, 0),) * len(shape)
    return tuple(
        slice(min(start for start, _ in along), max(stop for _, stop in along))
        for along in zip(*ranges, strict=True)
    )


def box_shape(box: Box) -> tuple[int, ...]:
    """Rows and columns of a box, how many."""
    return tuple(part.stop - part.start for part in box)


def check_share(name: str, array: Any, shape: Sequence[int], sharding: NamedSharding) -> None:
    """Check that an array of the batch is whole, or this process's box of it.

    Args:
      name: of the array.
      array: what was given.
      shape: of the whole array.
      sharding: of the whole array.

    Raises:
      ValueError: it has another shape.
    """
    have = tuple(jax.typeof(array).shape)
    if have == tuple(shape):
        return
    share = box_shape(local_box(sharding, shape))
    if have != share:
        wanted = f"{tuple(shape)}"
        if share != tuple(shape):
            wanted += f" and this process holds {share} of it (plan.local_batch says which)"
        raise ValueError(
            f"place_batch: {name} has shape {have}, but the plan was made for {wanted}; drop or "
            "pad the last incomplete batch, or make a plan for the new shape"
        )


def leaf_type(path: Sequence[Any], leaf: Any) -> Any:
    """Shape and dtype of a leaf of a training state.

    Args:
      path: of the leaf.
      leaf: an array, a number, or the shape of an array.

    Raises:
      TypeError: it is something else.
    """
    try:
        return jax.typeof(leaf)
    except TypeError:
        raise TypeError(
            f"training state: state{jax.tree_util.keystr(tuple(path))} is a "
            f"{type(leaf).__name__}, which has no place on devices; pass arrays, numbers or their "
            "shapes, and keep all else out of the pytree"
        ) from None


def check_leaves(leaves: Sequence[tuple[Any, Any]], mesh: Mesh) -> None:
    """Check that the leaves of a training state are the same in all processes, by digest.

    Args:
      leaves: (path, leaf); of leaves that are global already, only the shape counts.
      mesh: whose processes take part.

    Raises:
      ValueError: one differs, in every process.
    """
    lines = [f"{jax.tree_util.keystr(path)}: {array_text(leaf)}" for path, leaf in leaves]
    remedy = (
        "initialise from the same random key in all processes, or in parts: "
        "jax.jit(init, out_shardings=plan.state_shardings(jax.eval_shape(init, key)))(key)"
    )
    check_same("place", {"training states": lines}, mesh, remedy)


def put_share(array: Any, sharding: NamedSharding, shape: Sequence[int] | None = None) -> Any:
    """A global array, of which this process has the whole or its box.

    Every device of this process gets its part; no other process is asked.

    Args:
      array: whole, or of the box's shape; or global already, then it is resharded.
      sharding: of the global array.
      shape: of the global array, if this process may have its box alone.
    """
    if isinstance(array, jax.core.Tracer) or is_global(array):
        return jax.device_put(array, sharding)
    given = jax.typeof(array)
    shape = given.shape if shape is None else shape
    whole = tuple(given.shape) == tuple(shape)
    origin = [0 if whole else part.start for part in local_box(sharding, shape)]

    def part(index: tuple[slice, ...] | None) -> Any:
        assert index is not None
        ranges = [own.indices(size) for own, size in zip(index, shape, strict=True)]
        own = tuple(
            slice(start - first, stop - first)
            for (start, stop, _), first in zip(ranges, origin, strict=True)
        )
        return array[own] if own else array

    return jax.make_array_from_callback(tuple(shape), sharding, part, given.dtype)


def is_global(array: Any) -> bool:
    """Whether an array is one of several processes, each of which holds a part."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable
