"""Strategies: one config per layer; the baselines; saving and loading as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlwp._files import is_text, parse_json, read_text, write_file
from jaxlwp.graph import ComputationGraph
from jaxlwp.mesh import is_first_process
from jaxlwp.space._config import Config

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One config per layer (the paper's S), for one computation graph and mesh.

    Attributes:
      name: "search", "data", "model", "owt", "spatial", or the user's.
      configs: layer name -> config.
      axis_sizes: mesh axis name -> devices along it.
      fingerprint: of the computation graph it is for.
    """

    name: str
    configs: dict[str, Config]
    axis_sizes: dict[str, int]
    fingerprint: str

    def for_graph(self, graph: ComputationGraph) -> tuple[Config, ...]:
        """The configs in the order of the graph's layers, without mesh axes of size 1.

        Raises:
          ValueError: the strategy is for another model or other shapes.
        """
        names = [layer.name for layer in graph.layers]
        missing = [name for name in names if name not in self.configs]
        surplus = [name for name in self.configs if name not in names]
        if missing or surplus:
            raise ValueError(
                f"Strategy {self.name!r} is for another model: it lacks layers {missing[:3]} and "
                f"names unknown layers {surplus[:3]}; search again for this model"
            )
        if self.fingerprint != graph.fingerprint:
            raise ValueError(
                f"Strategy {self.name!r} is for fingerprint {self.fingerprint}, the traced "
                f"function has {graph.fingerprint}: same layer names, other shapes or kinds; "
                "search again for these shapes"
            )
        return tuple(self.configs[name].splitting(self.axis_sizes) for name in names)

    def to_json(self) -> str:
        """As JSON text, with a format version."""
        content = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "axis_sizes": self.axis_sizes,
            "configs": {name: dict(config.splits) for name, config in self.configs.items()},
        }
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Strategy:
        """From what `to_json` wrote.

        Raises:
          ValueError: the text is not a strategy of this format version.
        """
        return cls._read(text, "Strategy.from_json")

    @classmethod
    def _read(cls, text: str, place: str) -> Strategy:
        try:
            data = parse_json(text)
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version!a:.60}, expected {FORMAT_VERSION}")
            sizes = {name: _size(n, name) for name, n in data["axis_sizes"].items()}
            return cls(
                name=_text(data["name"], "name"),
                configs={
                    name: Config.of({d: _axes(axes, sizes) for d, axes in splits.items()})
                    for name, splits in data["configs"].items()
                },
                axis_sizes=sizes,
                fingerprint=_text(data["fingerprint"], "fingerprint"),
            )
        except KeyError as error:
            problem = f"{error} is missing"
        except (TypeError, AttributeError, ValueError) as error:
            problem = str(error)
        raise ValueError(
            f"{place}: not a strategy file ({problem}); give one that `jaxlwp plan --save` or "
            "Strategy.save wrote"
        )

    def save(self, path: str | Path) -> None:
        """Write as a JSON file, replacing it in one step; of several processes, the first does.

        Raises:
          OSError: it cannot be written there.
        """
        if is_first_process():
            write_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Strategy:
        """Read a file that `save` wrote.

        Raises:
          ValueError: the file is not a strategy.
          OSError: the file cannot be read.
        """
        wanted = "one that `jaxlwp plan --save` or Strategy.save wrote"
        return cls._read(read_text(Path(path), wanted), str(path))


def _text(value: Any, name: str) -> str:
    if not is_text(value):
        raise ValueError(f"{name} is {value!a:.60}, no text")
    return str(value)


def _axes(value: Any, sizes: Mapping[str, int]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(axis, str) for axis in value):
        raise ValueError(f"mesh axes are {value!a:.60}, no list of names")
    unknown = [axis for axis in value if axis not in sizes]
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!a:.60} has no size in axis_sizes")
    return tuple(value)


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"mesh axis {name!a:.60} has the size {value!a:.60}")
    return value


def make_strategy(
    name: str,
    graph: ComputationGraph,
    configs: Sequence[Config],
    axis_sizes: Mapping[str, int],
) -> Strategy:
    """A strategy from configs in the order of the graph's layers."""
    by_name = {layer.name: c for layer, c in zip(graph.layers, configs, strict=True)}
    return Strategy(
        name=name, configs=by_name, axis_sizes=dict(axis_sizes), fingerprint=graph.fingerprint
    )


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


def baseline(
    name: str,
    graph: ComputationGraph,
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


def _check_batch(name: str, graph: ComputationGraph, axis_sizes: Mapping[str, int]) -> None:
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
