"""Objectives: what the search makes least.

An objective turns a priced space into sums over its configs (`Rows`) of which the largest counts.
The paper's plain sum is one such sum, and `search` solves it directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxlwp.cost import Problem
from jaxlwp.solver import FloatArray, Rows


class Objective(Protocol):
    """What the search makes least: the largest of some sums."""

    @property
    def unit(self) -> str:
        """Of what it measures: "s" or "bytes"."""
        ...

    def rows(self, space: Problem) -> Rows:
        """The sums."""
        ...


@dataclass(frozen=True)
class PlainSum:
    """The paper's objective: computation, transfers and synchronisation, one after the other."""

    unit: str = "s"

    def rows(self, space: Problem) -> Rows:
        """One sum."""
        return _one_sum(space, space.tables.node_costs_s, space.tables.transfer_s)


@dataclass(frozen=True)
class Overlap:
    """Seconds of a step in which gradients are synchronised behind the backward pass.

    Gradients are ready from the last layer to the first; their synchronisations run in that order,
    one at a time, while the layers before are still computing backward. All else happens one after
    the other. The step ends when both are done: at the latest, over all layers, of the time at
    which a layer's gradients are ready plus all synchronisations from there on. Frameworks
    that start each sum with its gradient do so; XLA's schedules hide less (`EXPOSED_SHARE`).

    Attributes:
      backward_share: of a layer's computation, what belongs to the backward pass: two of the three
        convolutions.
    """

    backward_share: float = 2 / 3
    unit: str = "s"

    def rows(self, space: Problem) -> Rows:
        """One sum for each layer with parameters, and one for a step without synchronisation."""
        tables = space.tables
        count = len(tables.compute_s)
        besides = tuple(
            inside + more for inside, more in zip(tables.exchange_s, tables.overhead_s, strict=True)
        )
        whole_s = tuple(sync_s / space.devices.exposed_share for sync_s in tables.sync_s)
        synced = [n for n in range(count) if tables.sync_s[n].max() > 0]
        layers = np.arange(count)
        ready = np.array([layers >= n for n in synced]).reshape(-1, count)
        ends = np.vstack([ready, np.ones((1, count), dtype=bool)])
        return Rows(
            terms=(tables.compute_s, besides, whole_s),
            weights=(
                np.where(ends, 1.0, 1 - self.backward_share),
                np.ones(ends.shape),
                np.vstack([[layers <= n for n in synced], np.zeros((1, count))]).astype(float)
                if synced
                else np.zeros((1, count)),
            ),
            edges=tables.edges,
            tables=tables.transfer_s,
            scale=np.ones(len(ends)),
        )


@dataclass(frozen=True)
class MovedBytes:
    """Bytes that each device sends in a step: halos, partial sums, layouts, gradients."""

    unit: str = "bytes"

    def rows(self, space: Problem) -> Rows:
        """One sum."""
        moved = space.moved_tables()
        return _one_sum(space, moved.layers, moved.edges)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a device at the worst moment of a step, by `memory_costs`.

    Attributes:
      optimizer_slots: bytes of optimizer state for each byte of a parameter.
    """

    optimizer_slots: float = 1.0
    unit: str = "bytes"

    def rows(self, space: Problem) -> Rows:
        """One sum for each layer's temporaries while all is kept, and one for the gradients."""
        memory = space.memory_tables(self.optimizer_slots)
        costs, count = memory.layers, len(memory.layers)
        whole = np.vstack([np.ones((count, count)), np.zeros((1, count))])
        return Rows(
            terms=(
                tuple((c.parameter_bytes + c.optimizer_bytes).astype(float) for c in costs),
                tuple(c.kept_bytes.astype(float) for c in costs),
                tuple(c.temporary_bytes.astype(float) for c in costs),
                tuple(c.gradient_bytes.astype(float) for c in costs),
            ),
            weights=(
                np.ones((count + 1, count)),
                whole,
                np.vstack([np.eye(count), np.zeros((1, count))]),
                1 - whole,
            ),
            edges=space.tables.edges,
            tables=tuple(
                np.where(np.isinf(seconds), np.inf, copied)
                for seconds, copied in zip(
                    space.tables.transfer_s, memory.copied_bytes, strict=True
                )
            ),
            scale=whole[:, 0],
        )


def _one_sum(space: Problem, nodes: tuple[FloatArray, ...], tables: tuple[FloatArray, ...]) -> Rows:
    return Rows(
        terms=(nodes,),
        weights=(np.ones((1, len(nodes))),),
        edges=space.tables.edges,
        tables=tables,
        scale=np.ones(1),
    )


OBJECTIVES: dict[str, Objective] = {
    "sum": PlainSum(),
    "overlap": Overlap(),
    "bytes": MovedBytes(),
    "memory": PeakMemory(),
}
"""By name, as `search` takes them."""
