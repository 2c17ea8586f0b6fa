"""A graph without its program: what is left of it in a saved problem.

Configs, constraints, baselines and strategies know layers by name, kind and sizes, and parameters
by name, shape and place. All of that is plain data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxlwp.ops import Labels


@dataclass(frozen=True, kw_only=True)
class LayerOutline:
    """A layer without its operators.

    Attributes:
      index: position in the graph.
      name: unique, from the module path (Linen), the parameter path (NNX) or the operator.
      kind: "conv", "dense", "max_pool", ...
      dimensions: parallelizable dimension -> all sizes that it has in the layer's tensors.
      even: dimension -> a size that the degree of its split must divide.
      has_rule: False for an operator that jaxlwp does not know: it runs replicated.
    """

    index: int
    name: str
    kind: str
    dimensions: dict[str, tuple[int, ...]]
    even: dict[str, int]
    has_rule: bool = True


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A leaf of the function's first argument.

    Attributes:
      name: such as `params['Conv_0']['kernel']`.
      shape: of the array.
      layer: index of the layer in whose layout it is stored; None if nothing reads it.
      labels: dimension names in that layer.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    labels: Labels


class Outlined(Protocol):
    """A graph, with its program (`ComputationGraph`) or without (`Outline`)."""

    @property
    def layers(self) -> Sequence[LayerOutline]:
        """In order of their first operator."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of the function's arguments."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of layer names, kinds and tensor shapes; a strategy is for one fingerprint."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the traced program, which JAX's version is part of; empty if not known."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A graph without its program.

    Attributes:
      layers: in order of their first operator.
      parameters: in the order of the function's arguments.
      digest: of the program that was traced.
    """

    layers: tuple[LayerOutline, ...]
    parameters: tuple[Parameter, ...] = field(repr=False)
    digest: str

    @property
    def fingerprint(self) -> str:
        """See `Outlined`."""
        return fingerprint(self.layers)


def fingerprint(layers: Sequence[LayerOutline]) -> str:
    """Hash of layer names, kinds and tensor shapes."""
    content = [
        [layer.name, layer.kind, sorted((k, list(v)) for k, v in layer.dimensions.items())]
        for layer in layers
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
