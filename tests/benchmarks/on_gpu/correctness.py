"""Loss and gradients of plans of small networks against the plain function, on the GPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jaxlwp
from jaxlwp.devices import make_mesh
from tests.benchmarks.on_gpu.data import SMALL, filled, workload
from tests.benchmarks.on_gpu.part import Part

TOLERANCE = 1e-4
"""Of an array's largest element, for whole networks in float32, as in tests/contracts."""


def run(part: Part) -> None:
    """Networks in float32 first, with sums of gradients in their dtype and in float32."""
    rows: list[dict[str, Any]] = []
    with jax.default_matmul_precision("highest"):
        for dtype in ("float32", "bfloat16"):
            for network in list(SMALL)[: 1 if part.small else None]:
                if part.left_s < 0:
                    return
                for row in network_rows(part, network, dtype):
                    rows.append(row)
                    part.say(" ".join(f"{k} {v}" for k, v in row.items()))
                part.write(rows)


def network_rows(part: Part, network: str, dtype: str) -> list[dict[str, Any]]:
    """One row for each dtype of sums. One GPU has one strategy."""
    work = workload(network, dtype)
    params, batch = filled(work.params, weights=True), filled(work.batch)
    plain = gradients(work.loss, params, batch)
    exact, elsewhere = plain, on_processor(work.loss, params, batch)
    if dtype != "float32":
        exact = gradients(workload(network, "float32").loss, params, batch)
    rows = []
    for sum_dtype in (None, "float32"):
        plan = jaxlwp.parallelize(
            work.loss, work.params, *work.batch,
            mesh=make_mesh([part.device]), rates=part.system, sum_dtype=sum_dtype,
        )  # fmt: skip
        ours = gradients(plan, plan.place(params), plan.place_batch(*batch))
        row = {
            "network": network,
            "dtype": dtype,
            "sum_dtype": sum_dtype,
            "from_plain": distance(ours, plain),
            "plain_from_processor": elsewhere and distance(plain, elsewhere),
        }
        if dtype == "float32":
            row["passed"] = row["from_plain"] <= TOLERANCE
        else:
            row["from_float32"] = distance(ours, exact)
            row["plain_from_float32"] = distance(plain, exact)
            # Roundings differ, but ours may lose no more by them than the plain function does.
            row["passed"] = row["from_float32"] <= 2 * row["plain_from_float32"]
        rows.append(row)
    return rows


def gradients(function: Any, params: Any, batch: Any) -> list[np.ndarray]:
    """Loss and gradients, compiled."""

    def loss(params: Any, *batch: Any) -> Any:
        out = function(params, *batch)
        return out[0] if isinstance(out, tuple) else out

    out = jax.jit(jax.value_and_grad(loss))(params, *batch)
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(out)]


def on_processor(function: Any, params: Any, batch: Any) -> list[np.ndarray] | None:
    """The same on the processor, if JAX has it: how far apart two machines are anyway."""
    try:
        processor = jax.devices("cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(processor):
        return gradients(function, *jax.device_put((params, batch), processor))


def distance(ours: list[np.ndarray], plain: list[np.ndarray]) -> float:
    """The largest difference, of the largest element of its array."""
    off = [
        float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-6))
        for a, b in zip(ours, plain, strict=True)
    ]
    # A comparison with a number that is none would be lost by `max`.
    return float(np.max(off))
