"""Profiles: measurements of one machine as a file, to plan for it on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxlwp._progress import Progress
from jaxlwp.devices import KIND, DeviceGraph, Environment, Measurement, rates_key, read_export
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.measure._timer import LayerTimes, TimingCache
from jaxlwp.mesh import AnyMesh
from jaxlwp.space import Config


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Rates and layer times of one kind of machine.

    Attributes:
      environment: what they are true for.
      rates: device graphs, by kind of mesh.
      layers: layer times, by key.
    """

    environment: Environment
    rates: dict[str, DeviceGraph] = field(repr=False)
    layers: dict[str, Measurement] = field(repr=False)

    def device_graph(self, mesh: AnyMesh) -> DeviceGraph:
        """The rates of a mesh.

        Raises:
          ValueError: no mesh of this shape was profiled.
        """
        key = rates_key(mesh)
        if key not in self.rates:
            raise ValueError(
                f"profile of {self.environment}: no rates for a mesh of {dict(mesh.shape)}; it has "
                f"{'; '.join(self.rates) or 'none'}: profile as many devices there, or give rates"
            )
        return self.rates[key]

    def times(self, graph: ComputationGraph, devices: DeviceGraph) -> KnownTimes:
        """The layer times of a graph."""
        cache = TimingCache()
        cache.entries = dict(self.layers)
        return KnownTimes(graph, devices.axis_sizes, cache)


class KnownTimes(LayerTimes):
    """Layer times of another machine: what is not known stays so."""

    def measure(
        self,
        pairs: Sequence[tuple[Layer, Config]],
        progress: Progress | None = None,
    ) -> int:
        """Nothing can be measured here."""
        return 0

    confirm = measure


def load_profile(path: str | Path) -> Profile:
    """Read a profile that `jaxlwp cache export` wrote on one machine.

    Args:
      path: the file.

    Raises:
      ValueError: the file cannot be read, or holds measurements of several machines.
    """
    groups = read_export(Path(path))
    if len(groups) != 1:
        names = "; ".join(str(environment) for environment, _ in groups) or "none"
        raise ValueError(
            f"{path} holds measurements of {len(groups)} environments ({names}); a profile is of "
            "one: export it with --environment"
        )
    environment, kinds = groups[0]
    try:
        rates = {
            key: DeviceGraph.from_json(entry.data) for key, entry in kinds.get(KIND, {}).items()
        }
    except ValueError as error:
        raise ValueError(
            f"{path}: its rates cannot be read ({error}); export them again with `jaxlwp cache "
            "export`"
        ) from error
    return Profile(
        environment=environment,
        rates=rates,
        layers=kinds.get(TimingCache.kind, {}),
    )
