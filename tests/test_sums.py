"""Sums of gradients: in the dtype in which a layer computes, or in a wider one if asked for."""

from __future__ import annotations

import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.cost import AnalyticCostModel, layer_configs
from jaxlwp.devices import device_graph, make_mesh
from jaxlwp.graph import trace
from jaxlwp.measure._local import local_step
from jaxlwp.optimize._floor import floor_s
from jaxlwp.space import Config, Strategy
from tests.contracts.harness import drawn

RATES = jaxlwp.Rates(flops_per_s=1e11, memory_bytes_per_s=1e10)
WIDE, NARROW = jnp.float64, jnp.float32
"""Parameters and computation; as float32 and bfloat16 would be, but with rounding told apart."""


def network(params: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """A checkpointed convolution and two dense layers of one weight, computed in `dtype`."""

    def narrow(name: str) -> jax.Array:
        return params[name].astype(dtype)

    @jax.checkpoint
    def block(x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, narrow("kernel"), (1, 1), "SAME", dimension_numbers=dims
        )

    x = jnp.tanh(block(x.astype(dtype)) + narrow("bias")).reshape(x.shape[0], -1)
    x = jnp.tanh(x @ narrow("in"))
    x = jnp.tanh(x @ narrow("shared")) @ narrow("shared")
    return x.astype(params["in"].dtype)


def loss(params: Any, x: jax.Array) -> jax.Array:
    # The penalty reads a parameter as it is, beside the layer that reads it cast.
    return jnp.mean(network(params, x, NARROW) ** 2) + 0.01 * jnp.sum(params["in"] ** 2)


@pytest.fixture(scope="module")
def arguments() -> Any:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"kernel": (3, 3, 2, 4), "bias": (4,), "in": (96, 8), "shared": (8, 8)}
        params = {name: jnp.asarray(rng.normal(size=s), WIDE) for name, s in shapes.items()}
        return params, jnp.asarray(rng.normal(size=(8, 6, 4, 2)), WIDE)


def gradient_bytes(arguments: Any, sum_dtype: Any) -> int:
    """Bytes of all-reduces of data parallelism, checked against its program."""
    with jax.enable_x64(True):
        plan = jaxlwp.parallelize(
            loss, *arguments, devices=4, strategy="data", rates=RATES, sum_dtype=sum_dtype
        )
        assert all(layer.agrees for layer in check_layers(plan))
        compiled = jaxlwp.verify(plan).compiled_bytes_by_kind
        assert compiled == {"all-reduce": sum(c.num_bytes for c in plan.collectives)}
        return compiled["all-reduce"]


def test_bytes(arguments: Any) -> None:
    sizes = {name: x.size for name, x in arguments[0].items()}
    count = sum(sizes.values())
    assert gradient_bytes(arguments, None) == 4 * count + 8  # 8 of the loss
    assert gradient_bytes(arguments, NARROW) == 4 * count + 8
    assert gradient_bytes(arguments, WIDE) == 8 * count + 8


def test_narrow_parameters_are_added_up_in_a_wide_dtype_if_asked_for() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ params.astype(jnp.float32)) ** 2)

    shapes = (
        jax.ShapeDtypeStruct((8, 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, 8), jnp.float32),
    )
    for sum_dtype, num_bytes in ((None, 2), (jnp.bfloat16, 2), (jnp.float32, 4)):
        plan = jaxlwp.parallelize(
            loss, *shapes, devices=4, strategy="data", rates=RATES, sum_dtype=sum_dtype
        )
        assert all(layer.agrees for layer in check_layers(plan))
        assert sum(c.num_bytes for c in plan.collectives) == 4 + num_bytes * 8 * 16


@pytest.mark.parametrize("shape", drawn([(2, 4), (4, 2), (2, 3)], 0.5))
@pytest.mark.parametrize("sum_dtype", [None, "float64"])
def test_numbers_of_one_device(arguments: Any, shape: tuple[int, int], sum_dtype: Any) -> None:
    with jax.enable_x64(True):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("a", "b"))
        graph = trace(loss, *arguments, sum_dtype=sum_dtype)
        given = jaxlwp.price(graph, jaxlwp.devices.device_graph(mesh, rates=RATES))
        rng = random.Random(f"{shape}")
        strategies: list[Any] = [given.baseline(name) for name in ("model", "spatial")]
        for _ in range(4):
            configs = {
                layer.name: rng.choice(choices)
                for layer, choices in zip(graph.layers, given.configs, strict=True)
            }
            like = strategies[0]
            strategies.append(Strategy(**{**vars(like), "configs": configs, "name": "random"}))
        plans = [
            jaxlwp.parallelize(
                loss, *arguments, mesh=mesh, strategy=strategy, rates=RATES, sum_dtype=sum_dtype
            )
            for strategy in strategies
        ]
        assert all(layer.agrees for plan in plans for layer in check_layers(plan))

        def every(*arguments: Any) -> list[Any]:
            return [jax.value_and_grad(plan)(*arguments) for plan in plans]

        expected = jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(*arguments))
        for got in jax.jit(every)(*arguments):
            for a, b in zip(expected, jax.tree.leaves(got), strict=True):
                assert a.dtype == b.dtype
                assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(a).max()


def test_another_function_adds_up_alike(arguments: Any) -> None:
    with jax.enable_x64(True):
        plan = jaxlwp.parallelize(
            loss, *arguments, devices=4, strategy="data", rates=RATES, sum_dtype=WIDE
        )
        again = plan.rebind(*arguments[1:])
        assert again.collectives == plan.collectives


@pytest.mark.parametrize("dtype", ["int32", "no such", 3.5])
def test_no_floating_point_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"sum_dtype: {dtype!r} is no floating-point dtype; give"):
        trace(lambda p: p, jnp.zeros(()), sum_dtype=dtype)


def test_one_channel_is_cast_in_parts() -> None:
    """A cast has no name for a dimension of size 1, and is split along the others all the same."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        weights = params.astype(jnp.bfloat16)
        y = jax.lax.conv_general_dilated(
            x.astype(jnp.bfloat16), weights, (1, 1), "SAME", dimension_numbers=dims
        )
        return jnp.mean(jnp.tanh(y).astype(jnp.float32))

    shapes = ((3, 3, 1, 8), (8, 16, 16, 1))
    graph = trace(loss, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    first = graph.layers[0]
    labels = {use.info.shape: use.labels for use in first.uses}
    assert labels[shapes[1]] == ("sample", "height", "width", None)
    assert labels[shapes[0]] == (None, None, None, "channel")
    mesh = make_mesh(jax.devices()[:4])
    sizes = {str(name): size for name, size in mesh.shape.items()}
    (configs,) = layer_configs([first], device_graph(mesh, rates=RATES))
    for config in configs:
        # A layer alone is built of what its uses say, or not at all.
        local_step(graph, first, config, sizes)


def bytes_of_sums(loss: Any, params: Any, sum_dtype: Any = None) -> tuple[int, jaxlwp.Plan]:
    """Bytes of all-reduces of data parallelism, of a batch of 8 rows of 16 numbers."""
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    plan = jaxlwp.parallelize(
        loss, params, x, devices=4, strategy="data", rates=RATES, sum_dtype=sum_dtype
    )
    assert all(layer.agrees for layer in check_layers(plan))
    return sum(c.num_bytes for c in plan.collectives) - 4, plan


@pytest.mark.parametrize(
    "dtypes, sum_dtype, num_bytes",
    [
        (("bfloat16", "float32"), None, 4),  # rounded, as for training with fewer bits
        (("float8_e4m3fn", "float32"), None, 4),
        (("float8_e4m3fn", "bfloat16"), None, 2),
        (("bfloat16", "float32"), "float32", 4),
        (("bfloat16", "float8_e5m2", "bfloat16"), None, 2),
        (("bfloat16", "float16"), None, 2),
        (("float16", "bfloat16", "float32"), None, 4),
    ],
)
def test_rounded_weights_are_added_up_as_the_layer_computes(
    dtypes: tuple[str, ...], sum_dtype: Any, num_bytes: int
) -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        weights = params
        for dtype in dtypes:
            weights = weights.astype(dtype)
        return jnp.mean(jnp.tanh(x.astype(weights.dtype) @ weights).astype(jnp.float32) ** 2)

    found, plan = bytes_of_sums(loss, jax.ShapeDtypeStruct((16, 8), jnp.float32), sum_dtype)
    assert found == num_bytes * 16 * 8
    sums = {use.moved.dtype for layer in plan.graph.layers for use in layer.uses if use.gradient}
    assert np.dtype(dtypes[-1]) in sums or num_bytes == 2


def test_devices_do_not_add_up_in_eight_bits() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        weights = params.astype(jnp.float8_e4m3fn)
        y = jax.lax.dot(x, weights, preferred_element_type=jnp.float32)
        return jnp.mean(jnp.tanh(y) ** 2)

    found, _ = bytes_of_sums(loss, jax.ShapeDtypeStruct((16, 8), jnp.float32))
    assert found == 4 * 16 * 8


def test_equal_casts_are_priced_as_one() -> None:
    def loss(params: Any, x: jax.Array, times: int) -> jax.Array:
        y = (x @ params["w"]).astype(jnp.bfloat16)
        for _ in range(times):
            y = y * params["scale"].astype(jnp.bfloat16)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    shapes = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "scale": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    costs = [
        bytes_of_sums(lambda p, x, times=times: loss(p, x, times), shapes)[1].cost
        for times in (1, 2)
    ]
    assert costs[0].sync_s == costs[1].sync_s and costs[0].overhead_s == costs[1].overhead_s


def test_a_parameter_that_is_read_in_two_dtypes_is_updated_once() -> None:
    def loss(params: Any, x: jax.Array, twice: bool) -> jax.Array:
        y = (x @ params["w"]).astype(jnp.bfloat16) * params["scale"].astype(jnp.bfloat16)
        return jnp.mean((y.astype(jnp.float32) + (params["scale"] if twice else 1.0)) ** 2)

    shapes = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "scale": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    costs = []
    devices = jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()[:4]), rates="h200")
    for twice in (False, True):
        graph = trace(functools.partial(loss, twice=twice), shapes, x)
        value = graph.program.inputs[graph.argument_names.index("params['scale']")]
        found = [u for layer in graph.layers for u in layer.uses if u.value == value]
        assert len(found) == 1 + twice
        space = jaxlwp.price(graph, devices)
        assert floor_s(graph, AnalyticCostModel.of(graph, devices)) <= jaxlwp.search(space).value
        replicated = [choices.index(Config()) for choices in space.configs]
        costs.append(space.tables.evaluate(replicated))  # no sums: what is left is the update
    assert costs[0].overhead_s == costs[1].overhead_s > 0


@pytest.mark.parametrize("shape", [(8, 6), (8, 2, 3)], ids=["rows", "vectors"])
@pytest.mark.parametrize("constant", [False, True], ids=["both", "one"])
def test_sums_that_are_put_together_are_right_however_differentiated(
    constant: bool, shape: tuple[int, ...]
) -> None:
    """Values and their squares are one all-reduce; so are the cotangents of what is made of them.

    The numbers are right in forward mode, reverse mode, both, and reverse mode twice; where one of
    the sums has no derivative; and whether they are rows or not.
    """

    def loss(kernel: Any, x: Any) -> Any:
        y = (x @ kernel).reshape(shape)
        mean, square = y.mean(0), ((jax.lax.stop_gradient(y) if constant else y) ** 2).mean(0)
        return jnp.mean(((y - mean) * jax.lax.rsqrt(square - mean**2 + 1.0)) ** 3)

    rng = np.random.default_rng(0)
    kernel, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 6), (8, 5)))
    plan = jaxlwp.parallelize(loss, kernel, x, devices=4, strategy="data", rates=RATES)
    forward = jax.make_jaxpr(plan)(kernel, x)
    assert str(forward).count("psum_invariant[") == 2  # the statistics', and the loss's
    backward = jax.make_jaxpr(jax.grad(plan))(kernel, x)
    assert str(backward).count("psum_invariant[") == 4  # also theirs, and the kernel's
    assert all(layer.agrees for layer in check_layers(plan))
    for transform in (
        jax.grad,
        jax.jacfwd,
        lambda fn: lambda k, x: jax.jvp(jax.grad(lambda k: fn(k, x)), (k,), (jnp.ones_like(k),)),
        lambda fn: jax.grad(lambda k, x: jnp.sum(jax.grad(fn)(k, x) ** 2)),
    ):
        have, want = transform(plan)(kernel, x), transform(loss)(kernel, x)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), have, want
        )
