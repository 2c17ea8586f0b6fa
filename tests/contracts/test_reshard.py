"""Layout changes: every element arrives where it belongs, and so does every cotangent."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxlwp
from jaxlwp.lower._reshard import move_block
from jaxlwp.space import _moves, make_strategy
from jaxlwp.space._config import Layout
from jaxlwp.space._layout import Move, degree, layout_axes, local_shape
from jaxlwp.space._moves import plan_moves

AXES = {"a": 2, "b": 2, "c": 2}
MANY_AXES = {"a": 2, "b": 2, "c": 3, "d": 2, "e": 2, "f": 3}
"""More than are rearranged in every possible way; no devices are needed to follow moves."""


def reshard(
    x: Any,
    *,
    shape: tuple[int, ...],
    source: Layout,
    target: Layout,
    active: frozenset[str],
    axis_sizes: dict[str, int],
) -> Any:
    """Bring a block from one layout to another, inside `jax.shard_map`."""
    moves = plan_moves(
        shape=shape, source=source, target=target, active=active, axis_sizes=axis_sizes
    )
    before = source
    for move in moves:
        x, before = move_block(x, move, before, shape, axis_sizes), move.after
    return x


class Change(NamedTuple):
    shape: tuple[int, ...]
    source: Layout
    target: Layout
    active: frozenset[str]


@pytest.fixture(params=["every rearrangement", "the two best"])
def rearranged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to rearrange blocks, of which more mesh axes than there are here use the second."""
    if request.param == "the two best":
        monkeypatch.setattr(_moves, "_FEW_AXES", 0)
    _moves.plan_options.cache_clear()
    yield
    _moves.plan_options.cache_clear()


@st.composite
def changes(draw: Callable[..., Any], sizes: dict[str, int] = AXES) -> Change:
    shape = tuple(draw(st.lists(st.one_of(st.integers(1, 13), st.just(8)), min_size=1, max_size=3)))

    def layout() -> Layout:
        dims: list[tuple[str, ...]] = [()] * len(shape)
        for axis in draw(st.permutations(sorted(sizes))):
            dim = draw(st.integers(-1, len(shape) - 1))
            if dim >= 0 and degree((*dims[dim], axis), sizes) <= shape[dim]:
                dims[dim] = (*dims[dim], axis)
        return tuple(dims)

    source, target = layout(), layout()
    idle = draw(st.sets(st.sampled_from(sorted(sizes))))
    return Change(shape, source, target, layout_axes(target) | idle)


def padded(values: np.ndarray, layout: Layout) -> np.ndarray:
    """The array with NaN behind its end, so that every block under the layout is whole."""
    blocks = local_shape(values.shape, layout, AXES)
    sizes = [block * degree(axes, AXES) for block, axes in zip(blocks, layout, strict=True)]
    missing = [(0, full - size) for full, size in zip(sizes, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=np.nan)


def assert_blocks_equal(actual: jax.Array, expected: np.ndarray) -> None:
    """Every device's block, where `expected` is no padding."""
    assert actual.shape == expected.shape
    for shard in actual.addressable_shards:
        wanted = expected[shard.index]
        got = np.where(np.isnan(wanted), np.nan, np.asarray(shard.data))
        np.testing.assert_array_equal(got, wanted)


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(change=changes(), seed=st.integers(0, 2**31))
@pytest.mark.usefixtures("rearranged")
def test_value_and_transpose(mesh222: Mesh, change: Change, seed: int) -> None:
    shape, source, target, active = change
    # The result differs from device to device over the axes that are active but split nothing: one
    # copy for each, and the gradient is the sum over the copies.
    copies = tuple(axis for axis in AXES if axis in active - layout_axes(target))
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, shape).astype(np.float32)
    count = math.prod(AXES[axis] for axis in copies)
    cotangents = rng.integers(-9, 10, (count, *shape)).astype(np.float32)

    def move(block: Any) -> Any:
        moved = reshard(
            block, shape=shape, source=source, target=target, active=active, axis_sizes=AXES
        )
        return moved[None]

    moved = jax.shard_map(
        move,
        mesh=mesh222,
        in_specs=PartitionSpec(*(axes or None for axes in source)),
        out_specs=PartitionSpec(copies or None, *(axes or None for axes in target)),
    )

    def value_and_transpose(x: Any, cotangent: Any) -> tuple[Any, Any]:
        value, transpose = jax.vjp(moved, x)
        return value, transpose(cotangent)[0]

    step = jax.jit(value_and_transpose)
    cotangent = np.stack([padded(c, target) for c in cotangents])
    value, gradient = step(jnp.asarray(padded(x, source)), jnp.asarray(cotangent))
    assert_blocks_equal(value, np.stack([padded(x, target)] * count))
    assert_blocks_equal(gradient, padded(cotangents.sum(0), source))


def carried_out(move: Move, before: Layout, varying: set[str], sizes: dict[str, int]) -> Layout:
    """The layout after a move; notes in `varying` over which axes the value then varies."""
    dims = [list(axes) for axes in before]
    axes = list(move.axes)
    assert axes
    if move.kind in ("all_gather", "all_to_all"):
        assert dims[move.dim][-len(axes) :] == axes
        del dims[move.dim][-len(axes) :]
    if move.kind == "all_to_all":
        assert move.to_dim != move.dim
        dims[move.to_dim].extend(axes)
    if move.kind == "slice":
        dims[move.dim].extend(axes)
    if move.kind == "permute":
        assert set(axes) == layout_axes(before) == layout_axes(move.after)
        dims = [list(axes) for axes in move.after]
        same = zip(before, move.after, strict=True)
        assert all(degree(old, sizes) == degree(new, sizes) for old, new in same)
    if move.kind in ("slice", "cast"):
        assert not varying & set(axes)
        varying.update(axes)
    if move.kind == "all_gather" and not move.varying:
        varying.difference_update(axes)
    return tuple(tuple(axes) for axes in dims)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
@pytest.mark.parametrize("sizes", [AXES, MANY_AXES], ids=["three axes", "six axes"])
def test_moves_chain(sizes: dict[str, int], data: st.DataObject) -> None:
    shape, source, target, active = data.draw(changes(sizes))
    moves = plan_moves(shape=shape, source=source, target=target, active=active, axis_sizes=sizes)
    layout, varying = source, set(layout_axes(source))
    for move in moves:
        layout = carried_out(move, layout, varying, sizes)
        assert layout == move.after
        split = [axis for axes in layout for axis in axes]
        assert len(split) == len(set(split)), "a mesh axis splits one dimension"
        assert set(split) <= varying
    assert layout == target
    assert varying == active


def test_nothing_to_do_is_no_move() -> None:
    layout = (("a",), ("b",))
    assert not plan_moves(
        shape=(7, 9), source=layout, target=layout, active=frozenset("ab"), axis_sizes=AXES
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_pieces_of_an_exchange_that_are_padding_alone(rows: int) -> None:
    """A product, its result laid out anew over more devices than it has rows; compiled as JAX does.

    In the gradient the other dimension is padded.
    """
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("z", "y"))

    def loss(params: Any, x: Any) -> Any:
        product = jnp.einsum("abcd,ae->ebcd", x @ jnp.swapaxes(x, -1, -2), params["w"])
        return jnp.mean(jnp.moveaxis(product, -1, 0) ** 2)

    draw = np.random.default_rng(0)
    params = {"w": jnp.asarray(draw.normal(size=(6, 6)), jnp.float32)}
    x = jnp.asarray(draw.normal(size=(6, 2, rows, 2)), jnp.float32)
    graph = jaxlwp.trace(loss, params, x)
    rates = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=rates))
    first = [max(configs, key=lambda c: len(c.axes("sample"))) for configs in space.configs]
    rng = random.Random(rows)
    plans = []
    for n in range(6):
        configs = first if n == 0 else [rng.choice(known) for known in space.configs]
        strategy = make_strategy(f"{n}", graph, configs, space.devices.axis_sizes)
        out = jax.tree.structure(0.0)
        plans.append(jaxlwp.bind(space, strategy, mesh, (params, x), out))
    want = jax.value_and_grad(loss)(params, x)
    steps = [jax.value_and_grad(plan) for plan in plans]
    have = jax.jit(lambda *given: [step(*given) for step in steps])(params, x)
    for result in have:
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(result), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def stacked(x: Any) -> Any:
    """Two tensors that XLA lays out differently, side by side, and a product that says how."""
    both = jnp.stack([x.at[:-1].max(jnp.sin(x[:-1])), x], 4)
    y = lax.rsqrt(1 + lax.reduce_window(both, -jnp.inf, lax.max, (1, 2, 3, 3, 1), (1,) * 5, "SAME"))
    return y @ jnp.swapaxes(y, -1, -2)


def sliced(x: Any) -> Any:
    """The gradient of what is read is zeros but for the slice."""
    y = jnp.moveaxis(jnp.stack([x, x * x], 4), -1, 1)
    return jnp.swapaxes(jnp.sin(y)[:, :, :1], -1, -2) @ jnp.cos(y)[:, 1:, :1]


@pytest.mark.parametrize("of", [stacked, sliced])
def test_pieces_of_an_exchange_that_are_known(of: Callable[[Any], Any]) -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))

    def loss(params: Any) -> Any:
        return jnp.mean(of(params["x"]) ** 2)

    params = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2, 2)), jnp.float32)}
    graph = jaxlwp.trace(loss, params)
    rates = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=rates))
    rng, plans = random.Random(0), []
    for name in ("sample", *(f"{n}" for n in range(12))):
        # Layers by sample in turns with layers by another dimension: exchanges between all.
        configs = [
            max(known, key=lambda c: len(c.axes("sample")))
            if name == "sample" and layer.index % 2
            else rng.choice(known)
            for layer, known in zip(graph.layers, space.configs, strict=True)
        ]
        strategy = make_strategy(name, graph, configs, space.devices.axis_sizes)
        plans.append(jaxlwp.bind(space, strategy, mesh, (params,), jax.tree.structure(0.0)))
    want = jax.value_and_grad(loss)(params)
    steps = [jax.value_and_grad(plan) for plan in plans]
    have = jax.jit(lambda *given: [step(*given) for step in steps])(params)
    for result in have:
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(result), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
