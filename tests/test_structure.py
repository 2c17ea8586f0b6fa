"""Arguments of another structure than the plan's: the error names the first difference, briefly."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxlwp
from jaxlwp.program import first_difference, positional_names

RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
Pair = collections.namedtuple("Pair", "a b")


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norms[0](self.dense(x))


@pytest.mark.parametrize(
    ("have", "want", "says"),
    [
        ({"a": 1}, {"b": 1}, "all of it is a dict of a, and was a dict of b"),
        ({"a": {"k": 1}}, {"a": 1}, "['a'] is a dict, and was an array"),
        ({"a": [1, (2, 3)]}, {"a": [1, [2, 3]]}, "['a'][1] is a tuple, and was a list"),
        ([1, 2], [1, 2, 3], "all of it is a list of 2, and was a list of 3"),
        ({"a": None}, {"a": 1}, "['a'] is None, and was an array"),
        (Pair(1, [2]), Pair(1, 2), "[1] is a list, and was an array"),
        ({str(n): n for n in range(99)}, {"x": 1}, "..., and was a dict of x"),
    ],
)
def test_first_difference(have: Any, want: Any, says: str) -> None:
    told = first_difference(jax.tree.structure(have), jax.tree.structure(want))
    assert told.endswith(says) and len(told) < 200


def test_names() -> None:
    assert positional_names(lambda params, x, *, key: x, 2) == ("params", "x")
    assert positional_names(lambda *args: args, 3) == ("params", "args[0]", "args[1]")
    assert positional_names(None, 2) == ("params", "args[0]")


def test_a_module_in_another_mode() -> None:
    model = Network(nnx.Rngs(0))

    def loss(model: Network, x: jax.Array) -> jax.Array:
        return jnp.mean(model(x) ** 2)

    plan = jaxlwp.parallelize(loss, model, jnp.ones((8, 4)), devices=4, rates=RATES)
    model.eval()
    with pytest.raises(ValueError, match="switch modes inside the function") as caught:
        plan(model, jnp.ones((8, 4)))
    assert "model['norms'][0].use_running_average is True, and was False" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_arguments_that_are_left_out() -> None:
    def loss(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean((images @ params + stats["mean"]) ** 2) + jnp.mean(labels)

    params, stats, images, labels = jnp.ones((4, 4)), {"mean": jnp.ones(4)}, jnp.ones((8, 4)), 1.0
    plan = jaxlwp.parallelize(loss, params, stats, images, labels, devices=4, rates=RATES)
    with pytest.raises(ValueError) as caught:
        plan.place_batch(images, labels)
    assert "place_batch: stats is an array, and was a dict" in str(caught.value)
    assert "after its parameters (stats, images, labels)" in str(caught.value)
    with pytest.raises(ValueError, match="cannot be called with 3 positional arguments"):
        plan(params, images, labels)
    assert plan.place_batch(stats)["mean"].shape == (4,)
