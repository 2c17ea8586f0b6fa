"""Random meshes and strategies."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxlwp

from .internals import layer_configs

RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)


SHAPES: dict[tuple[int, ...], float] = {
    (2, 4): 3,
    (4, 2): 2,
    (2, 3): 2,
    (3, 2): 2,
    (2, 2): 2,
    (2, 2, 2): 3,
    (2, 3, 2): 2,
    (2, 1, 3): 2,
    (1, 4): 1,
    (4, 1): 1,
    (3, 4): 1,
    (4, 3): 1,
    (3, 2, 2): 1,
    (8,): 1,
    (2,): 1,
    (3,): 1,
    (5,): 0.5,
    (6,): 0.5,
    (1,): 0.5,
    (1, 1): 0.3,
    (2, 5): 0.5,
    (2, 2, 3): 0.5,
}

NAMES = (
    ("data", "model", "pipe"),
    ("a", "b", "c"),
    ("z", "y", "x"),
    ("hosts", "gpus", "cores"),
    ("device0", "device1", "device2"),
)

Splits = dict[str, dict[str, tuple[str, ...]]]
"""Layer -> dimension -> mesh axes."""


@dataclass(frozen=True)
class MeshCase:
    """A mesh and how a plan is used on it.

    Attributes:
      shape: devices along each axis.
      names: of the axes.
      explicit: axis types, Explicit or Auto.
      devices: indices of the devices, in the mesh's order.
      placed: arguments are put where the plan wants them.
      entered: all runs under `jax.set_mesh`.
      checked_first: the layers are checked before the plan is called.
      turned: the plan is bound to a mesh of the same axes in the opposite order.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    explicit: bool
    devices: tuple[int, ...]
    placed: bool
    entered: bool
    checked_first: bool
    turned: bool = False

    @property
    def label(self) -> str:
        """For counting."""
        kind = "explicit" if self.explicit else "auto"
        kind += " turned" if self.turned else ""
        habit = "set_mesh" if self.entered else ("placed" if self.placed else "unplaced")
        return f"{'x'.join(map(str, self.shape))} {kind} {habit}"

    def mesh(self) -> Mesh:
        """The mesh."""
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        return Mesh(
            np.array(jax.devices())[list(self.devices)].reshape(self.shape),
            self.names,
            axis_types=(kind,) * len(self.shape),
        )

    def bound_mesh(self) -> Mesh:
        """The mesh that plans are bound to."""
        mesh = self.mesh()
        if not self.turned:
            return mesh
        return Mesh(mesh.devices.T, mesh.axis_names[::-1], axis_types=mesh.axis_types)

    def entered_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which all that has to do with plans happens."""
        return jax.set_mesh(self.bound_mesh()) if self.entered else contextlib.nullcontext()


def draw_mesh(rng: random.Random) -> MeshCase:
    """A random mesh."""
    shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
    devices = list(range(math.prod(shape)))
    if rng.random() < 0.3:
        rng.shuffle(devices)
    return MeshCase(
        shape=shape,
        names=rng.choice(NAMES)[: len(shape)],
        explicit=rng.random() < 0.2,
        devices=tuple(devices),
        placed=rng.random() < 0.5,
        entered=rng.random() < 0.1,
        checked_first=rng.random() < 0.5,
        turned=len(shape) > 1 and rng.random() < 0.05,
    )


def draw_config(rng: random.Random, configs: Sequence[jaxlwp.Config], style: str) -> jaxlwp.Config:
    """A config of a layer; the axes of a dimension in any order."""
    if style != "any":  # those that use most axes come first
        most = max(len(config.used_axes) for config in configs)
        configs = [config for config in configs if len(config.used_axes) == most]
    config = rng.choice(configs)
    return jaxlwp.Config.of(
        {dimension: rng.sample(axes, len(axes)) for dimension, axes in config.splits}
        if style == "turned"
        else dict(config.splits)
    )


def draw_strategies(
    rng: random.Random, graph: jaxlwp.graph.ComputationGraph, axis_sizes: dict[str, int], count: int
) -> list[Splits]:
    """Random strategies from the whole space."""
    spaces = [layer_configs(layer, axis_sizes) for layer in graph.layers]
    strategies = []
    for n in range(count):
        style = ("full", "turned", "any", "full")[n % 4]
        strategies.append(
            {
                layer.name: dict(draw_config(rng, configs, style).splits)
                for layer, configs in zip(graph.layers, spaces, strict=True)
            }
        )
    return strategies


def bind(
    graph: jaxlwp.graph.ComputationGraph,
    splits: Splits,
    case: MeshCase,
    arguments: tuple[Any, ...],
    out_tree: Any,
) -> jaxlwp.Plan:
    """A plan of exactly these configs."""
    configs = [(jaxlwp.Config.of(splits[layer.name]),) for layer in graph.layers]
    devices = jaxlwp.device_graph(case.mesh(), rates=RATES)
    space = jaxlwp.price(graph, devices, configs=configs)
    strategy = space.strategy("pinned", [0] * len(configs))
    return jaxlwp.bind(space, strategy, case.bound_mesh(), arguments, out_tree)
