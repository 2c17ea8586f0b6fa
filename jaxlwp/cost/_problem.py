"""A priced problem: layers, their configs, and what these cost, as numbers.

A `Problem` is all that searching, explaining and comparing need. There are two: a `SearchSpace` has
the traced program as well, from which it finds bytes when they are asked for; a `SavedProblem` is
read from a file, and has numbers alone.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxlwp.cost._problem_file import problem_bytes, problem_contents
from jaxlwp.cost._tables import MovedTables
from jaxlwp.devices import DeviceGraph
from jaxlwp.files import write_file
from jaxlwp.graph import Outlined
from jaxlwp.memory import MemoryTables
from jaxlwp.mesh import is_first_process
from jaxlwp.solver import Cost, CostTables, FloatArray
from jaxlwp.space import (
    BASELINES,
    Config,
    Constraints,
    Record,
    Strategy,
    baseline,
    made_here,
    make_strategy,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Problem(abc.ABC):
    """Every strategy of a graph on given devices, priced.

    Attributes:
      graph: layers and parameters by name and size.
      devices: the device graph.
      configs: the configs of each layer.
      tables: their costs.
      measured: for each layer, shape (configs,), whether `tables.compute_s` is measured; empty if
        all times are analytic.
      analytic_s: for each layer, shape (configs,), the analytic times that measured ones replaced.
      constraints: what every strategy of the space keeps to.
      whole: whether every config of every layer is in it, or only some (`price_around`).
      floor_s: if it is not whole, what no strategy of the whole space is priced below (with
        analytic times), in seconds of a step.
    """

    graph: Outlined
    devices: DeviceGraph
    configs: tuple[tuple[Config, ...], ...]
    tables: CostTables
    measured: tuple[NDArray[np.bool_], ...] = ()
    analytic_s: tuple[FloatArray, ...] = ()
    constraints: Constraints | None = None
    whole: bool = True
    floor_s: float = 0.0

    @abc.abstractmethod
    def memory_tables(self, optimizer_slots: float = 1.0) -> MemoryTables:
        """Bytes per device of every layer under every config; see `jaxlwp.memory.memory_costs`."""

    @abc.abstractmethod
    def moved_tables(self) -> MovedTables:
        """Bytes that each device sends, of every layer under every config and every edge."""

    @property
    def num_measured(self) -> int:
        """How many (layer, config) pairs have a measured time."""
        return sum(int(mask.sum()) for mask in self.measured)

    @property
    def num_pairs(self) -> int:
        """How many (layer, config) pairs there are."""
        return sum(map(len, self.configs))

    def choices(self, strategy: Strategy) -> tuple[int, ...]:
        """Index of each layer's config.

        Raises:
          ValueError: the strategy is for another model or mesh, or uses a config outside the
            space.
        """
        check_mesh(strategy, self.devices.axis_sizes)
        result = []
        configs = strategy.for_graph(self.graph)
        for layer, config, known in zip(self.graph.layers, configs, self.configs, strict=True):
            if config not in known:
                text = config.describe(self.devices.axis_sizes)
                raise ValueError(
                    f"Strategy {strategy.name!r}: layer {layer.name} has config {text}, which is "
                    f"not among its {len(known)} allowed configs: a split may not exceed a "
                    "dimension's size, and mesh axes are used in the order of the mesh"
                )
            result.append(known.index(config))
        return tuple(result)

    def evaluate(self, strategy: Strategy) -> Cost:
        """Predicted seconds of one training step, decomposed.

        Raises:
          ValueError: as `choices`.
        """
        return self.tables.evaluate(self.choices(strategy))

    def strategy(self, name: str, choices: Sequence[int]) -> Strategy:
        """A strategy from config indices, with what it costs on record."""
        configs = [known[i] for known, i in zip(self.configs, choices, strict=True)]
        made = make_strategy(name, self.graph, configs, self.devices.axis_sizes)
        return replace(made, record=self.record(self.tables.evaluate(choices)))

    def baseline(self, name: str) -> Strategy:
        """A baseline strategy, with what it costs on record; see `jaxlwp.BASELINES`.

        Raises:
          ValueError: an unknown name, or a batch that the devices do not divide.
        """
        made = baseline(name, self.graph, self.configs, self.devices.axis_sizes)
        return replace(made, record=self.record(self.evaluate(made)))

    def baselines(self) -> dict[str, Strategy]:
        """The baselines that apply, by name: not where the devices do not divide the batch."""
        found = {}
        for name in BASELINES:
            with contextlib.suppress(ValueError):
                found[name] = self.baseline(name)
        return found

    def record(self, cost: Cost, memory_bytes: int | None = None) -> Record:
        """What a strategy's file says of a cost here: of which program, on which devices."""
        devices = self.devices
        return Record(
            digest=self.graph.digest,
            versions=made_here(),
            predicted_s=vars(cost),
            memory_bytes=memory_bytes,
            rates=f"{devices.num_devices} x {devices.device_kind}, {devices.source}",
        )

    def save(self, path: str | Path) -> None:
        """Write the problem to a file, in one step; of several processes, the first does.

        The file has layers, configs, rates and all costs, and no code: `load_problem` reads it
        where neither the model nor the devices are. Layers that were not measured are in it with
        the times that they have here, and as not measured.

        Args:
          path: such as "problem.npz": a zip archive of JSON and numpy arrays.

        Raises:
          OSError: it cannot be written there.
        """
        if is_first_process():
            write_file(Path(path), problem_bytes(self))

    def part(self, numbers: Sequence[NDArray[np.intp]], constraints: Constraints | None) -> Self:
        """The problem with some of each layer's configs, by index."""

        def some(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
            return (
                tuple(array[n] for array, n in zip(arrays, numbers, strict=True)) if arrays else ()
            )

        tables = self.tables
        return replace(
            self,
            configs=tuple(
                tuple(known[i] for i in n) for known, n in zip(self.configs, numbers, strict=True)
            ),
            constraints=constraints,
            measured=some(self.measured),
            analytic_s=some(self.analytic_s),
            tables=replace(
                tables,
                compute_s=some(tables.compute_s),
                sync_s=some(tables.sync_s),
                exchange_s=some(tables.exchange_s),
                overhead_s=some(tables.overhead_s),
                transfer_s=pairs_of(tables.transfer_s, tables.edges, numbers),
            ),
        )

    def __repr__(self) -> str:
        """Layers, how many configs they have, and what the baselines cost."""
        from jaxlwp.report import problem_text

        return problem_text(self)


AnyProblem = TypeVar("AnyProblem", bound=Problem)
"""A problem of either kind, the same in and out."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SavedProblem(Problem):
    """A problem without the model or the devices, from a file.

    It is printed, constrained (`restrict`), searched, explained and compared like the space that it
    was saved from, and has the same optimum. It cannot be measured or run.

    Attributes:
      memory: bytes of every layer, with an optimizer that keeps one array like the parameters.
      moved: bytes that each device sends.
      versions: of jaxlwp and JAX that it was made by.
    """

    memory: MemoryTables
    moved: MovedTables
    versions: dict[str, str]

    def memory_tables(self, optimizer_slots: float = 1.0) -> MemoryTables:
        """See `Problem`."""
        return self.memory.for_optimizer(optimizer_slots)

    def moved_tables(self) -> MovedTables:
        """See `Problem`."""
        return self.moved

    def part(self, numbers: Sequence[NDArray[np.intp]], constraints: Constraints | None) -> Self:
        """See `Problem`."""
        memory, edges = self.memory, self.tables.edges
        return replace(
            super().part(numbers, constraints),
            memory=replace(
                memory,
                layers=tuple(c.part(n) for c, n in zip(memory.layers, numbers, strict=True)),
                copied_bytes=pairs_of(memory.copied_bytes, edges, numbers),
            ),
            moved=MovedTables(
                layers=tuple(b[n] for b, n in zip(self.moved.layers, numbers, strict=True)),
                edges=pairs_of(self.moved.edges, edges, numbers),
            ),
        )


def load_problem(path: str | Path) -> SavedProblem:
    """Read a problem that `Problem.save` wrote. It needs neither the model nor the devices.

    Args:
      path: the file.

    Raises:
      ValueError: the file is no saved problem, damaged, or of a newer version.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return SavedProblem(**problem_contents(data))
    except ValueError as error:
        raise ValueError(
            f"load_problem: {path} is no saved problem: {' '.join(str(error).split())}; give a "
            "file that `space.save` or `jaxlwp plan --save-problem` wrote"
        ) from error


def restrict(space: AnyProblem, constraints: Constraints) -> AnyProblem:
    """The part of a problem that keeps to constraints, with the prices that it has.

    Args:
      space: from `price` or `load_problem`.
      constraints: what is left must keep to them, and to those of the space.

    Raises:
      ValueError: constraints that name nothing, that leave a layer without a config, or that pin a
        layer to a config outside the space.
    """
    configs = constraints.apply(space.graph, space.configs, space.devices.axis_sizes)
    numbers = []
    for layer, known, kept in zip(space.graph.layers, space.configs, configs, strict=True):
        place = {config: n for n, config in enumerate(known)}
        if not all(config in place for config in kept):
            text = "; ".join(config.describe(space.devices.axis_sizes) for config in kept)
            raise ValueError(
                f"constraints: layer {layer.name} is pinned to {text}, which is not in the space; "
                "give the constraints to price, in place of restrict"
            )
        numbers.append(np.array([place[config] for config in kept], dtype=np.intp))
    return space.part(numbers, constraints)


def pairs_of(
    tables: Sequence[NDArray[Any]],
    edges: Sequence[tuple[int, int]],
    numbers: Sequence[NDArray[np.intp]],
) -> tuple[NDArray[Any], ...]:
    """Of tables of edges the rows and columns of some configs of each layer."""
    return tuple(
        table[np.ix_(numbers[i], numbers[j])] for (i, j), table in zip(edges, tables, strict=True)
    )


def check_mesh(strategy: Strategy, axis_sizes: dict[str, int]) -> None:
    """Check that a strategy is for the mesh at hand.

    Raises:
      ValueError: its mesh axes differ.
    """
    if strategy.axis_sizes != axis_sizes:
        raise ValueError(
            f"Strategy {strategy.name!r} is for mesh axes {strategy.axis_sizes}, the devices have "
            f"{axis_sizes}; search again, or give the mesh that it was made for"
        )
