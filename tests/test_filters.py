"""Gradients of filters are taken as vectors where that saves XLA for GPUs the turning."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlwp
from jaxlwp.check._verify import check_layers

RATES = jaxlwp.Rates(flops_per_s=1e11, memory_bytes_per_s=1e10)
DIMS = ("NDHWC", "DHWIO", "NDHWC")
FILTERS = {
    "three": (3, 3, 3, 4, 8),
    "point": (1, 1, 1, 8, 4),
    "transposed": (2, 2, 2, 4, 4),
    "flat": (1, 1, 4, 4),
    "two": (3, 3, 4, 4),
}


def loss(params: Any, x: jax.Array) -> jax.Array:
    """Convolutions in bfloat16 of parameters in float32, and a penalty that reads one as it is."""
    k = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    x = jnp.tanh(
        jax.lax.conv_general_dilated(x, k["three"], (1,) * 3, "SAME", (1,) * 3, (1,) * 3, DIMS)
    )
    x = jnp.tanh(
        jax.lax.conv_general_dilated(x, k["point"], (1,) * 3, "SAME", (1,) * 3, (1,) * 3, DIMS)
    )
    x = jax.lax.conv_transpose(x, k["transposed"], (2,) * 3, "SAME", dimension_numbers=DIMS)
    x = jnp.tanh(x).reshape(x.shape[0], -1, x.shape[3], x.shape[4])
    for name in ("flat", "two"):
        x = jax.lax.conv_general_dilated(
            x, k[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return jnp.mean(x.astype(jnp.float32) ** 2) + 1e-3 * jnp.sum(params["three"] ** 2)


def size(name: str) -> int:
    return int(np.prod(FILTERS[name]))


@pytest.fixture(scope="module")
def arguments() -> Any:
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in FILTERS.items()}
    return params, jnp.asarray(rng.normal(size=(8, 4, 4, 4, 4)), jnp.bfloat16)


def made(text: str, name: str) -> list[tuple[int, ...]]:
    """Shapes of the bfloat16 results of a primitive in a printed jaxpr."""
    found = re.findall(rf":bf16\[([\d,]*)\](?:\{{[^}}]*\}})? = {name}", text)
    return sorted(tuple(int(n) for n in shape.split(",") if n) for shape in found)


def differentiated(arguments: Any, **how: Any) -> str:
    """The differentiated program of a plan whose gradients are those of one device."""
    plan = jaxlwp.parallelize(loss, *arguments, rates=RATES, **how)
    found, expected = (jax.jit(jax.grad(each))(*arguments) for each in (plan, loss))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0.05, atol=0.01 * float(jnp.abs(right).max()))
    assert all(layer.agrees for layer in check_layers(plan))
    return str(jax.make_jaxpr(jax.grad(plan))(*arguments))


TURNED = [(size("point"),), (size("transposed"),), (size("three"),)]
KEPT = [FILTERS["transposed"]]


def test_added_up(arguments: Any) -> None:
    text = differentiated(arguments, devices=4, strategy="data")
    flat = [(size("flat"),)]  # it becomes varying as a vector
    assert made(text, "psum") == sorted([s for n, s in FILTERS.items() if n != "flat"] + flat)
    assert made(text, "optimization_barrier") == sorted(TURNED + KEPT)


def test_not_added_up(arguments: Any) -> None:
    """A filter whose output channels all devices split, and one that a device has whole."""
    text = differentiated(arguments, devices=4, strategy="model")
    assert (size("three") // 4,) in made(text, "optimization_barrier")
    text = differentiated(arguments, devices=1)
    assert made(text, "optimization_barrier") == sorted(TURNED + KEPT)


def test_evaluated(arguments: Any) -> None:
    """What is only evaluated has no gradients: nothing is kept for them."""
    plan = jaxlwp.parallelize(loss, *arguments, devices=4, rates=RATES, train=False)
    assert not made(str(jax.make_jaxpr(plan)(*arguments)), "optimization_barrier")
