"""Searches against trying every strategy of a space, where there are few."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

import jaxlwp

MOST = 20_000
"""Strategies of the largest space that is tried whole."""

LONG = 2e10
"""Work after which a search is ended, and listed apart: some 30 s."""

_SHARES = (0.0, 0.1, 0.5, 0.9)
"""Memory limits, as places between the least and the most bytes."""

_CLOSE = 1e-9


def compare(space: jaxlwp.cost.SearchSpace) -> tuple[int, list[str], list[str]]:
    """How many searches were compared, what each wrong one got wrong, and those that took long."""
    if math.prod(len(configs) for configs in space.configs) > MOST:
        return 0, [], []
    every = np.array(list(itertools.product(*(range(len(c)) for c in space.configs))))
    costs, sizes = _sums(space, every), _bytes(space, every)
    wanted: list[tuple[str, dict[str, Any], float]] = [
        ("sum", {}, costs.min()),
        ("overlap", {"objective": "overlap"}, _overlap(space, every).min()),
        ("memory", {"objective": "memory"}, sizes.min()),
    ]
    for share in _SHARES:
        limit = float(np.quantile(sizes, share))
        wanted.append(("memory limit", {"memory_bytes": limit}, costs[sizes <= limit].min()))
    below = {"memory_bytes": float(sizes.min()) - 0.5}
    wanted.append(("below the least bytes", below, sizes.min()))
    problems, long = [], []
    for name, options, want in wanted:
        have = _found(space, options)
        if have is None:
            long.append(f"{name}: {options} of {len(every)} strategies takes over {LONG:.0e} sums")
        elif not math.isclose(have, want, rel_tol=_CLOSE, abs_tol=1e-15):
            problems.append(f"{name}: {options}: {have!r}, trying every strategy gives {want!r}")
    return len(wanted) - len(long), problems, long


def _found(space: jaxlwp.cost.SearchSpace, options: dict[str, Any]) -> float | None:
    """What a search finds, or the least bytes that it names; None if it takes too long."""
    try:
        result = jaxlwp.search(space, work_limit=LONG, **options)
    except TimeoutError:
        return None
    except jaxlwp.MemoryLimitError as error:
        return float(error.least_bytes)
    return float(result.value) if result.optimal else None


def _chosen(tables: Any, every: Any) -> Any:
    """Sum over layers of a table's entry for each strategy."""
    return sum(np.asarray(table)[every[:, n]] for n, table in enumerate(tables))


def _between(edges: Any, tables: Any, every: Any) -> Any:
    total = np.zeros(len(every))
    for (i, j), table in zip(edges, tables, strict=True):
        total = total + np.asarray(table)[every[:, i], every[:, j]]
    return total


def _sums(space: jaxlwp.cost.SearchSpace, every: Any) -> Any:
    """The paper's sum of every strategy."""
    tables = space.tables
    parts = (tables.compute_s, tables.sync_s, tables.exchange_s, tables.overhead_s)
    nodes = sum(_chosen(part, every) for part in parts)
    return nodes + _between(tables.edges, tables.transfer_s, every) + tables.step_s


def _overlap(space: jaxlwp.cost.SearchSpace, every: Any) -> Any:
    """Seconds of every strategy with gradients synchronised behind the backward pass.

    All work of the forward pass, then backward from the last layer on: the gradients of a layer
    are ready when its work and that of all layers behind it is done, and are synchronised after
    those of the layers behind it.
    """
    tables = space.tables
    count = len(space.configs)
    compute = np.stack([np.asarray(tables.compute_s[n])[every[:, n]] for n in range(count)])
    sync = np.stack([np.asarray(tables.sync_s[n])[every[:, n]] for n in range(count)])
    besides = _chosen(tables.exchange_s, every) + _chosen(tables.overhead_s, every)
    besides = besides + _between(tables.edges, tables.transfer_s, every)
    now = compute.sum(0) / 3 + besides
    done = now.copy()
    for n in reversed(range(count)):
        now = now + compute[n] * 2 / 3
        has = np.asarray(tables.sync_s[n]).max() > 0
        done = np.maximum(done, now) + sync[n] if has else done
    return np.maximum(done, now) + tables.step_s


def _bytes(space: jaxlwp.cost.SearchSpace, every: Any) -> Any:
    """Estimated peak bytes of every strategy."""
    tables = jaxlwp.memory.memory_costs(space.graph, space.configs, space.devices.axis_sizes)
    named = {
        name: [getattr(layer, name) for layer in tables.layers]
        for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "kept_bytes")
    }
    total = {name: _chosen(parts, every) for name, parts in named.items()}
    temporary = np.stack(
        [np.asarray(layer.temporary_bytes)[every[:, n]] for n, layer in enumerate(tables.layers)]
    )
    copied = _between(tables.edges, tables.copied_bytes, every)
    besides = np.maximum(total["kept_bytes"] + copied + temporary.max(0), total["gradient_bytes"])
    return total["parameter_bytes"] + total["optimizer_bytes"] + besides
