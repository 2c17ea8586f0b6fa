"""One process of `test_processes`: `python -m tests.processes_worker PORT RANK`."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def network() -> tuple[Any, tuple[Any, ...]]:
    """Parameters and batch of a small network; the same in every process."""
    generator = np.random.default_rng(7)

    def random(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32) * 0.1

    return (random(3, 3, 3, 16), random(8 * 8 * 16, 10)), (random(8, 8, 8, 3), random(8, 10))


def loss(params: Any, x: Any, y: Any) -> Any:
    """Mean squared error."""
    kernel, dense = params
    x = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean((jax.nn.relu(x).reshape(x.shape[0], -1) @ dense - y) ** 2)


def main() -> None:
    """Plan, with everything measured, and one step; prints what came of it as JSON."""
    port, rank = map(int, sys.argv[1:])
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    import jaxlwp
    from jaxlwp.devices import _calibrate

    _calibrate.LINK_BYTES = (1 << 10, 1 << 20)  # every kind of measurement, but quickly
    _calibrate.FIRST_TOUCH_BYTES = 1 << 20, 1 << 20
    params, batch = network()
    plan = jaxlwp.parallelize(loss, params, *batch, check="measure")
    assert plan.mesh.size == 4
    placed, data = plan.place(params), plan.place_batch(*batch)

    @jax.jit
    def step(params: Any, *data: Any) -> Any:
        value, grads = jax.value_and_grad(plan)(params, *data)
        return value, jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))

    value, norm = step(placed, *data)
    print(
        json.dumps(
            {
                "strategy": plan.strategy.to_json(),
                "cost_s": plan.cost.total_s,
                "checked": plan.checked,
                "num_measured": plan.space.num_measured,
                "rates": plan.space.devices.to_json(),
                "loss": float(value),
                "norm": float(norm),
            }
        )
    )


if __name__ == "__main__":
    main()
