"""What devices fetch of a tensor between two layers, as the paper counts it.

Here a layer runs on as many devices as its config has parts: over a mesh axis that splits none of
its dimensions, it runs where the axis is 0. (The programs of jaxlwp repeat such a layer on all
devices instead; `use_collectives` is what those communicate.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxlwp.cost._model import distinct
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import Use
from jaxlwp.solver import FloatArray
from jaxlwp.space import Config, Layout, cdiv, degree


def fetched_bytes(
    use: Use, sources: Sequence[Config], targets: Sequence[Config], devices: DeviceGraph
) -> dict[int, FloatArray]:
    """Bytes that the devices of the reading layer fetch: what they read and do not have.

    A device takes each element from as near as it can. Where the tensor has a gradient, as much
    goes back in the backward pass; that is not in here.

    Args:
      use: the tensor, and how the two layers name its dimensions.
      sources: configs of the layer that holds it.
      targets: configs of the layer that reads it.
      devices: mesh axes, and the link level of each.

    Returns:
      For every link level, the bytes of all devices together over its links: shape (sources,
      targets). Inner levels come first.
    """
    have, have_of = distinct([(c.layout(use.source_labels), c.used_axes) for c in sources])
    want, want_of = distinct([(c.layout(use.labels), c.used_axes) for c in targets])
    places = _places(devices)
    runs = np.array([_runs(used, devices, places) for _, used in have])
    reads = np.array([_runs(used, devices, places) for _, used in want])
    layouts, wanted = [layout for layout, _ in have], [layout for layout, _ in want]
    levels = sorted({axis.level for axis in devices.axes}, reverse=True)
    # Devices of one group reach each other by links of a level and of inner ones: first each device
    # is by itself, at last all are one group.
    groups = [np.arange(len(places)), *(_groups(devices, places, level) for level in levels)]
    there = [
        _shared(use, layouts, wanted, devices, places, group)
        * _any_of(runs, group)[:, None]
        * reads[None]
        for group in groups
    ]
    return {
        level: use.moved.itemsize * (there[n + 1] - there[n]).sum(-1)[np.ix_(have_of, want_of)]
        for n, level in enumerate(levels)
    }


def _places(devices: DeviceGraph) -> np.ndarray:
    """Coordinates of every device, a row each."""
    sizes = [axis.size for axis in devices.axes]
    return np.array(list(np.ndindex(*sizes)), int).reshape(math.prod(sizes), len(sizes))


def _runs(used: frozenset[str], devices: DeviceGraph, places: np.ndarray) -> np.ndarray:
    """Which devices a layer runs on that is split over the axes `used`."""
    unused = [axis.name not in used for axis in devices.axes]
    found: np.ndarray = (places[:, unused] == 0).all(1)
    return found


def _groups(devices: DeviceGraph, places: np.ndarray, level: int) -> np.ndarray:
    """Number of each device's group, within which links of `level` and inner ones reach."""
    outer = places[:, [axis.level < level for axis in devices.axes]]
    _, found = distinct([tuple(place) for place in outer])
    return np.array(found)


def _any_of(flags: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For each device (second dimension), whether the flag of any of its group is set."""
    found = np.zeros_like(flags)
    for number in np.unique(group):
        members = group == number
        found[:, members] = flags[:, members].any(1, keepdims=True)
    return found


def _shared(
    use: Use,
    layouts: Sequence[Layout],
    wanted: Sequence[Layout],
    devices: DeviceGraph,
    places: np.ndarray,
    group: np.ndarray,
) -> FloatArray:
    """Elements that a device wants and some device of its group has: (layouts, wanted, devices).

    An axis splits one dimension, so parts are products over dimensions, and so is what a group has.
    """
    elements = np.ones((len(layouts), len(wanted), len(places)))
    for dimension, size in enumerate(use.moved.shape):
        have, have_of = distinct([layout[dimension] for layout in layouts])
        want, want_of = distinct([layout[dimension] for layout in wanted])
        edges = _edges(size, {degree(axes, devices.axis_sizes) for axes in (*have, *want)})
        ours = np.array([_any_rows(_rows(size, a, devices, places, edges), group) for a in have])
        theirs = np.array([_rows(size, axes, devices, places, edges) for axes in want])
        rows = np.einsum("apk,bpk,k->abp", ours, theirs, np.diff([*edges, size]), optimize=True)
        elements *= rows[np.ix_(have_of, want_of)]
    return elements


def _edges(size: int, degrees: Iterable[int]) -> list[int]:
    """Where parts of a dimension begin, for all these numbers of parts."""
    blocks = [cdiv(size, parts) for parts in degrees]
    return sorted({0, *(start for block in blocks for start in range(0, size, max(block, 1)))})


def _rows(
    size: int,
    axes: Sequence[str],
    devices: DeviceGraph,
    places: np.ndarray,
    edges: Sequence[int],
) -> np.ndarray:
    """Which pieces of a dimension, from edge to edge, each device has: (devices, pieces)."""
    names = [axis.name for axis in devices.axes]
    block, number = cdiv(size, degree(axes, devices.axis_sizes)), np.zeros(len(places), int)
    for axis in axes:
        number = number * devices.axis_sizes[axis] + places[:, names.index(axis)]
    starts = np.array(edges)
    return ((number * block)[:, None] <= starts) & (starts < ((number + 1) * block)[:, None])


def _any_rows(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Which pieces some device of each device's group has."""
    return _any_of(rows.T, group).T
