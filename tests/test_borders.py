"""Padding with an array's own rows: recognised however it is written, priced and run as a halo."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.lower._halo import Halo, assemble, neighbours, plan_halo, receive
from jaxlwp.ops import Window
from jaxlwp.ops._extend import border_of
from jaxlwp.plan._plan import bind
from jaxlwp.program._border import Border, extend
from jaxlwp.space._constraints import Constraints

RATES = jaxlwp.Rates(flops_per_s=1e11, memory_bytes_per_s=1e10)
MODES = ("wrap", "reflect", "symmetric", "edge")

# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "low", "high"), [(5, 2, 1), (9, 8, 8), (4, 0, 3), (7, 3, 0)])
def test_table_of_padding(mode: Any, size: int, low: int, high: int) -> None:
    table = np.pad(np.arange(size), (low, high), mode=mode)
    border, start = border_of(table, size) or (None, 0)
    assert border is not None
    assert (len(border.before), len(border.after), start) == (low, high, 0)
    x = np.random.default_rng(0).normal(size=(2, size))
    np.testing.assert_array_equal(
        extend(jnp.asarray(x), 1, border), jnp.asarray(np.pad(x, ((0, 0), (low, high)), mode=mode))
    )


@pytest.mark.parametrize("shift", [-4, -1, 0, 1, 3])
def test_table_of_roll(shift: int) -> None:
    border, start = border_of(np.roll(np.arange(9), shift), 9) or (None, 0)
    assert border is not None
    assert len(border.before) + len(border.after) == abs(shift)
    extended = [*border.before, *range(9), *border.after]
    assert extended[start : start + 9] == np.roll(np.arange(9), shift).tolist()


@pytest.mark.parametrize(
    "table",
    [[], [4, 3, 2, 1, 0], [0, 2, 1, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2]],
)
def test_other_rows_are_no_border(table: list[int]) -> None:
    assert border_of(np.array(table, np.int64), 5) is None


# --- the exchange --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One geometry: an array of 1, 2, ... `size`, its border, and a window over both."""

    size: int
    border: Border
    window: Window
    out_size: int
    parts: int

    @property
    def halo(self) -> Halo:
        return plan_halo(self.size, self.out_size, self.window.behind(self.border), self.parts)

    def blocks(self) -> Any:
        """The array, its blocks' padding -1."""
        missing = self.parts * self.halo.block - self.size
        return jnp.pad(jnp.arange(1, self.size + 1), (0, missing), constant_values=-1)

    def wanted(self) -> Any:
        """The rows that each device should have, padding -1."""
        before, after = (
            [row + 1 for row in rows] for rows in (self.border.before, self.border.after)
        )
        own = range(1, self.size + 1)
        at = dict(enumerate([*before, *own, *after], -len(before)))
        firsts = [i * self.halo.block + start for i, start in enumerate(self.halo.starts)]
        return [[at.get(first + row, -1) for row in range(self.halo.rows)] for first in firsts]


def draw_exchange(mode: Any, parts: int, draw: random.Random) -> Exchange:
    size = draw.randint(parts, 19)
    low, high = draw.randrange(min(size, 7)), draw.randrange(min(size, 7))
    rows = np.arange(size)
    table = np.roll(rows, low - high) if mode == "roll" else np.pad(rows, (low, high), mode=mode)
    border, start = border_of(table, size) or (None, 0)
    assert border is not None
    stride, dilation = draw.choice([(1, 1), (2, 1), (3, 1), (1, 2)])
    window = Window(
        size=draw.randint(1, 4),
        stride=stride,
        dilation=dilation,
        pad_low=draw.choice([0, 1]) - start,
    )
    out_size = max(parts, (len(table) - window.extent) // stride + 1)
    return Exchange(size, border, window, out_size, parts)


def exchange(x: Any, halo: Halo) -> Any:
    """The rows that a device's output block reads, padding -1."""
    pieces = [(0, x)]
    for each in neighbours(halo):
        sent = x[each.begin : each.begin + each.rows]
        rows = receive(sent, ("i",), len(halo.starts), each.step, halo.received.ring)
        pieces.append((each.start, rows))
    return assemble(sorted(pieces, key=lambda piece: piece[0]), 0, ("i",), halo, -1)


@pytest.mark.parametrize("mode", [*MODES, "roll"])
@pytest.mark.parametrize("parts", [2, 4, 7])
def test_every_device_has_the_rows_that_it_reads(mode: str, parts: int) -> None:
    draw = random.Random(f"{mode} {parts}")
    drawn = [draw_exchange(mode, parts, draw) for _ in range(16)]
    mesh = jax.make_mesh(
        (parts,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts]
    )

    def run(blocks: list[Any]) -> list[Any]:
        return [exchange(x, one.halo) for x, one in zip(blocks, drawn, strict=True)]

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i")
    )
    step = jax.jit(mapped)
    for one, rows in zip(drawn, step([one.blocks() for one in drawn]), strict=True):
        np.testing.assert_array_equal(rows.reshape(parts, -1), one.wanted(), err_msg=str(one))


# --- in networks ---------------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions; `padding` is Flax's, or a mode of `jnp.pad`."""

    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        space = x.ndim - 2
        for n in range(2):
            if self.padding in MODES:
                x = jnp.pad(x, ((0, 0), *((1, 1),) * space, (0, 0)), mode=self.padding)
            padding = "VALID" if self.padding in MODES else self.padding
            x = nn.relu(nn.Conv(8, (3,) * space, padding=padding, name=f"conv{n}")(x))
        return x


def by_height(padding: str, size: int = 32) -> jaxlwp.Plan:
    x = jax.ShapeDtypeStruct((4, size, size, 8), jnp.float32)
    network = Network(padding)
    params = jax.eval_shape(network.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(network.apply(params, x) ** 2)

    return jaxlwp.parallelize(loss, params, x, devices=4, strategy="spatial", rates=RATES)


def sent(plan: jaxlwp.Plan) -> int:
    return sum(collective.num_bytes for collective in plan.collectives)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", *MODES])
def test_two_convolutions_send_what_zeros_would(padding: str) -> None:
    plan, zeros = by_height(padding), by_height("SAME")
    assert [layer.name for layer in plan.graph.layers] == ["conv0", "conv1", "reduce_0"]
    assert sent(plan) == sent(zeros)
    assert "height=4" in plan.strategy.configs["conv0"].describe(dict(plan.mesh.shape))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "edge"])
def test_what_is_priced_runs(padding: str) -> None:
    check = jaxlwp.verify(by_height(padding, size=13 if padding == "REFLECT" else 16))
    assert not check.disagreeing, str(check)
    assert check.predicted_bytes_by_kind == check.compiled_bytes_by_kind
    assert check.compiled_bytes_by_kind["collective-permute"] > 0


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "edge"])
def test_random_strategies_run_what_is_priced(padding: str) -> None:
    x = jnp.zeros((4, 13, 8, 6))
    network = Network(padding)
    params = network.init(jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(network.apply(params, x) ** 2)

    mesh = jaxlwp.make_mesh(jax.devices()[:8])
    space = jaxlwp.price(jaxlwp.trace(loss, params, x), jaxlwp.device_graph(mesh, rates=RATES))
    tree = jax.tree.structure(jax.eval_shape(loss, params, x))
    draw = random.Random(padding)
    for number in range(10):
        choices = [draw.randrange(len(configs)) for configs in space.configs]
        plan = bind(space, space.strategy(f"random {number}", choices), mesh, (params, x), tree)
        wrong = [layer for layer in check_layers(plan) if not layer.agrees]
        assert not wrong, wrong


@pytest.mark.parametrize("strategy", ["data", "spatial"])
def test_nothing_is_evaluated_again_for_a_gradient_that_needs_no_value(strategy: str) -> None:
    x = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    turned = jax.checkpoint(lambda x: jnp.pad(x, ((1, 0), (1, 2), (0, 0), (0, 0)), mode="reflect"))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(turned(2 * x)))

    plan = jaxlwp.parallelize(loss, x, devices=4, strategy=strategy, rates=RATES)
    wrong = [layer for layer in check_layers(plan) if not layer.agrees]
    assert not wrong, wrong


def vocoder(mode: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Filters between repeated edges: twice the rate, a periodic activation, and back."""

    def loss(filters: Any, x: jax.Array) -> jax.Array:
        numbers, options = ("NWC", "WIO", "NWC"), {"feature_group_count": x.shape[-1]}
        y = lax.conv_general_dilated(
            jnp.pad(x, ((0, 0), (5, 5), (0, 0)), mode=mode),
            filters["up"], (1,), ((11, 11),), (2,), None, numbers, **options,
        )  # fmt: skip
        y = y[:, 15:-15]
        y = y + jnp.sin(y) ** 2
        y = jnp.pad(y, ((0, 0), (5, 6), (0, 0)), mode=mode)
        y = lax.conv_general_dilated(
            y, filters["down"], (2,), "VALID", None, None, numbers, **options
        )
        return jnp.mean(y**2)

    return loss


def test_vocoder() -> None:
    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32)
    filters = {name: jax.ShapeDtypeStruct((12, 1, 8), jnp.float32) for name in ("up", "down")}
    split = Constraints(pin={"*": {"length": 4}})
    zeros, edge = (
        jaxlwp.parallelize(vocoder(mode), filters, x, devices=4, rates=RATES, constraints=split)
        for mode in ("constant", "edge")
    )
    assert sent(edge) <= 1.3 * sent(zeros)
    assert not [layer for layer in check_layers(edge) if not layer.agrees]
    kinds = {layer.kind for layer in edge.graph.layers}
    assert not kinds & {"concat", "reverse", "broadcast"}


# --- however it is written -----------------------------------------------------------------------


def kinds_of(apply: Callable[..., Any], x: jax.ShapeDtypeStruct, *weights: Any) -> list[str]:
    graph = jaxlwp.trace(lambda weights, x: jnp.sum(apply(x, *weights)), weights, x)
    return [layer.kind for layer in graph.layers]


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_flax(library: str, padding: str, space: int) -> None:
    x = jax.ShapeDtypeStruct((2, *(7, 8, 9)[:space], 3), jnp.float32)
    window = {"kernel_size": (5,) * space, "strides": 2, "kernel_dilation": (1, 2, 1)[:space]}
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    if library == "linen":
        conv = nn.Conv(4, padding=padding, **window, **types)
        params = jax.eval_shape(conv.init, jax.random.key(0), x)
        kinds = kinds_of(lambda x, params: conv.apply(params, x), x, params)
    else:
        module = nnx.Conv(3, 4, padding=padding, rngs=nnx.Rngs(0), **window, **types)
        kinds = kinds_of(lambda x, module: module(x), x, module)
    assert kinds == ["conv", "reduce"]


@pytest.mark.parametrize("mode", MODES)
def test_one_image_at_a_time(mode: str) -> None:
    """Equinox pads one image, channels first, gives it a batch of one, and is mapped."""

    def one(image: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jnp.pad(image, ((0, 0), (1, 1), (2, 2)), mode=mode)
        return jnp.squeeze(lax.conv_general_dilated(y[None], kernel, (1, 1), "VALID"), 0)

    x = jax.ShapeDtypeStruct((4, 3, 8, 9), jnp.float32)
    kernel = jax.ShapeDtypeStruct((5, 3, 3, 5), jnp.float32)
    kinds = kinds_of(lambda x, kernel: jax.vmap(one, (0, None))(x, kernel), x, kernel)
    assert not set(kinds) & {"concat", "reverse", "pad", "slice"}


def test_other_concatenations_stay() -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    for apply in (
        lambda x: jnp.concatenate([x, x], 1),
        lambda x: jnp.concatenate([x, jnp.flip(x, 1)], 1),
        lambda x: jnp.concatenate([x[:, 5:], 2 * x], 1),
        lambda x: jnp.concatenate([x[:, 1::2], x[:, ::2]], 1),
    ):
        assert "concat" in kinds_of(apply, x)


def test_pieces_in_order_are_the_array() -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    assert kinds_of(lambda x: jnp.concatenate([x[:, :3], x[:, 3:]], 1) ** 2, x) == ["reduce"]
    cut = kinds_of(lambda x: jnp.concatenate([x[:, 1:3], x[:, 3:7]], 1), x)
    assert cut == ["slice", "reduce"]


def test_outputs_that_are_the_array() -> None:
    """What is put together in order is nothing new: an argument, or what a layer has made."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    weight = jnp.linspace(-1.0, 1.0, 15).reshape(3, 5)

    def loss(weight: jax.Array, x: jax.Array) -> Any:
        y = jnp.tanh(x @ jnp.concatenate([weight[:1], weight[1:]], 0))
        y = jnp.concatenate([y[:, :1], y[:, 1:]], 1)
        nothing = jnp.pad(x[:, :0], ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
        return jnp.sum(y**2), (y, jnp.concatenate([x[:, :3], x[:, 3:]], 1), nothing)

    plan = jaxlwp.parallelize(loss, weight, x, devices=4, strategy="spatial", rates=RATES)
    assert "concat" not in {layer.kind for layer in plan.graph.layers}
    expected = jax.value_and_grad(loss, has_aux=True)(weight, x)
    actual = jax.jit(jax.value_and_grad(plan, has_aux=True))(weight, x)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["log", "reciprocal"])
def test_gradients_of_the_batch_do_not_see_padding(name: str) -> None:
    """What padding turns into infinity meets a cotangent that no parameter has part in."""

    def loss(params: Any, x: Any) -> Any:
        t = x.sum(0)  # padding is zero
        t = jnp.log(t) if name == "log" else 1 / t
        scaled = t * jax.lax.rsqrt((t * t).mean((0, 1)) + 1e-2)
        return jnp.sum(scaled * jnp.arange(1.0, 14)[:, None] * params)

    x = np.random.default_rng(0).uniform(1, 2, (2, 5, 13, 1)).astype(np.float32)
    params = np.ones((1,), np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    graph = jaxlwp.trace(loss, params, x)
    rates = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
    split = jaxlwp.Config.of({"height": ("a",), "width": ("b",)})
    configs = [[split.within(n.dimensions, n.even, {"a": 2, "b": 4})] for n in graph.layers]
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=rates), configs=configs)
    strategy = space.strategy("split", [0] * len(configs))
    plan = jaxlwp.bind(space, strategy, mesh, (params, x), jax.tree.structure(0.0))
    want = jax.grad(loss, argnums=(0, 1))(params, x)
    have = jax.jit(jax.grad(plan, argnums=(0, 1)))(params, x)
    for a, b in zip(want, have, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
