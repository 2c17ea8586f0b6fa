"""Cost tables: the whole optimisation problem as numbers, without layers, devices or JAX.

One 1-D array per layer and one 2-D array per edge say what each config, and each pair of
configs, costs in seconds. Minimising their plain sum is the objective t_O of Jia et al.
(ICML 2018, equation 1). Infinity marks what is not allowed; NaN and negative costs never pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
"""Costs in seconds."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one strategy, kept apart by cause, in seconds per training step.

    Attributes:
        compute_s: forward and backward time of the layers (t_C).
        transfer_s: time to move tensors between layers of different configs (t_X).
        sync_s: time to synchronise the parameters' gradients (t_S).
        overhead_s: what a step has besides: the optimizer's update, memory taken anew, the batch's
            way to the devices, and what is the same for every strategy.
    """

    compute_s: float = 0.0
    transfer_s: float = 0.0
    sync_s: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compute_s", "transfer_s", "sync_s", "overhead_s"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"Cost.{name} is {value}: a cost must be 0 s or more (inf for not allowed); "
                    "check the value it was computed from."
                )

    @property
    def total_s(self) -> float:
        """The paper's objective: the plain sum, nothing overlaps."""
        return self.compute_s + self.transfer_s + self.sync_s + self.overhead_s

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            compute_s=self.compute_s + other.compute_s,
            transfer_s=self.transfer_s + other.transfer_s,
            sync_s=self.sync_s + other.sync_s,
            overhead_s=self.overhead_s + other.overhead_s,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CostTables:
    """What every config of every layer, and every pair of configs on an edge, costs.

    The arrays given are copied, to float64, and made read-only. C_l is the number of configs
    of layer l, at least one. Comparison is by identity.

    Attributes:
        compute_s: per layer, shape (C_l,), seconds of forward and backward (t_C).
        sync_s: per layer, shape (C_l,), seconds of gradient synchronisation (t_S).
        exchange_s: per layer, shape (C_l,), seconds of transfers inside the layer (halo exchange,
            partial sums); part of the transfer cost. Zero if left out.
        overhead_s: per layer, shape (C_l,), seconds of a step besides (optimizer update, memory
            taken anew, input). Zero if left out.
        step_s: seconds of a step that every strategy has.
        edges: pairs (i, j) of different layer indices. Parallel edges are legal, in either
            direction, and their costs add up; the direction only fixes the array's axes.
        transfer_s: per edge (i, j), shape (C_i, C_j), seconds of data movement (t_X).
        names: the layers' names, for messages; empty if there are none.

    Raises:
        ValueError: there is no layer, a layer has no config, a shape or an index does not fit,
            or an entry is NaN or negative (+inf is legal: not allowed).
    """

    compute_s: tuple[FloatArray, ...]
    sync_s: tuple[FloatArray, ...]
    edges: tuple[tuple[int, int], ...]
    transfer_s: tuple[FloatArray, ...]
    exchange_s: tuple[FloatArray, ...] = ()
    overhead_s: tuple[FloatArray, ...] = ()
    step_s: float = 0.0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        layers = len(self.compute_s)
        if layers == 0:
            raise ValueError("CostTables.compute_s is empty: give one array for each layer.")
        _check_count("CostTables.sync_s", len(self.sync_s), layers, "layer")
        _check_count("CostTables.names", len(self.names), layers if self.names else 0, "layer")
        _check_count("CostTables.transfer_s", len(self.transfer_s), len(self.edges), "edge")
        label = [f" ({name})" for name in self.names] or [""] * layers
        compute = [
            _frozen_copy(check_costs(f"compute_s[{n}]{label[n]}", costs, (None,)))
            for n, costs in enumerate(self.compute_s)
        ]
        sync = [
            _frozen_copy(check_costs(f"sync_s[{n}]{label[n]}", costs, compute[n].shape))
            for n, costs in enumerate(self.sync_s)
        ]
        parts: dict[str, list[FloatArray]] = {}
        for part in ("exchange_s", "overhead_s"):
            given = getattr(self, part) or tuple(np.zeros_like(costs) for costs in compute)
            _check_count(f"CostTables.{part}", len(given), layers, "layer")
            parts[part] = [
                _frozen_copy(check_costs(f"{part}[{n}]{label[n]}", costs, compute[n].shape))
                for n, costs in enumerate(given)
            ]
        if not self.step_s >= 0:
            raise ValueError(
                f"CostTables.step_s is {self.step_s}: it must be 0 s or more; correct it."
            )
        edges = check_edges(self.edges, layers)
        transfer = [
            _frozen_copy(
                check_costs(
                    f"transfer_s[{n}], edge {i}{label[i]} -> {j}{label[j]},",
                    self.transfer_s[n],
                    (compute[i].size, compute[j].size),
                )
            )
            for n, (i, j) in enumerate(edges)
        ]
        object.__setattr__(self, "compute_s", tuple(compute))
        object.__setattr__(self, "sync_s", tuple(sync))
        object.__setattr__(self, "exchange_s", tuple(parts["exchange_s"]))
        object.__setattr__(self, "overhead_s", tuple(parts["overhead_s"]))
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "transfer_s", tuple(transfer))
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def node_costs_s(self) -> tuple[FloatArray, ...]:
        """Per layer, shape (C_l,): all of its own costs in seconds, what a search needs."""
        parts = zip(self.compute_s, self.sync_s, self.exchange_s, self.overhead_s, strict=True)
        return tuple(compute + sync + inside + besides for compute, sync, inside, besides in parts)

    @property
    def num_configs(self) -> tuple[int, ...]:
        """Per layer, how many configs it has: C_l."""
        return tuple(costs.size for costs in self.compute_s)

    def evaluate(self, choices: Sequence[int]) -> Cost:
        """The cost of the strategy that gives layer l its config number `choices[l]`.

        Args:
            choices: one config index per layer, each in [0, C_l).

        Returns:
            The sums over layers and edges, in seconds; infinite if something is not allowed.

        Raises:
            ValueError: there is not one choice per layer, or one is out of range.
        """
        _check_count("choices", len(choices), len(self.compute_s), "layer")
        for layer, (choice, configs) in enumerate(zip(choices, self.num_configs, strict=True)):
            if not (_is_int(choice) and 0 <= choice < configs):
                name = f" ({self.names[layer]})" if self.names else ""
                raise ValueError(
                    f"choices[{layer}]{name} is {choice!r}: it must be a whole number from 0 to "
                    f"{configs - 1}, the index of one of the layer's {configs} configs."
                )
        return Cost(
            compute_s=_sum(t[c] for t, c in zip(self.compute_s, choices, strict=True)),
            transfer_s=_sum(
                table[choices[i], choices[j]]
                for (i, j), table in zip(self.edges, self.transfer_s, strict=True)
            )
            + _sum(t[c] for t, c in zip(self.exchange_s, choices, strict=True)),
            sync_s=_sum(t[c] for t, c in zip(self.sync_s, choices, strict=True)),
            overhead_s=_sum(t[c] for t, c in zip(self.overhead_s, choices, strict=True))
            + self.step_s,
        )


def check_costs(place: str, values: ArrayLike, shape: tuple[int | None, ...]) -> FloatArray:
    """`values` as a float64 array of costs in seconds, of the given shape.

    Args:
        place: what the array is called in messages.
        values: the costs; not copied where they are a float64 array already.
        shape: the shape required, None where any length from 1 on will do.

    Raises:
        ValueError: the shape differs, or an entry is no number, NaN or negative.
    """
    try:
        costs = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is no array of numbers ({error}): give costs in seconds, as float64."
        ) from error
    fits = costs.ndim == len(shape) and all(
        have == want or (want is None and have > 0)
        for have, want in zip(costs.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("1 or more" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{place} has shape {costs.shape}: it must be ({wanted}), "
            "one cost for each config of the layer (or layers) it belongs to."
        )
    if not costs.min() >= 0:  # one pass: NaN spreads through min, and compares false
        entry = np.unravel_index(np.argmin(costs >= 0), costs.shape)
        index = ", ".join(str(int(k)) for k in entry)
        raise ValueError(
            f"{place} has {costs[entry]} at [{index}]: a cost must be 0 s or more; correct the "
            "entry, or set it to inf if that config is not allowed."
        )
    return costs


def check_edges(edges: Sequence[tuple[int, int]], layers: int) -> tuple[tuple[int, int], ...]:
    """`edges` as plain integer pairs.

    Raises:
        ValueError: an edge is no pair of different layer indices in [0, layers).
    """
    for n, edge in enumerate(edges):
        if len(edge) != 2 or not all(_is_int(end) and 0 <= end < layers for end in edge):
            raise ValueError(
                f"edges[{n}] is {edge!r}: it must be a pair of layer indices from 0 to "
                f"{layers - 1}; correct the index, or give the missing layer's costs."
            )
        if edge[0] == edge[1]:
            raise ValueError(
                f"edges[{n}] is {edge!r}: an edge must join two different layers; add the "
                "diagonal of its costs to the layer's own costs instead."
            )
    return tuple((int(i), int(j)) for i, j in edges)


def _check_count(place: str, have: int, want: int, unit: str) -> None:
    if have != want:
        raise ValueError(
            f"{place} has {have} entries: it must have {want}, one for each {unit}; "
            "add the missing ones or drop the surplus."
        )


def _sum(values: Iterable[float]) -> float:
    """Left to right in Python floats, of which numpy's would warn where they overflow to inf."""
    total = 0.0
    for value in values:
        total += float(value)
    return total


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _frozen_copy(costs: FloatArray) -> FloatArray:
    copy = costs.copy()
    copy.flags.writeable = False
    return copy
