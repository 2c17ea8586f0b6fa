"""How long plans take to trace and to compile: `make bench-compile`.

Programs of two kinds take turns on 8 simulated devices; what is compared is the medians of tracing
and compiling together. A training step's loss and gradients by plain JAX (the batch split by
sharding annotations, parameters replicated) and by a plan with the same strategy; and one step of a
sampler beside 20 of them in `lax.scan`, both by a plan that splits height.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp
from models import DenoisingUNet

RESULTS = Path(__file__).parent / "results" / "compile.json"
RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two programs that are compared.

    Attributes:
      steps: jitted functions with their arguments' shapes, by name; the first is the reference.
      layers: of the plan.
    """

    steps: dict[str, tuple[Any, tuple[Any, ...]]]
    layers: int


def ctc(mesh: Mesh, steps: int = 20, samples: int = 16, features: int = 40) -> Pair:
    """Training of two dense layers with a CTC loss, by plain JAX and by a plan."""

    def loss(params: Any, x: Any, targets: Any) -> Any:
        logits = jnp.tanh(x @ params["hidden"]) @ params["labels"]
        none = jnp.zeros(logits.shape[:2]), jnp.zeros(targets.shape)
        return optax.ctc_loss(logits, none[0], targets, none[1]).mean()

    params = {
        "hidden": jax.ShapeDtypeStruct((features, 64), jnp.float32),
        "labels": jax.ShapeDtypeStruct((64, 30), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((samples, steps, features), jnp.float32)
    batch = (x, jax.ShapeDtypeStruct((samples, 6), jnp.int32))
    plan = jaxlwp.parallelize(loss, params, *batch, mesh=mesh, rates=RATES, strategy="data")
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    plain = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split, split))
    ours = jax.jit(jax.value_and_grad(plan), in_shardings=plan.shardings)
    made = {"plain": (plain, (params, *batch)), "ours": (ours, (params, *batch))}
    return Pair(made, len(plan.graph.layers))


def sampler(mesh: Mesh, steps: int = 20) -> Pair:
    """A denoising U-Net that is evaluated once, and in a loop over timesteps."""
    model = DenoisingUNet(
        channels=(32, 64), attends=(False, True), blocks=1, heads=2, num_classes=5, groups=8
    )
    x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    kind = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, kind)

    def denoise(params: Any, x: Any, t: Any, kind: Any) -> Any:
        return x - 0.05 * model.apply(params, x, t, kind)

    plan = jaxlwp.parallelize(
        denoise, params, x, t, kind, mesh=mesh, rates=RATES, strategy="spatial", train=False
    )

    def sample(params: Any, x: Any, times: Any, kind: Any) -> Any:
        return lax.scan(lambda x, t: (plan(params, x, t, kind), None), x, times)[0]

    times = jax.ShapeDtypeStruct((steps, 1), jnp.float32)
    made = {
        "step": (jax.jit(plan), (params, x, t, kind)),
        "loop": (jax.jit(sample), (params, x, times, kind)),
    }
    return Pair(made, len(plan.graph.layers))


PROGRAMS: dict[str, tuple[Callable[[Mesh], Pair], float]] = {
    "CTC loss, 20 steps": (ctc, 3.0),
    "sampler, 20 steps": (sampler, 1.5),
}
"""By name: what is compared, and the most that the second may take, in times of the first."""


def seconds(step: Any, arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Of tracing and of compiling, with nothing kept from before."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def row(name: str, runs: int) -> dict[str, Any]:
    """Medians of runs that take turns."""
    make, limit = PROGRAMS[name]
    pair = make(jaxlwp.make_mesh(jax.devices()[:8]))
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in pair.steps}
    for _ in range(runs):
        for who, (step, arguments) in pair.steps.items():
            times[who].append(seconds(step, arguments))
    medians = {}
    for who, pairs in times.items():
        trace_s, compile_s = (statistics.median(part) for part in zip(*pairs, strict=True))
        total_s = statistics.median(map(sum, pairs))
        medians[who] = {"trace_s": trace_s, "compile_s": compile_s, "total_s": total_s}
    first, second = medians.values()
    return {
        "program": name,
        "layers": pair.layers,
        "runs": runs,
        "limit": limit,
        "medians": medians,
        "ratio": second["total_s"] / first["total_s"],
    }


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
            f"{who} {median['trace_s']:6.2f} + {median['compile_s']:6.2f} s"
            for who, median in r["medians"].items()
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
