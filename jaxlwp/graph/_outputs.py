"""Where a function's outputs are wanted: what users give, as a layout for each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxlwp.ops import OutputLayout

REPLICATED = "replicated"


def wanted_layouts(outputs: Any, results: Any) -> tuple[OutputLayout | None, ...]:
    """The layout in which each output is wanted; None leaves it as its layer has it.

    Args:
      outputs: "replicated", or a pytree of `PartitionSpec` and None like the function's output,
        or the first levels of such a tree, as `jax.jit` takes `out_shardings`.
      results: shapes of the function's output.

    Raises:
      ValueError: it is none of these, or a PartitionSpec has more entries than an output has
        dimensions.
    """
    leaves: Sequence[Any] = jax.tree_util.tree_leaves_with_path(results)
    if isinstance(outputs, str) and outputs == REPLICATED:
        return tuple(((),) * len(leaf.shape) for _, leaf in leaves)

    def is_leaf(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec)

    given = jax.tree.leaves(outputs, is_leaf=is_leaf)
    if not all(map(is_leaf, given)):
        raise ValueError(
            f"outputs: {outputs!r:.80} is unknown; give 'replicated', PartitionSpecs, in the form "
            "of the function's output, or None to leave them as the layers that make them have them"
        )
    try:
        full = jax.tree.broadcast(outputs, results, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"outputs: {outputs!r:.80} does not have the form of the function's output, "
            f"{jax.tree.structure(results)}; give a PartitionSpec, or None, for each of its arrays"
        ) from error
    specs = jax.tree.leaves(full, is_leaf=is_leaf)
    return tuple(
        _layout(f"outputs{jax.tree_util.keystr(path)}", spec, leaf.shape)
        for (path, leaf), spec in zip(leaves, specs, strict=True)
    )


def _layout(place: str, spec: PartitionSpec | None, shape: tuple[int, ...]) -> OutputLayout | None:
    if spec is None:
        return None
    entries = [
        (entry,) if isinstance(entry, str) else () if entry is None else tuple(entry)
        for entry in spec
    ]
    if len(entries) > len(shape):
        raise ValueError(
            f"{place}: {spec} has {len(entries)} entries, and the output {len(shape)} dimensions; "
            "give at most one entry for each"
        )
    axes = [axis for entry in entries for axis in entry]
    if not all(isinstance(axis, str) for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"{place}: {spec} is to name each mesh axis once, and nothing else")
    return (*entries, *((),) * (len(shape) - len(entries)))
