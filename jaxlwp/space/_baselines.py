"""Baselines: every layer split by one dimension, over as many devices as it allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxlwp.graph import Outlined
from jaxlwp.space._config import Config
from jaxlwp.space._strategy import Strategy, make_strategy

PARAMETER_KINDS = ("conv", "dense")

PREFERENCES: dict[str, Mapping[str, tuple[str, ...]]] = {
    # Layer kind -> dimensions in order of preference; "" is every other kind.
    "data": {"": ("sample",)},
    "model": {"conv": ("channel",), "dense": ("channel",), "": ("channel", "sample")},
    "owt": {"dense": ("channel",), "": ("sample",)},
    "spatial": {"": ("height", "length", "depth", "sample")},
}
"""The baselines: data parallel; model parallel, every layer's parameters split over all devices;
one weird trick (Krizhevsky, arXiv 1404.5997), convolution and pooling by sample and dense layers
by channel; and height."""

BASELINES = tuple(PREFERENCES)
"""Names of the baselines: "data", "model", "owt" (one weird trick), "spatial"."""


def baseline(
    name: str,
    graph: Outlined,
    configs: Sequence[Sequence[Config]],
    axis_sizes: Mapping[str, int],
) -> Strategy:
    """A baseline strategy: every layer split by one dimension over as many devices as it allows.

    Args:
      name: one of `BASELINES`.
      graph: the computation graph.
      configs: the configs of each layer.
      axis_sizes: devices along each mesh axis.

    Raises:
      ValueError: an unknown name, or data parallelism with a batch that the devices do not
        divide.
    """
    if name not in PREFERENCES:
        raise ValueError(
            f"strategy: {name!r} is unknown; give 'search', one of {BASELINES}, or a Strategy"
        )
    if name in ("data", "owt"):
        _check_batch(name, graph, axis_sizes)
    preferences = PREFERENCES[name]
    chosen = [
        _widest(choices, preferences.get(layer.kind, preferences[""]), axis_sizes)
        for layer, choices in zip(graph.layers, configs, strict=True)
    ]
    return make_strategy(name, graph, chosen, axis_sizes)


def _check_batch(name: str, graph: Outlined, axis_sizes: Mapping[str, int]) -> None:
    devices = math.prod(axis_sizes.values())
    for layer in graph.layers:
        sizes = layer.dimensions.get("sample", ()) if layer.kind in PARAMETER_KINDS else ()
        if any(size % devices for size in sizes):
            raise ValueError(
                f"strategy {name!r}: layer {layer.name} has a batch of {sizes[0]}, which "
                f"{devices} devices do not divide; use a batch that is a multiple of {devices}, "
                "fewer devices, or strategy='search', which also splits unevenly"
            )


def _widest(
    choices: Sequence[Config], dimensions: Sequence[str], axis_sizes: Mapping[str, int]
) -> Config:
    """The config that splits only the first dimension that can be split, as far as it can be."""
    for dimension in dimensions:
        alone = [c for c in choices if len(c.splits) == 1 and c.axes(dimension)]
        if alone:
            return max(alone, key=lambda c: math.prod(axis_sizes[a] for a in c.axes(dimension)))
    # Constraints may have taken the replicated config away.
    return Config() if Config() in choices else choices[0]
