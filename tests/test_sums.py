"""Sums of gradients: in the dtype in which a layer computes, or in a wider one if asked for."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.cost import layer_configs
from jaxlwp.devices import device_graph, make_mesh
from jaxlwp.graph import trace
from jaxlwp.measure._local import local_step
from jaxlwp.space import Strategy
from tests.contracts.harness import compiler_options

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


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (2, 3)])
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
        for got in jax.jit(every, compiler_options=compiler_options(mesh))(*arguments):
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
