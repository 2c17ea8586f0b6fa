"""The function that a plan is made of: what it returns and changes, and what its layers keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlwp.cost import SearchSpace, layer_configs, price
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph
from jaxlwp.mesh import no_mesh
from jaxlwp.program import Arguments
from jaxlwp.space import Strategy, outputs_kept


def output_shapes(fn: Callable[..., Any], arguments: Arguments) -> Any:
    """Shapes and dtypes of what a function returns.

    Args:
      fn: the function.
      arguments: (params, *batch), and arguments by name; arrays or shapes.
    """
    args, keywords = jax.eval_shape(lambda *given: given, *arguments)  # without their shardings
    with no_mesh():
        return jax.eval_shape(lambda *args, **keywords: fn(*args, **keywords), *args, **keywords)


def is_loss(out: Any) -> bool:
    """Whether the (first) output is one floating-point scalar.

    Args:
      out: shapes and dtypes of what a function returns.
    """
    leaves = jax.tree.leaves(out[0] if isinstance(out, tuple) and out else out)
    return (
        len(leaves) == 1 and leaves[0].shape == () and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    )


def kept_space(graph: ComputationGraph, devices: DeviceGraph, strategy: Strategy) -> SearchSpace:
    """A space in which layers of a strategy's names have its configs alone, and others have all.

    Args:
      graph: of another function, or another batch size.
      devices: the strategy's.
      strategy: whose configs are kept, as far as the layers can be split so.
    """
    others = iter(
        layer_configs([n for n in graph.layers if n.name not in strategy.configs], devices)
    )
    configs = [
        (strategy.configs[layer.name].within(layer.dimensions, layer.even, devices.axis_sizes),)
        if layer.name in strategy.configs
        else next(others)
        for layer in graph.layers
    ]
    constraints = outputs_kept(graph, None, devices.axis_sizes)
    return price(graph, devices, constraints=constraints, configs=configs)


def write_back(arguments: Arguments, changed: Arguments) -> None:
    """Update NNX modules and random streams in the arguments with their changed state.

    Args:
      arguments: as a plan was called with them.
      changed: the same with new state in place of what the function changes.
    """
    olds, news = (
        jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Pytree))
        for tree in (arguments, changed)
    )
    for old, new in zip(olds, news, strict=True):
        if isinstance(old, nnx.Pytree):
            nnx.update(old, nnx.state(new))
