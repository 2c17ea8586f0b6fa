"""The prices of one strategy, each in its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxlwp.cost import (
    AnalyticCostModel,
    SearchSpace,
    layer_collectives,
    pass_shares,
    use_collectives,
)
from jaxlwp.graph import Layer, Use
from jaxlwp.simulate._parts import Part, Sent, parts
from jaxlwp.solver import FloatArray
from jaxlwp.space import Collective, Strategy

HALO, PARTIAL, CHANGE = "halo exchange", "partial sum", "change of layout"


class Inside(NamedTuple):
    """A collective inside a layer, and what it is for."""

    cause: str
    part: Part


class Argument(NamedTuple):
    """An argument of the function, and what moving it and its gradient takes."""

    use: Use
    parts: tuple[Part, ...]


class LayerPrices(NamedTuple):
    """What a layer takes.

    Attributes:
      forward_s: seconds of its operators, forward.
      backward_s: the same, backward, for what other layers wait for.
      gradients_s: the same, for gradients of parameters.
      besides_s: the update of its parameters, memory taken anew, input.
      inside: its halo exchanges, partial sums and changes of layout.
      arguments: those that it stores.
    """

    forward_s: float
    backward_s: float
    gradients_s: float
    besides_s: float
    inside: tuple[Inside, ...]
    arguments: tuple[Argument, ...]


class Prices:
    """The prices of a strategy.

    Attributes:
      layers: of each layer.
      edges: of each edge, the parts of the change of layout.
      plain_s: their plain sum, as the space has it.
    """

    def __init__(self, space: SearchSpace, strategy: Strategy) -> None:
        """Take the prices apart.

        Raises:
          ValueError: as `SearchSpace.choices`; a strategy that the space does not allow.
        """
        self.plain_s = space.evaluate(strategy).total_s
        if self.plain_s == math.inf:
            raise ValueError(
                f"simulate: strategy {strategy.name!r} is not allowed in this space: its price is "
                "inf; take one that the search can find"
            )
        self._space, self._devices = space, space.devices
        self._choices = space.choices(strategy)
        self._configs = strategy.for_graph(space.graph)
        # What prices of the package count on to be hidden; other models say nothing of that.
        model = space.model if isinstance(space.model, AnalyticCostModel) else None
        self._serial_share = model.serial_share if model else 1.0
        self._exposed_share = space.devices.exposed_share if model else 1.0
        self._buckets = dict(model.bucket_bytes) if model else {}
        self.layers = tuple(map(self._layer, space.graph.layers))
        self.edges = tuple(
            parts(
                self._sent(edge.use, edge.source, edge.target),
                float(table[self._choices[edge.source], self._choices[edge.target]]),
                space.devices,
            )
            for edge, table in zip(space.graph.edges, space.tables.transfer_s, strict=True)
        )

    def _layer(self, layer: Layer) -> LayerPrices:
        shares, tables = pass_shares(layer, self._devices), self._space.tables
        compute_s = self._of(tables.compute_s, layer)
        uses = [use for use in layer.uses if use.argument and use.source == layer.index]
        inside = self._inside(layer)
        if not uses:  # a model may charge even layers without arguments
            sync = parts([], self._of(tables.sync_s, layer), self._devices)
            inside += tuple(Inside(CHANGE, part) for part in sync)
        return LayerPrices(
            forward_s=shares.forward * compute_s,
            backward_s=shares.cotangents * compute_s,
            gradients_s=shares.parameters * compute_s,
            besides_s=self._of(tables.overhead_s, layer),
            inside=inside,
            arguments=self._arguments(layer, uses) if uses else (),
        )

    def _of(self, table: Sequence[FloatArray], layer: Layer) -> float:
        return float(table[layer.index][self._choices[layer.index]])

    def _inside(self, layer: Layer) -> tuple[Inside, ...]:
        """The collectives of a layer's operators, then its own changes of layout."""
        own = [use for use in layer.uses if use.source == layer.index and not use.argument]
        changes = [s for use in own for s in self._sent(use, layer.index, layer.index)]
        sizes = self._devices.axis_sizes
        every = layer_collectives(layer, self._configs[layer.index], sizes)
        causes = [_cause(one) for one in every[: len(every) - len(changes)]]
        sent = [
            Sent(collective=one, counted=self._serial_share, halo=cause == HALO)
            for one, cause in zip(every, [*causes, *[CHANGE] * len(changes)], strict=True)
        ]
        found = parts(sent, self._of(self._space.tables.exchange_s, layer), self._devices)
        causes += [CHANGE] * (len(found) - len(causes))
        return tuple(Inside(c, part) for c, part in zip(causes, found, strict=False))

    def _arguments(self, layer: Layer, uses: Sequence[Use]) -> tuple[Argument, ...]:
        """The arguments that a layer stores."""
        sent = [self._sent(use, layer.index, layer.index) for use in uses]
        price_s = self._of(self._space.tables.sync_s, layer)
        found = parts([one for group in sent for one in group], price_s, self._devices)
        if len(found) != sum(map(len, sent)):  # nothing, or a price without collectives
            return (Argument(uses[0], found),)
        rest = iter(found)
        return tuple(
            Argument(use, tuple(next(rest) for _ in group))
            for use, group in zip(uses, sent, strict=True)
        )

    def _sent(self, use: Use, source: int, target: int) -> list[Sent]:
        """The collectives of a change of layout."""
        every = use_collectives(
            use, self._configs[source], self._configs[target], self._devices.axis_sizes
        )
        counted = self._exposed_share if use.argument and use.gradient else 1.0
        bucket = self._buckets.get(str(use.moved.dtype), 0.0) if use.argument else 0.0
        return [Sent(collective=one, counted=counted, bucket_bytes=bucket) for one in every]


def _cause(collective: Collective) -> str:
    """What a collective of an operator is for."""
    return HALO if collective.kind == "collective-permute" else PARTIAL
