"""Changes of layout priced all at once cost what their collectives cost one by one."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost._changes import changes
from jaxlwp.cost._collectives import argument_collectives, layer_collectives, use_collectives
from jaxlwp.space._config import Layout
from jaxlwp.space._exchange import Collective, move_collectives
from jaxlwp.space._layout import layout_axes
from jaxlwp.space._moves import plan_moves


def device_graph(sizes: tuple[int, ...], levels: tuple[int, ...]) -> jaxlwp.DeviceGraph:
    """Mesh axes a, b, ...; the links of level 0 are slower."""
    axes = tuple(
        jaxlwp.devices.MeshAxis(
            name=name,
            size=size,
            level=level,
            latency_s=2e-5 - level * 1e-5,
            bytes_per_s=5e9 * (1 + 3 * level),
        )
        for name, size, level in zip("abcd", sizes, levels, strict=False)
    )
    return jaxlwp.DeviceGraph(
        axes=axes, conv_flops_per_s=5e12, dense_flops_per_s=4e12, memory_bytes_per_s=5e11
    )


DEVICES = (
    device_graph((2, 2, 2), (0, 0, 0)),
    device_graph((2, 2, 2), (0, 1, 1)),
    device_graph((3, 2, 2, 2), (0, 0, 1, 1)),
    device_graph((), ()),
)


@st.composite
def many_changes(draw: Callable[..., Any]) -> tuple[Any, ...]:
    """Devices, shape, layouts before, and what readers ask for."""
    devices = draw(st.sampled_from(DEVICES))
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 3, 7, 12, 14, 24, 48)), max_size=4)))
    axes = sorted(devices.axis_sizes)

    def layout() -> Layout:
        dims: list[tuple[str, ...]] = [()] * len(shape)
        for axis in draw(st.permutations(axes)):
            dim = draw(st.integers(-1, len(shape) - 1))
            if dim >= 0:
                dims[dim] = (*dims[dim], axis)
        return tuple(dims)

    def wanted() -> tuple[Layout, frozenset[str]]:
        target = layout()
        idle = draw(st.sets(st.sampled_from(axes))) if axes else set()
        return target, layout_axes(target) | idle

    sources = tuple(layout() for _ in range(draw(st.integers(1, 6))))
    return devices, shape, sources, tuple(wanted() for _ in range(draw(st.integers(1, 6))))


@settings(deadline=None, max_examples=300)
@given(
    case=many_changes(),
    forward=st.integers(1, 2),
    backward=st.integers(0, 1),
    more=st.sampled_from(((0.0, 0.0), (1e-3, 0.0), (0.0, 50.0), (0.0, 1e9))),
)
def test_every_pair(
    case: tuple[Any, ...], forward: int, backward: int, more: tuple[float, float]
) -> None:
    """The sum of the collectives, and a wait for the moves and for their transposes.

    What starts with others in a bucket pays for its share of the start.
    """
    devices, shape, sources, targets = case
    wait_s, bucket_bytes = more
    common = tuple(math.gcd(size, devices.num_devices) for size in shape)
    table = changes(
        sources, targets, True, common, forward, backward, devices, wait_s, bucket_bytes
    )

    def seconds_of(collective: Collective) -> float:
        latency_s, byte_s = devices.link_rate(collective.kind, collective.axes)
        if bucket_bytes and collective.kind not in ("all-to-all", "collective-permute"):
            latency_s *= min(1.0, collective.num_bytes / bucket_bytes)
        return latency_s + byte_s * collective.num_bytes

    seconds = table.seconds(shape, itemsize=2).reshape(len(sources), len(targets))
    sizes = devices.axis_sizes
    for row, source in zip(seconds, sources, strict=True):
        for priced, (target, active) in zip(row, targets, strict=True):
            moves = plan_moves(
                shape=shape, source=source, target=target, active=active, axis_sizes=sizes
            )
            times = (forward, backward)
            collectives = list(move_collectives(shape, 2, source, moves, sizes, gradient=True))
            expected = sum(seconds_of(c) * times[c.backward] for c in collectives)
            if math.prod(shape):
                expected += sum(wait_s * times[b] for b in {c.backward for c in collectives})
            assert math.isclose(priced, expected, rel_tol=1e-12), (source, target, active)


@pytest.mark.parametrize("name", ["models.alexnet:AlexNet", "models.resnet:ResNet18"])
@pytest.mark.parametrize("batch", [16, 20])
def test_tables_of_a_network(name: str, batch: int) -> None:
    workload = load_workload(name, batch=batch, input_shape=(67, 67, 3), abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    devices = DEVICES[1]
    sizes = devices.axis_sizes
    space = jaxlwp.price(graph, devices)
    draw = np.random.default_rng()

    def seconds(collectives: Any) -> float:
        return sum(map(devices.collective_s, collectives))

    def started_s(collectives: Any) -> float:
        """Sums of a normalisation, two and two: each starts once for both."""
        sums = Counter((c.axes, c.backward) for c in collectives if c.kind == "all-reduce")
        assert all(count == 2 for count in sums.values())
        return sum(devices.link_rate("all-reduce", axes)[0] for axes, _ in sums)

    for layer, configs in zip(graph.layers, space.configs, strict=True):
        n = int(draw.integers(len(configs)))
        within = layer_collectives(layer, configs[n], sizes)
        inside = seconds(within) - ("norm" in layer.name and started_s(within))
        own = seconds(argument_collectives(layer, configs[n], sizes))
        assert math.isclose(space.tables.exchange_s[layer.index][n], inside, rel_tol=1e-12)
        assert math.isclose(space.tables.sync_s[layer.index][n], own, rel_tol=1e-12)
    for edge, table in zip(graph.edges, space.tables.transfer_s, strict=True):
        for _ in range(5):
            i, j = (int(draw.integers(count)) for count in table.shape)
            source, target = space.configs[edge.source][i], space.configs[edge.target][j]
            expected = seconds(use_collectives(edge.use, source, target, sizes))
            assert math.isclose(table[i, j], expected, rel_tol=1e-12)


def test_gradients_start_together() -> None:
    """All sums of data parallelism start as often as there are buckets to fill."""
    workload = load_workload("models.alexnet:AlexNet", batch=16, abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    latency_s, byte_s = DEVICES[0].link_rate("all-reduce", ("a", "b", "c"))
    num_bytes = sum(4 * math.prod(shape.shape) for shape in jax.tree.leaves(workload.params))
    for bucket_bytes in (1e7, 1e12):
        devices = dataclasses.replace(DEVICES[0], bucket_bytes=bucket_bytes)
        space = jaxlwp.price(graph, devices)
        cost = space.evaluate(space.baseline("data"))
        starts = (cost.sync_s - byte_s * num_bytes) / latency_s
        large = [
            x for x in jax.tree.leaves(workload.params) if 4 * math.prod(x.shape) > bucket_bytes
        ]
        rest = num_bytes - sum(4 * math.prod(x.shape) for x in large)
        assert starts == pytest.approx(len(large) + rest / min(bucket_bytes, num_bytes))
