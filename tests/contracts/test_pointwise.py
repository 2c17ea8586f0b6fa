"""Every elementwise operator, split by space: some of JAX's derivatives make constants."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.ops._elementwise import POINTWISE

RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)


def differentiable() -> list[tuple[str, int]]:
    """Operators that JAX can call by name on one to three equal arrays, and differentiate."""
    found = []
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), np.float32)
    for name in POINTWISE:
        for count in (1, 2, 3):

            def total(*operands: Any, name: str = name) -> Any:
                return getattr(lax, name)(*operands).sum()

            try:
                jax.eval_shape(jax.grad(total), *[x] * count)
            except (AttributeError, TypeError, NotImplementedError, ValueError):
                continue
            found.append((name, count))
            break
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_by_space(mesh222: Mesh, dtype: str) -> None:
    double = dtype == "float64"
    with jax.enable_x64(double):
        names = differentiable()
        assert {"erf", "erfc", "tanh", "atan2", "clamp"} <= {name for name, _ in names}
        x = np.linspace(0.2, 0.7, 2 * 8 * 8).reshape(2, 8, 8, 1)
        w = np.linspace(0.9, 1.1, len(names))
        x, w = (jnp.asarray(a, dtype) for a in (x, w))

        def loss(w: Any, x: Any) -> Any:
            # Each gets a weight of its own, so that none hides behind another.
            made = [
                getattr(lax, name)(*[x * w[n]] * count).astype(x.dtype)
                for n, (name, count) in enumerate(names)
            ]
            return jnp.mean(jnp.concatenate(made, axis=-1) ** 2)

        right = jax.jit(jax.value_and_grad(loss))(w, x)
        plan = jaxlwp.parallelize(loss, w, x, mesh=mesh222, rates=RATES, strategy="spatial")
        assert any(dict(c.splits).get("height") for c in plan.strategy.configs.values())
        found = jax.jit(jax.value_and_grad(plan))(w, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12 if double else 2e-5)
