"""Measured layer times: a layer's own local work, forward and backward, on the devices at hand.

A call of its own would over-count: dispatch, and output buffers that are new each time. So the work
is unrolled inside one compiled program, each copy fed with what the one before has made. The first
copy finds caches cold, the others warm; a training step is somewhere in between, and so is their
mean. What an empty call takes is left out, and so is memory that is taken anew. All simulated
devices work at once, since they share the machine's cores. Programs take turns, so that whatever
else the machine does meets all of them alike.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from jaxlwp._progress import Progress
from jaxlwp.devices import (
    DeviceGraph,
    Environment,
    Measurement,
    Store,
    environment_of,
    from_first,
    local_devices,
    now,
    spans_processes,
)
from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.measure._local import LocalStep, local_step
from jaxlwp.measure._timing import NEGLIGIBLE, chunks, time_together
from jaxlwp.mesh import auto_mesh, on_mesh
from jaxlwp.program import text_of
from jaxlwp.space import Config, degree

Pair = tuple[Layer, Config]

AGREE = 0.05
"""Two measurements of a program, minutes apart, that differ by more call for a third. (On LeNet-5's
layers of half a millisecond and more, their ratios had a standard deviation of 4 to 9 %.)"""


class LayerTimes:
    """Known times of layers under configs.

    Args:
      graph: the graph that the layers are of.
      axis_sizes: devices along each mesh axis.
      cache: the times.
    """

    def __init__(
        self, graph: ComputationGraph, axis_sizes: Mapping[str, int], cache: TimingCache
    ) -> None:
        self.graph, self.axis_sizes, self.cache = graph, dict(axis_sizes), cache
        self._structures: dict[int, str] = {}
        self._keys: dict[tuple[int, Config], str] = {}

    def key(self, layer: Layer, config: Config) -> str:
        """What the time depends on: the layer's operators and shapes, and the degrees."""
        if layer.index not in self._structures:
            self._structures[layer.index] = _structure(layer)
        if (layer.index, config) not in self._keys:
            degrees = sorted((n, degree(a, self.axis_sizes)) for n, a in config.splits if a)
            text = f"{self._structures[layer.index]} {degrees}"
            self._keys[layer.index, config] = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self._keys[layer.index, config]

    def known_s(self, layer: Layer, config: Config) -> float | None:
        """Measured seconds, or None."""
        entry = self.cache.get(self.key(layer, config))
        return None if entry is None else entry.seconds


class LayerTimer(LayerTimes):
    """Times of layers under configs on devices at hand: known ones, and new ones when asked for.

    Args:
      graph: the graph that the layers are of.
      rates: mesh axes and rates of the devices.
      devices: those to measure on, all at once.
      cache: the times known so far; new ones are added.
    """

    def __init__(
        self,
        graph: ComputationGraph,
        rates: DeviceGraph,
        devices: Sequence[Any],
        cache: TimingCache | None = None,
    ) -> None:
        super().__init__(graph, rates.axis_sizes, cache if cache is not None else TimingCache())
        self.rates = rates
        self.mesh = auto_mesh(list(devices), ("device",))

    def measure(self, pairs: Sequence[Pair], progress: Progress | None = None) -> int:
        """Measure what is not known yet of some layers under configs.

        Interrupted, it keeps what it has finished.

        Args:
          pairs: layers and configs.
          progress: called as `progress(what, done, total)`.

        Returns:
          How many programs were run.
        """
        missing: dict[str, Pair] = {}
        for layer, config in pairs:
            key = self.key(layer, config)
            if self.cache.get(key) is None:
                missing.setdefault(key, (layer, config))
        programs: dict[str, LocalStep] = {}
        keys_of: dict[str, list[str]] = {}
        for key, (layer, config) in missing.items():
            step = local_step(self.graph, layer, config, self.axis_sizes)
            known = self.cache.find(step.key)
            if known is not None:
                self.cache.put({key: known})
            else:
                programs.setdefault(step.key, step)
                keys_of.setdefault(step.key, []).append(key)
        return self._run(programs, keys_of, progress, "measuring layers")

    def confirm(self, pairs: Sequence[Pair], progress: Progress | None = None) -> int:
        """Measure once more what is known of some layers under configs, and not yet sure.

        That is what was measured once, or twice with times that do not agree (`AGREE`). The median
        of all is the time then. Interrupted, it keeps what it has finished.

        Args:
          pairs: layers and configs; what is not known of them stays so.
          progress: called as `progress(what, done, total)`.

        Returns:
          How many programs were run.
        """
        programs: dict[str, LocalStep] = {}
        keys_of: dict[str, list[str]] = {}
        unsure = {entry.program for entry in self.cache.entries.values() if self._unsure(entry)}
        for layer, config in pairs:
            key = self.key(layer, config)
            entry = self.cache.get(key)
            if entry is not None and entry.program in unsure:
                # Another program than the entry's if an older version has made that.
                step = local_step(self.graph, layer, config, self.axis_sizes)
                programs[step.key] = step
                keys_of[step.key] = sorted({key, *self.cache.keys_of(step.key)})
                unsure.discard(step.key)
        return self._run(programs, keys_of, progress, "measuring layers again")

    def _unsure(self, entry: Measurement) -> bool:
        """Whether a program is to be measured again."""
        if len(entry.each_s) > 2:
            return False
        enough_s = max(AGREE * entry.seconds, NEGLIGIBLE * self.rates.step_s)
        return len(entry.each_s) < 2 or max(entry.each_s) - min(entry.each_s) > enough_s

    def _run(
        self,
        programs: Mapping[str, LocalStep],
        keys_of: Mapping[str, Sequence[str]],
        progress: Progress | None,
        what: str,
    ) -> int:
        """Run programs, add what they take to the cache, and return how many they are."""
        progress = progress or (lambda what, done, total: None)
        done = 0
        for chunk in chunks(list(programs.values()), self.mesh.size):
            progress(what, done, len(programs))
            with on_mesh(self.mesh):
                timings = time_together(chunk, self.mesh, self.rates)
            self.cache.put(
                {
                    key: _with_earlier(self.cache.find(step.key), timing, step.key)
                    for step, timing in zip(chunk, timings, strict=True)
                    for key in keys_of[step.key]
                }
            )
            done += len(chunk)
        if programs:
            progress(what, done, done)
        return len(programs)


def _with_earlier(earlier: Measurement | None, timing: Measurement, program: str) -> Measurement:
    """A measurement of a program, with the earlier ones if there are any."""
    timing = replace(timing, program=program, date=now(), each_s=(timing.seconds,))
    if earlier is None:
        return timing
    each_s = (*(earlier.each_s or (earlier.seconds,)), timing.seconds)
    return replace(
        timing,
        seconds=statistics.median(each_s),
        each_s=each_s,
        spread=max(earlier.spread, timing.spread),
        samples=earlier.samples + timing.samples,
    )


class TimingCache:
    """Layer times by key, and by the program that was run; on disk if there is a store.

    Args:
      store: where measurements are kept; None for memory alone.
      environment: what they are true for.
      together: the mesh, if several processes measure for one plan: the first one's times count in
        all.
    """

    kind = "layer"

    def __init__(
        self,
        store: Store | None = None,
        environment: Environment | None = None,
        together: Mesh | None = None,
    ) -> None:
        self.store, self.environment, self.together = store, environment, together
        self.entries: dict[str, Measurement] = {}
        if store is not None and environment is not None:
            self.entries = store.get_all(environment, self.kind)
        if together is not None:
            self.entries = _from_first(self.entries, together)
        self.programs = {entry.program: entry for entry in self.entries.values()}

    def get(self, key: str) -> Measurement | None:
        """The measurement of a key."""
        return self.entries.get(key)

    def find(self, program: str) -> Measurement | None:
        """The measurement of any key that stands for the same program."""
        return self.programs.get(program)

    def keys_of(self, program: str) -> list[str]:
        """The keys that stand for a program."""
        return [key for key, entry in self.entries.items() if entry.program == program]

    def put(self, entries: dict[str, Measurement]) -> None:
        """Add measurements by key."""
        if self.together is not None:
            entries = _from_first(entries, self.together)
        self.entries |= entries
        self.programs |= {entry.program: entry for entry in entries.values()}
        if self.store is not None and self.environment is not None:
            self.store.put(self.environment, self.kind, entries)


def open_cache(mesh: Mesh) -> TimingCache:
    """The layer times of devices of this kind, on disk."""
    environment = environment_of(local_devices(mesh))
    return TimingCache(Store(), environment, together=mesh if spans_processes(mesh) else None)


def layer_timer(graph: ComputationGraph, rates: DeviceGraph, mesh: Mesh) -> LayerTimer:
    """Measures a graph's layers on the devices of a mesh, and keeps the times on disk.

    Args:
      graph: from `trace`.
      rates: mesh axes and rates, from `device_graph`.
      mesh: the devices; of several processes, each measures on its own.
    """
    return LayerTimer(graph, rates, local_devices(mesh), open_cache(mesh))


def _from_first(entries: dict[str, Measurement], mesh: Mesh) -> dict[str, Measurement]:
    found = from_first({key: entry.to_json() for key, entry in entries.items()}, mesh)
    return {key: Measurement(**entry) for key, entry in found.items()}


def _structure(layer: Layer) -> str:
    """A layer's operators, shapes, and what is read and made, as text; without names of layers."""
    number: dict[int, int] = {}
    lines = []
    for member in layer.members:
        eqn = member.equation
        for value in (*eqn.operands, *eqn.results):
            number.setdefault(value, len(number))
        params = sorted((name, text_of(value)) for name, value in eqn.params.items())
        types = [
            f"{number[i]}:{v.dtype}{list(v.shape)}"
            for i, v in zip(
                (*eqn.operands, *eqn.results), (*eqn.operand_values, *eqn.result_values),
                strict=True,
            )
        ]  # fmt: skip
        names = (member.signature.operands, member.signature.results)
        borders = sorted(eqn.borders.items())
        lines.append(
            f"{eqn.name} {params} {borders} {types} {names} {member.gradient} {member.recomputed}"
        )
    reads = [
        f"{use.info.dtype}{list(use.info.shape)} {use.labels} {sorted(map(str, use.active))} "
        f"{use.gradient} {use.source == layer.index and not use.argument}"
        for use in layer.uses
    ]
    makes = [f"{value.dtype}{list(value.shape)} {labels}" for value, labels in layer.outputs]
    text = "\n".join((*lines, *reads, *makes))
    return hashlib.sha256(text.encode()).hexdigest()
