"""The function that a plan is made of: what its layers keep, and what it changes."""

from __future__ import annotations

import jax
from flax import nnx

from jaxlwp.cost import SearchSpace, layer_configs, price
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph
from jaxlwp.program import Arguments
from jaxlwp.space import Strategy, outputs_kept


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
