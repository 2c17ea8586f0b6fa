"""Simulated steps beside forecasts of compiled ones: `python -m tests.benchmarks.simulated`.

For the rows of results/gpu.json, which `make bench-gpu` has compiled: the plain sum, the simulated
step with sums behind the backward pass and beside it, and the seconds in which no kernel runs.
Nothing is compiled. Needs the environment of `make bench-gpu`, for its meshes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

import jax

from jaxlwp.simulate import simulate_step
from tests.benchmarks import gpu


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of one step: forecast, plain sum, simulated; and of each those without a kernel."""

    key: str
    strategy: str
    forecast_s: float
    plain_s: float
    simulated_s: float
    ready_s: float
    forecast_exposed_s: float
    plain_exposed_s: float
    simulated_exposed_s: float

    def __str__(self) -> str:
        """A row of a Markdown table."""
        times = (self.plain_s, self.simulated_s, self.ready_s)
        exposed = (self.forecast_exposed_s, self.plain_exposed_s, self.simulated_exposed_s)
        return (
            " | ".join(
                [
                    f"| {self.key} | {self.strategy} | {1e3 * self.forecast_s:.2f}",
                    *(f"{1e3 * s:.2f} ({100 * (s / self.forecast_s - 1):+.1f} %)" for s in times),
                    *(f"{1e3 * s:.2f}" for s in exposed),
                ]
            )
            + " |"
        )


def rows(networks: Sequence[str], names: Sequence[str]) -> Iterator[Row]:
    """The rows in bfloat16 that are compiled."""
    for key, compiled in json.loads(gpu.RESULTS.read_text())["rows"].items():
        network, dtype, batch, target, *slow = key.split(", ")
        if dtype != "bfloat16" or network not in networks:
            continue
        row = gpu.Row(network, dtype, int(batch.removeprefix("batch ")), target, bool(slow))
        plans = gpu.plans(row, row.workload(), 0)
        for name in (n for n in names if n in plans and n in compiled):
            found, ready = (simulate_step(plans[name], sums=s) for s in ("behind", "ready"))
            yield Row(
                key=key.replace("bfloat16, ", ""),
                strategy=name,
                forecast_s=compiled[name]["forecast_s"],
                plain_s=found.plain_s,
                simulated_s=found.total_s,
                ready_s=ready.total_s,
                forecast_exposed_s=compiled[name]["exposed_s"],
                plain_exposed_s=found.plain_s - found.compute_s,
                simulated_exposed_s=found.exposed_s,
            )


def distance(pairs: Sequence[tuple[float, float]], scale: Sequence[float]) -> str:
    """Median and mean distance of pairs, in parts of the step."""
    apart = [abs(a - b) / s for (a, b), s in zip(pairs, scale, strict=True)]
    return f"{median(apart):.1%}, {fmean(apart):.1%}"


def summary(found: Sequence[Row]) -> str:
    """Distances from the forecast."""
    steps = [row.forecast_s for row in found]

    def mean(name: str, reference: str) -> str:
        pairs: list[tuple[Any, Any]] = [(getattr(r, name), getattr(r, reference)) for r in found]
        return distance(pairs, steps)

    return (
        f"{len(found)} steps, distance from the forecast in parts of the step, median and mean: "
        f"whole "
        f"{mean('plain_s', 'forecast_s')} (plain), {mean('simulated_s', 'forecast_s')} (behind), "
        f"{mean('ready_s', 'forecast_s')} (ready); without a kernel "
        f"{mean('plain_exposed_s', 'forecast_exposed_s')} (plain), "
        f"{mean('simulated_exposed_s', 'forecast_exposed_s')} (behind)"
    )


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(gpu.NETWORKS))
    parser.add_argument("--strategies", nargs="*", default=["found", "data", "owt"])
    given = parser.parse_args(arguments)
    every = []
    for row in rows(given.networks, given.strategies):
        every.append(row)
        print(row, flush=True)
    print(summary(every))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
