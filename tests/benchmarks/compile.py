"""How long plans take to trace and to compile, beside plain JAX: `make bench-compile`.

A training step's loss and gradients on 8 simulated devices, once by plain JAX (the batch split by
sharding annotations, parameters replicated) and once by a plan with the same strategy. Runs of the
two take turns; what is compared is the medians of tracing and compiling together.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp

RESULTS = Path(__file__).parent / "results" / "compile.json"
RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)

Program = tuple[Callable[..., Any], Any, tuple[Any, ...]]
"""A loss, the shapes of its parameters, and those of its batch."""


def ctc(steps: int = 20, samples: int = 16, features: int = 40, labels: int = 30) -> Program:
    """Two dense layers and a CTC loss."""

    def loss(params: Any, x: Any, targets: Any) -> Any:
        logits = jnp.tanh(x @ params["hidden"]) @ params["labels"]
        none = jnp.zeros(logits.shape[:2]), jnp.zeros(targets.shape)
        return optax.ctc_loss(logits, none[0], targets, none[1]).mean()

    params = {
        "hidden": jax.ShapeDtypeStruct((features, 64), jnp.float32),
        "labels": jax.ShapeDtypeStruct((64, labels), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((samples, steps, features), jnp.float32)
    return loss, params, (x, jax.ShapeDtypeStruct((samples, 6), jnp.int32))


PROGRAMS: dict[str, tuple[Callable[[], Program], float]] = {"CTC loss, 20 steps": (ctc, 3.0)}
"""By name: the program, and the most that ours may take, in times of plain JAX."""


def seconds(step: Any, arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Of tracing and of compiling, with nothing kept from before."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def steps_of(program: Program, mesh: Mesh) -> tuple[dict[str, Any], int]:
    """Jitted loss and gradients by plain JAX and by a plan; how many layers the plan has."""
    loss, params, batch = program
    plan = jaxlwp.parallelize(loss, params, *batch, mesh=mesh, rates=RATES, strategy="data")
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    plain = (whole, *(split for _ in batch))
    steps = {
        "plain": jax.jit(jax.value_and_grad(loss), in_shardings=plain),
        "ours": jax.jit(jax.value_and_grad(plan), in_shardings=plan.shardings),
    }
    return steps, len(plan.graph.layers)


def row(name: str, runs: int) -> dict[str, Any]:
    """Medians of runs that take turns."""
    make, limit = PROGRAMS[name]
    program = make()
    steps, layers = steps_of(program, jaxlwp.make_mesh(jax.devices()[:8]))
    arguments = (program[1], *program[2])
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in range(runs):
        for who, step in steps.items():
            times[who].append(seconds(step, arguments))
    found: dict[str, Any] = {"program": name, "layers": layers, "runs": runs, "limit": limit}
    for who, pairs in times.items():
        trace_s, compile_s = (statistics.median(part) for part in zip(*pairs, strict=True))
        total_s = statistics.median(map(sum, pairs))
        found[who] = {"trace_s": trace_s, "compile_s": compile_s, "total_s": total_s}
    found["ratio"] = found["ours"]["total_s"] / found["plain"]["total_s"]
    return found


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", action="append", choices=list(PROGRAMS))
    options = parser.parse_args()
    rows = []
    for name in options.only or PROGRAMS:
        rows.append(row(name, options.runs))
        r = rows[-1]
        both = "   ".join(
            f"{who} {r[who]['trace_s']:6.2f} + {r[who]['compile_s']:6.2f} s"
            for who in ("plain", "ours")
        )
        kept = "within" if r["ratio"] <= r["limit"] else "ABOVE"
        print(
            f"{name:20} {r['layers']:4} layers   {both}   ratio {r['ratio']:.2f}, "
            f"{kept} the limit of {r['limit']:g}",
            flush=True,
        )
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
