"""Whole training steps of plain JAX and of ours in turns, and beside each its forecast."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any

import jax

import jaxlwp
from jaxlwp.check import forecast
from jaxlwp.devices import System, make_mesh
from jaxlwp.plan import OPTIMIZER, Plan, lower_step, state_shapes
from tests.benchmarks.gpu import NETWORKS
from tests.benchmarks.on_gpu.data import filled, in_turns, median_ratio, workload
from tests.benchmarks.on_gpu.fit import fitted_gpu
from tests.benchmarks.on_gpu.part import Part

STEPPED = ("ResNet-50", "VGG-16", "U-Net")
SMALL_STEPPED = ("LeNet-5",)
SIDES = ("plain", "ours")
ROUNDS = 15
TIMING_S = 12.0
"""For the steps of one network and dtype; a margin, since one that waits costs those behind it."""


@dataclasses.dataclass(kw_only=True)
class Pair:
    """One network and dtype: its plan and both programs, which are compiled meanwhile.

    They are compiled one after the other, so that the second finds the kernels that XLA has chosen
    for the first: two choices among equally good ones are no difference between programs.
    """

    network: str
    dtype: str
    plan: Plan
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)
    compile_s: dict[str, float] = dataclasses.field(default_factory=dict)

    def compile(self, lowered: dict[str, Any]) -> None:
        """Compile both."""
        for side in SIDES:
            start = time.perf_counter()
            self.programs[side] = lowered[side].compile()
            self.compile_s[side] = round(time.perf_counter() - start, 1)


def run(part: Part) -> None:
    """bfloat16 first; networks of one dtype are compiled side by side."""
    rows: dict[str, dict[str, Any]] = {}
    networks = SMALL_STEPPED if part.small else STEPPED
    pool = ThreadPoolExecutor(2 * len(networks))
    started: list[tuple[Pair, Future[None]]] = []

    def finish(pair: Pair, future: Future[None], end: float) -> None:
        error = wait(future, end)
        row = {"error": error} if error else timed_row(part, pair)
        alone = all(other.done() for _, other in started)
        name = f"{pair.network}, {pair.dtype}"
        rows[name] = {"network": pair.network, "dtype": pair.dtype, "alone": alone} | row
        part.write(list(rows.values()))
        part.say(told(rows[name]))

    for number, dtype in enumerate(("bfloat16", "float32")):
        # Half of the time for each dtype, and of that what timing leaves.
        until_s = 0.0 if number else 0.5 * part.left_s
        group = [start(part, pool, network, dtype) for network in networks]
        started += group
        compiling_s = part.left_s - until_s - TIMING_S * len(networks)
        end = time.monotonic() + max(compiling_s, 5.0)
        # All are waited for before any is timed: compilers try out kernels on the same GPU.
        for _, future in group:
            wait(future, end)
        for each in group:
            finish(*each, end)
    late = [each for each in started if "error" in rows[f"{each[0].network}, {each[0].dtype}"]]
    for pair, future in late:
        if future.done() and part.left_s > 0:
            finish(pair, future, 0.0)


def start(
    part: Part, pool: ThreadPoolExecutor, network: str, dtype: str
) -> tuple[Pair, Future[None]]:
    """Plan and lower a network here, and have it compiled meanwhile."""
    work = workload(network, dtype)
    plan = jaxlwp.parallelize(
        work.loss, work.params, *work.batch, mesh=make_mesh([part.device]), rates=part.system
    )
    lowered = {
        side: lower_step(
            plan, state_shapes(plan), plan.batch_shapes, OPTIMIZER, plain=side == "plain"
        )
        for side in SIDES
    }
    pair = Pair(network=network, dtype=dtype, plan=plan)
    return pair, pool.submit(pair.compile, lowered)


def wait(future: Future[None], end: float) -> str:
    """Why a pair is not compiled by then; "" if it is."""
    try:
        future.result(max(end - time.monotonic(), 0.0))
    except LateError:
        return "not compiled in time"
    except Exception as error:
        return f"not compiled: {error}"[:500]
    return ""


def timed_row(part: Part, pair: Pair) -> dict[str, Any]:
    """Both programs in turns, and their forecasts by the preset and by the ceilings found."""
    end = time.monotonic() + TIMING_S
    try:
        runs = [stepper(part, pair, side) for side in SIDES]
        times = in_turns(
            runs,
            left_s=lambda: min(part.left_s, end - time.monotonic()),
            long_s=0.01 if part.small else 0.15,
            rounds=3 if part.small else ROUNDS,
        )
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:500]}
    by_side = dict(zip(SIDES, times, strict=True))
    measured = {side: statistics.median(by_side[side]) for side in SIDES}
    return {
        "batch": NETWORKS[pair.network].batch,
        "measured_s": measured,
        "ratio": median_ratio(by_side["ours"], by_side["plain"]),
        "images_per_s": {s: NETWORKS[pair.network].batch / measured[s] for s in SIDES},
        "forecasts": {side: forecasts(part, pair, side, measured[side]) for side in SIDES},
        "priced_s": pair.plan.cost.total_s,
        "compile_s": pair.compile_s,
        "times_s": by_side,
    }


def stepper(part: Part, pair: Pair, side: str) -> Callable[[], Any]:
    """A training step from one state to the next."""
    program = pair.programs[side]
    shapes = state_shapes(pair.plan)
    batch, keywords = (filled(tree) for tree in pair.plan.batch_shapes)
    arguments = (filled(shapes, weights=True), batch, keywords)
    state, *rest = jax.device_put(arguments, program.input_shardings[0])
    kept = [state]

    def step() -> Any:
        kept[0], out = program(kept[0], *rest)
        return out

    return step


def forecasts(part: Part, pair: Pair, side: str, measured_s: float) -> dict[str, Any]:
    """What the compiled program was forecast to take, by kind of kernel, and the error."""
    result: dict[str, Any] = {}
    found = (part.read("ceilings") or {}).get("fitted")
    systems: dict[str, System] = {"preset": part.system}
    if found:
        fitted = fitted_gpu(part.system.gpu, found)
        systems["fitted"] = dataclasses.replace(part.system, gpu=fitted)
    for name, system in systems.items():
        try:
            made = forecast(pair.programs[side], system)
        except ValueError as error:
            return {"error": str(error)[:500]}
        result[name] = {"seconds": made.total_s, "error": made.total_s / measured_s - 1}
        result |= {
            "kernels": made.num_kernels,
            "kernel_bytes": made.num_bytes,
            "flops": made.flops,
            "by_kind": {kind: dataclasses.asdict(t) for kind, t in made.kernels.items()},
        }
    return result


def told(row: dict[str, Any]) -> str:
    """A line of the report."""
    name = f"{row['network']:12}{row['dtype']:9}"
    if "error" in row:
        return f"{name} {row['error']}"
    sides = []
    for side in SIDES:
        each = row["forecasts"][side]
        errors = [f"{k} {100 * each[k]['error']:+.0f} %" for k in ("preset", "fitted") if k in each]
        sides.append(
            f"{side} {1e3 * row['measured_s'][side]:.2f} ms (forecast {', '.join(errors)})"
        )
    return f"{name} {'; '.join(sides)}; ratio {row['ratio']:.3f}; compiled in {row['compile_s']}"
