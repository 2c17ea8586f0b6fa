"""The names of the package that are not public and that the fuzzer needs, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlwp.check._verify import check_layers
from jaxlwp.graph._graph import Layer
from jaxlwp.mesh import no_mesh
from jaxlwp.space._config import Config, enumerate_configs

__all__ = ["check_layers", "layer_configs", "no_mesh"]


def layer_configs(layer: Layer, axis_sizes: Mapping[str, int]) -> tuple[Config, ...]:
    """Every config of a layer: each mesh axis on any dimension, or on none."""
    found: Any = enumerate_configs(
        sizes=layer.dimensions,
        even=layer.even,
        axis_groups=[tuple(axis for axis, size in axis_sizes.items() if size > 1)],
        axis_sizes=axis_sizes,
        interchangeable=False,
    )
    return tuple(found)
