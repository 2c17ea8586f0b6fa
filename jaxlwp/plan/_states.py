"""Training states on a mesh: a leaf goes where the argument that it stands for goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.devices import spans_processes
from jaxlwp.plan._placing import check_leaves, leaf_type, put_share
from jaxlwp.program import Arguments, Value

ShardingFor = Callable[[Sequence[Any], Any], NamedSharding]
"""Sharding of a leaf of a training state, by its path and the leaf or its shape."""


@dataclass(frozen=True)
class StateShardings:
    """Where the leaves of a training state go.

    Attributes:
      arguments: what a leaf may stand for: the end of its path, its shape, its sharding.
      other: the sharding of a leaf that stands for none of them.
    """

    arguments: tuple[tuple[tuple[str, ...], tuple[int, ...], NamedSharding], ...]
    other: NamedSharding

    def __call__(self, path: Sequence[Any], leaf: Any) -> NamedSharding:
        """Sharding of a leaf: of the argument whose path is the longest end of the leaf's own.

        Args:
          path: of the leaf, as of `jax.tree_util.tree_flatten_with_path`.
          leaf: an array, a number, or the shape of an array.

        Raises:
          TypeError: it is something else.
        """
        keys = tuple(map(_key, path))
        shape = tuple(leaf_type(path, leaf).shape)
        found = [
            (len(end), sharding)
            for end, want, sharding in self.arguments
            if want == shape and keys[len(keys) - len(end) :] == end
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else self.other


def state_shardings(
    shapes: Arguments, shardings: Arguments, num_parameters: int, mesh: Any
) -> StateShardings:
    """Where the leaves of a training state go, by where a plan's arguments go.

    Args:
      shapes: of (params, *batch), and of arguments by name.
      shardings: of the same.
      num_parameters: how many leaves `params` has; they come first.
      mesh: the plan's.
    """
    leaves = jax.tree_util.tree_flatten_with_path(shardings)[0]
    arguments = [
        # The path behind which argument it is; one by name is known by that name, too.
        (tuple(map(_key, path[2 - path[0].idx :])), tuple(shape.shape), sharding)
        for (path, sharding), shape in zip(leaves, jax.tree.leaves(shapes), strict=True)
    ]
    # A batch that is a bare array has no path to know it by: its shape alone says nothing.
    known = arguments[:num_parameters] + [a for a in arguments[num_parameters:] if a[0]]
    return StateShardings(tuple(known), NamedSharding(mesh, PartitionSpec()))


def put_state(state: Any, sharding_for: ShardingFor, mesh: Mesh) -> Any:
    """Put a training state on the mesh, in arrays that share no memory with those given.

    Args:
      state: a pytree.
      sharding_for: where each leaf goes.
      mesh: whose devices they are.

    Raises:
      ValueError: a leaf differs between processes.
      TypeError: a leaf is no array or number.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    together = spans_processes(mesh)
    if together:
        check_leaves(leaves, mesh)
    # Copies: device_put shares the buffer that is already on its device, even if told not to.
    own = (leaf.copy() if isinstance(leaf, jax.Array) else leaf for _, leaf in leaves)
    put = put_share if together else jax.device_put
    placed = [
        put(leaf, sharding_for(path, leaf)) for (path, _), leaf in zip(leaves, own, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def abstract_state(state: Any, sharding_for: ShardingFor) -> Any:
    """A training state's shapes, with the shardings of its leaves.

    Args:
      state: a pytree of arrays or their shapes.
      sharding_for: where each leaf goes.

    Raises:
      TypeError: a leaf is no array or number, nor the shape of one.
    """

    def abstract(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        given = leaf_type(path, leaf)
        sharding = sharding_for(path, leaf)
        return jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(abstract, state)


def state_bytes(state: Any, sharding_for: ShardingFor) -> int:
    """Bytes that a training state takes on each device.

    Args:
      state: a pytree of arrays or their shapes.
      sharding_for: where each leaf goes.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return sum(
        math.prod(sharding_for(path, leaf).shard_shape(leaf.shape)) * Value((), leaf.dtype).itemsize
        for path, leaf in leaves
    )


def _key(entry: Any) -> str:
    """Name of one step of a pytree path, whatever its kind."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
