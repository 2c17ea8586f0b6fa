"""Tracing and compiling a deep network: plain JAX, a hand-written `shard_map`, and plans.

    python -m tests.benchmarks.depth [--cells 36] [--rounds 3] [--json FILE]

The network is one of cells in the manner of NASNet: separable convolutions, pools, normalisation
and sums of branches, some 800 layers. All programs are steps (loss and gradients) over the same
devices; they take turns, and medians of processor seconds are shown, since other processes on the
machine take wall time. Counts of reductions and divisions are those of the program for XLA.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import jaxlwp  # noqa: E402
from jaxlwp.space._config import DIMENSIONS  # noqa: E402

RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
BATCH, SIZE, WIDTH = 8, 16, 8


class Separable(nn.Module):
    kernel: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.kernel, self.kernel)
        for _ in range(2):
            x = nn.relu(x)
            x = nn.Conv(WIDTH, size, feature_group_count=WIDTH, use_bias=False)(x)
            x = nn.Conv(WIDTH, (1, 1), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
        return x


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        a = nn.BatchNorm(use_running_average=False)(nn.Conv(WIDTH, (1, 1))(nn.relu(x)))
        b = nn.BatchNorm(use_running_average=False)(nn.Conv(WIDTH, (1, 1))(nn.relu(before)))
        pooled = nn.avg_pool(a, (3, 3), padding="SAME")
        parts = [
            Separable(3)(a) + a,
            Separable(3)(b) + Separable(5)(a),
            pooled + b,
            nn.max_pool(b, (3, 3), padding="SAME") + pooled,
        ]
        return nn.Conv(WIDTH, (1, 1), use_bias=False)(jnp.concatenate(parts, -1))


class Network(nn.Module):
    cells: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = before = nn.Conv(WIDTH, (3, 3))(x)
        for _ in range(self.cells):
            x, before = Cell()(x, before), x
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def programs(cells: int) -> tuple[dict[str, Callable[[], Any]], tuple[Any, ...], Any]:
    """What is traced: a function of no arguments that lowers the step, by name."""
    model = Network(cells)
    x = jnp.zeros((BATCH, SIZE, SIZE, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    y = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    params, stats = shapes["params"], shapes["batch_stats"]
    arguments = (params, stats, jax.ShapeDtypeStruct(x.shape, x.dtype), y)

    def loss(params: Any, stats: Any, x: Any, y: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(variables, x, mutable=["batch_stats"])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("device",)))

    def lowered(loss: Any, *shardings: Any) -> Any:
        return jax.jit(jax.value_and_grad(loss), in_shardings=shardings).lower(*arguments)

    def by_hand(params: Any, stats: Any, x: Any, y: Any) -> Any:
        none = PartitionSpec()
        return jax.shard_map(loss, mesh=mesh, in_specs=(none, none, none, none), out_specs=none)(
            params, stats, x, y
        )

    plans: dict[str, Any] = {}

    def planned(strategy: str) -> Any:
        pins = jaxlwp.Constraints(forbid=DIMENSIONS) if strategy == "nothing" else None
        plan = plans[strategy] = jaxlwp.parallelize(
            loss,
            *arguments,
            mesh=mesh,
            rates=RATES,
            measure=False,
            strategy="search" if strategy == "nothing" else strategy,
            constraints=pins,
        )
        return plan

    def ours(strategy: str) -> Any:
        plan = plans[strategy]
        # Traced anew each time, as in the first call of a process.
        plan = jaxlwp.Plan(**{f: getattr(plan, f) for f in plan.__dataclass_fields__})
        return lowered(plan, *plan.shardings)

    for strategy in ("data", "nothing"):
        planned(strategy)
    made = {
        "plain, split by sample": lambda: lowered(loss, whole, whole, split, split),
        "plain, nothing split": lambda: lowered(loss, whole, whole, whole, whole),
        "shard_map by hand, nothing split": lambda: lowered(by_hand, whole, whole, whole, whole),
        "plan, data": lambda: ours("data"),
        "plan, nothing split": lambda: ours("nothing"),
    }
    return made, arguments, plans


def counts(text: str) -> dict[str, int]:
    """Operators in the program for XLA."""
    found = collections.Counter(re.findall(r"stablehlo\.(\w+)", text))
    return {name: found[name] for name in ("reduce", "divide", "broadcast_in_dim", "convolution")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the programs, too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    made, _, plans = programs(given.cells)
    layers = len(plans["data"].graph.layers)
    traced_s: dict[str, list[float]] = {name: [] for name in made}
    compiled_s: dict[str, list[float]] = {name: [] for name in made}
    operators = {}
    for _ in range(given.rounds):
        for name, lower in made.items():
            jax.clear_caches()
            start = time.process_time()
            lowered = lower()
            traced_s[name].append(time.process_time() - start)
            operators[name] = counts(lowered.as_text())
            if given.compile:
                start = time.process_time()
                lowered.compile()
                compiled_s[name].append(time.process_time() - start)
    start = time.process_time()
    printed = repr(plans["data"])
    printed_s = time.process_time() - start
    rows = {
        name: {
            "traced_s": round(statistics.median(traced_s[name]), 2),
            "compiled_s": round(statistics.median(compiled_s[name]), 2) if given.compile else None,
            "operators": operators[name],
        }
        for name in made
    }
    print(
        f"{layers} layers; printing the plan, {len(printed.splitlines())} lines: {printed_s:.1f} s"
    )
    for name, row in rows.items():
        times = f"traced {row['traced_s']:6} s  compiled {row['compiled_s']} s"
        print(f"{name:34} {times}  {row['operators']}")
    if given.json:
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "layers": layers,
            "printed_s": round(printed_s, 2),
            "programs": rows,
        }
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
