"""Branch and bound for graphs too dense to eliminate: the layers one by one, prefixes by the batch.

The layers are fixed in a static order, those with the most neighbours left first. A prefix is a
config for each of the first layers. Prefixes of one length are bounded together, as `_bound` bounds
the whole, forward and back over the layers that are left: a min-plus product per edge for all of a
batch. The way back ends at the next layer, so one batch bounds every child of its prefixes. It also
gives each prefix a strategy.

The longest prefixes are extended first, those of least bound first; now and then the prefix of
least bound of all, which lifts the bound of the whole. Numbers only: no layers, no devices, no JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlwp.solver._bound import Relaxation, Report, descend, reparametrised
from jaxlwp.solver._eliminate import min_plus
from jaxlwp.solver._tables import FloatArray

_BATCH = 64
"""Prefixes bounded at a time: enough to fill the products, few enough to learn from each."""

_OPEN_LIMIT = 1 << 21
"""With as many prefixes open, only the longest are extended."""


@dataclass(frozen=True, kw_only=True)
class _Core:
    """The layers to branch on, renumbered in the order of branching.

    Attributes:
        layers: their numbers in the relaxation.
        costs: per layer, shape (C_l,), with the messages of the root in.
        tables: per layer and neighbour n, shape (C_l, C_n), with the messages taken out.
    """

    layers: tuple[int, ...]
    costs: list[FloatArray]
    tables: list[dict[int, FloatArray]]


@dataclass(frozen=True, kw_only=True)
class _Open:
    """Prefixes of one length whose children are not bounded yet, least bound last.

    Attributes:
        lower_s: shape (N,), descending.
        prefixes: shape (N, length), configs.
    """

    lower_s: FloatArray
    prefixes: NDArray[np.intp]


def branch(
    relaxation: Relaxation,
    upper_s: Callable[[], float],
    offer: Callable[[list[int]], None],
    lower: Report,
) -> int:
    """Searches until no prefix can lead to less than `upper_s()`.

    Args:
        relaxation: the problem, after some sweeps.
        upper_s: what strategies must cost less than to be of interest; may fall meanwhile.
        offer: called with strategies, per layer its config.
        lower: called with a bound of all strategies that are neither offered nor of no interest,
            before each batch.

    Returns:
        How many prefixes were bounded.
    """
    core = _make_core(relaxation)
    levels: list[list[_Open]] = [[] for _ in core.layers]
    levels[0] = [_Open(lower_s=np.array([-np.inf]), prefixes=np.zeros((1, 0), dtype=np.intp))]
    bounded, batches = 0, 0
    sums = sum(table.size for tables in core.tables for table in tables.values())  # both ways
    while any(levels):
        least, level = min((o.lower_s[-1], -d) for d, opened in enumerate(levels) for o in opened)
        lower(float(least), _BATCH * sums)
        count = sum(o.lower_s.size for opened in levels for o in opened)
        deepest = max(d for d, opened in enumerate(levels) if opened)
        batches += 1
        best_first = batches % 4 == 0 and count < _OPEN_LIMIT
        batch = _take(levels[-level if best_first else deepest], upper_s(), best_first)
        if len(batch):
            bounded += len(batch)
            strategy, child = _expand(core, batch, upper_s())
            offer(_refined(relaxation, core, strategy))
            _push(levels, child, upper_s())
    return bounded


def _make_core(relaxation: Relaxation) -> _Core:
    costs, tables = reparametrised(relaxation)
    left = set(range(len(costs)))
    layers: list[int] = []
    while left:
        layers.append(
            min(left, key=lambda v: (-len(left & tables[v].keys()), relaxation.costs[v].size, v))
        )
        left.remove(layers[-1])
    number = {layer: n for n, layer in enumerate(layers)}
    return _Core(
        layers=tuple(layers),
        costs=[costs[v] for v in layers],
        tables=[{number[n]: tables[v][n] for n in sorted(tables[v])} for v in layers],
    )


def _take(opened: list[_Open], upper_s: float, best_first: bool) -> NDArray[np.intp]:
    """Removes the prefixes of least bound of the last entry, or of the entry of least bound."""
    at = min(range(len(opened)), key=lambda k: opened[k].lower_s[-1]) if best_first else -1
    entry = opened.pop(at)
    start = np.searchsorted(-entry.lower_s, -upper_s, side="right")  # of interest from here on
    first = max(int(start), entry.lower_s.size - _BATCH)
    if first > start:
        rest = _Open(lower_s=entry.lower_s[start:first], prefixes=entry.prefixes[start:first])
        opened.append(rest)
    return entry.prefixes[first:] if first < entry.lower_s.size else np.empty((0, 0), dtype=np.intp)


def _push(levels: list[list[_Open]], child: _Open, upper_s: float) -> None:
    """Adds children that are of interest and have children of their own, by falling bound."""
    length = child.prefixes.shape[1]
    order = np.argsort(-child.lower_s, kind="stable")
    order = order[child.lower_s[order] < upper_s]
    if order.size and length < len(levels):
        levels[length].append(_Open(lower_s=child.lower_s[order], prefixes=child.prefixes[order]))


def _refined(relaxation: Relaxation, core: _Core, strategy: Sequence[int]) -> list[int]:
    """The strategy in the relaxation's numbers, after coordinate descent."""
    choices = [0] * len(core.layers)
    for layer, choice in zip(core.layers, strategy, strict=True):
        choices[layer] = int(choice)
    return descend(relaxation, choices)


def _expand(core: _Core, batch: NDArray[np.intp], upper_s: float) -> tuple[list[int], _Open]:
    """The batch's best strategy, and its children: every config of the next layer.

    Args:
        core: the layers.
        batch: shape (B, length), prefixes.
        upper_s: a config of a layer left that only strategies above this cost have is dropped.
    """
    size, length = batch.shape
    left = range(length, len(core.layers))
    spent, own = _given(core, batch)
    if len(left) == 1:
        bounds = spent[:, None] + own[length]
        choices = np.argmin(bounds, axis=1)[None]
        best = int(np.argmin(bounds.min(axis=1)))
    else:
        bounds, choices, cost_s = _sweep_both(core, length, own, spent, upper_s)
        best = int(np.argmin(cost_s))
    strategy = [*batch[best], *choices[:, best]]
    configs = np.arange(core.costs[length].size)
    prefixes = np.empty((size, configs.size, length + 1), dtype=np.intp)
    prefixes[:, :, :length] = batch[:, None, :]
    prefixes[:, :, length] = configs
    return strategy, _Open(lower_s=bounds.reshape(-1), prefixes=prefixes.reshape(-1, length + 1))


def _given(core: _Core, batch: NDArray[np.intp]) -> tuple[FloatArray, dict[int, FloatArray]]:
    """What prefixes cost, shape (B,), and given them each layer left, shape (B, C_l)."""
    size, length = batch.shape
    spent = np.zeros(size)
    for v in range(length):
        spent += core.costs[v][batch[:, v]]
        for n, table in core.tables[v].items():
            if n < v:
                spent += table[batch[:, v], batch[:, n]]
    own = {}
    for v in range(length, len(core.layers)):
        own[v] = np.repeat(core.costs[v][None], size, axis=0)
        for n in core.tables[v]:
            if n < length:
                own[v] += core.tables[n][v][batch[:, n]]
    return spent, own


def _sweep_both(
    core: _Core, length: int, own: dict[int, FloatArray], spent: FloatArray, upper_s: float
) -> tuple[FloatArray, NDArray[np.intp], FloatArray]:
    """Forward over the layers left, and back, for each prefix: `_bound.sweep` with a batch axis.

    Returns:
        bounds: shape (B, C), of each prefix with each config of its next layer.
        choices: shape (layers left, B), a strategy for each prefix.
        cost_s: shape (B,), what it costs.
    """
    end, size = len(core.layers), len(spent)
    near = {v: [n for n in core.tables[v] if n >= length] for v in range(length, end)}
    inbox: dict[int, dict[int, FloatArray]] = {v: {} for v in near}
    owed = {v: np.zeros(size) for v in near}
    done = np.zeros(size)
    for v in range(length, end):  # forward
        here = own[v] + sum(inbox[v].values())
        ahead = [n for n in near[v] if n > v]
        share = 1.0 / max(len(ahead), len(near[v]) - len(ahead), 1)
        for n in ahead:
            inbox[n][v], least = _hand_on(here * share, core.tables[v][n])
            owed[n] += least
        rest = np.min(here, axis=1) * max(0.0, 1.0 - share * len(ahead))
        owed[v], done = owed[v] + rest, done + owed[v] + rest
    waiting, done = done, spent
    choices, cost_s = np.zeros((end - length, size), dtype=np.intp), spent.copy()
    for v in range(end - 1, length - 1, -1):  # and back
        here = own[v] + sum(inbox[v].values())
        waiting = waiting - owed[v]
        fixed = own[v].copy()
        for n in near[v]:
            if n > v:
                fixed += core.tables[n][v][choices[n - length]]
        ahead = [n for n in near[v] if n < v]
        guess = fixed + sum(inbox[v][n] for n in ahead)
        choice = np.argmin(guess, axis=1)
        choices[v - length] = choice
        cost_s += np.take_along_axis(fixed, choice[:, None], axis=1)[:, 0]
        if v == length:
            return here + done[:, None], choices, cost_s
        share = 1.0 / max(len(ahead), len(near[v]) - len(ahead), 1)
        for n in ahead:
            inbox[n][v], least = _hand_on(here * share - inbox[v][n], core.tables[v][n])
            done = done + least
        done = done + np.min(here, axis=1) * max(0.0, 1.0 - share * len(ahead))
    raise AssertionError("no layer left")


def _hand_on(held: FloatArray, table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The message of shape (B, C_n) that `held` (B, C_l) gives, and its constant, shape (B,)."""
    message = min_plus(held, table)
    least = np.min(message, axis=1)
    return message - least[:, None], least
