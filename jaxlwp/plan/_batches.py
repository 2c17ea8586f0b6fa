"""Batches on a mesh, whole or each process's own part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlwp.devices import spans_processes
from jaxlwp.plan._placing import check_share, local_box, put_share
from jaxlwp.program import Arguments, arguments_difference, canonical, positional_names


def put_batch(given: list[Any], shapes: list[Any], shardings: list[Any], mesh: Mesh) -> list[Any]:
    """Put the arguments after the parameters on the mesh.

    Args:
      given: the arguments, whole or this process's box of each array.
      shapes: of the whole arrays, in the same structure.
      shardings: of the whole arrays, in the same structure.
      mesh: whose devices they are.

    Raises:
      ValueError: an array has another shape than the whole one and the box.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(given)
    wanted = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
    for (path, leaf), (want, sharding) in zip(leaves, wanted, strict=True):
        check_share(f"args{jax.tree_util.keystr(path)}", leaf, want.shape, sharding)
    if not spans_processes(mesh):
        placed: list[Any] = jax.device_put(given, shardings)
        return placed
    flat = [
        put_share(leaf, sharding, want.shape)
        for (_, leaf), (want, sharding) in zip(leaves, wanted, strict=True)
    ]
    return list(jax.tree.unflatten(tree, flat))


def batch_boxes(shapes: Arguments, shardings: Arguments) -> tuple[Any, ...]:
    """The boxes of the batch that this process feeds; those of arguments by name come last.

    Args:
      shapes: of (params, *batch), and of arguments by name.
      shardings: of the same.
    """
    boxes: Arguments = jax.tree.map(
        lambda shape, sharding: local_box(sharding, shape.shape), shapes, shardings
    )
    return (*boxes[0][1:], boxes[1]) if boxes[1] else boxes[0][1:]


def batch_parts(
    function: Callable[..., Any] | None,
    batch: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *known: Arguments,
) -> tuple[list[Any], ...]:
    """The arguments given to `place_batch`, and of each thing known the parts that belong to them.

    Args:
      function: the plan's, by which arguments by name find their place.
      batch: the arguments after the parameters, or the first few.
      keywords: arguments by name.
      *known: shapes first, then what else is known, each of all of the plan's arguments.

    Returns:
      What was given, and the parts of each thing known, in the same structure.

    Raises:
      ValueError: the structure is another one than that of the shapes.
    """
    args, named = canonical("place_batch", function, (None, *batch), keywords, partial=True)
    given = [*args[1:], named] if named else list(args[1:])
    parts = [
        [*positional[1 : len(args)], {name: by_name.get(name) for name in named}]
        if named
        else [*positional[1 : len(args)]]
        for positional, by_name in known
    ]
    have: Any = jax.tree.structure(given)
    expected: Any = jax.tree.structure(parts[0])
    if have != expected:
        names = positional_names(function, len(known[0][0]))[1:]
        found = arguments_difference(have, expected, names)
        raise ValueError(
            f"place_batch: {found}, when the plan was made; pass what the function takes after its "
            f"parameters ({', '.join(names)}), or the first few of them"
        )
    return given, *parts
