"""Predicted memory against what XLA compiles for 16 H200s: `make bench-memory`.

For each network and strategy: the bytes per device that `plan_memory` predicts for a training step
(SGD with momentum, state donated), and those that the compiled step reserves by
`memory_analysis()`: arguments + outputs - aliased outputs + temporaries. cuDNN's workspaces are in
neither. Prints a table and writes results/memory.json. With --others, networks that no rule of
`_buffers` was checked against while it was written.

With --limits: AlexNet, VGG-16 and a 3-D U-Net under five memory limits each, from what the fastest
plan needs down. Every plan must fit as compiled, not only as predicted; where nothing fits, the
search must say so. Writes results/memory-limits.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxlwp
from jaxlwp.check._target import compile_for, target_mesh
from jaxlwp.cli._workload import load_workload
from jaxlwp.plan._planning import MEMORY_MARGIN

NETWORKS = {
    "AlexNet": "models.alexnet:AlexNet",
    "VGG-16": "models.vgg:VGG16",
    "ResNet-50": "models.resnet:ResNet50",
}
OTHERS = {
    "ResNet-18": "models.resnet:ResNet18",
    "MobileNetV2": "models.mobilenet:MobileNetV2",
    "SqueezeNet": "models.squeezenet:SqueezeNet",
    "Inception-v3": "models.inception:InceptionV3",
    "AlexNet, bf16": "tests.benchmarks.memory:alexnet_bf16",
    "ResNet-50, bf16": "tests.benchmarks.memory:resnet50_bf16",
}
STRATEGIES = ("search", *jaxlwp.BASELINES)
TARGET = "h200:16"
RATES = jaxlwp.Rates(
    flops_per_s=5e14, memory_bytes_per_s=4e12, latency_s=(1e-5,), link_bytes_per_s=(2e11,)
)
"""About those of an H200 and its NVLink; they decide which strategy "search" is, no memory."""

SLOW_LINKS = jaxlwp.Rates(
    flops_per_s=5e14, memory_bytes_per_s=4e12, latency_s=(1e-4,), link_bytes_per_s=(5e9,)
)
"""Those of hosts of one GPU each, linked by Ethernet."""

LIMITED = {
    "AlexNet": ("models.alexnet:AlexNet", 256, RATES, (1.0, 0.9, 0.8, 0.7, 0.6)),
    "VGG-16": ("models.vgg:VGG16", 32, RATES, (1.0, 0.9, 0.8, 0.7, 0.65)),
    "3-D U-Net": ("tests.benchmarks.search:volumes", 4, SLOW_LINKS, (1.0, 0.8, 0.6, 0.5, 0.4)),
}
"""Networks searched under limits: their batches, the devices' rates, and the limits as shares of
what the fastest plan needs with the margin that `parallelize` keeps.

Over fast links a volume is split sixteen ways in any case, and there is nothing to save.
"""

RESULTS = Path(__file__).parent / "results"


def __getattr__(name: str) -> Any:
    """The networks that compute in bfloat16, as `load_workload` asks for them."""
    from models.alexnet import AlexNet
    from models.resnet import ResNet50

    networks = {"alexnet_bf16": AlexNet, "resnet50_bf16": ResNet50}
    if name not in networks:
        raise AttributeError(name)
    return networks[name](dtype=jnp.bfloat16)


def rows(networks: dict[str, str], batch: int, strategies: Sequence[str]) -> list[dict[str, Any]]:
    """A row per network and strategy, printed as it is made."""
    mesh = target_mesh(TARGET)
    result = []
    print(f"{'network':18}{'strategy':10}{'predicted':>12}{'compiled':>12}{'error':>9}{'s':>7}")
    for network, name in networks.items():
        work = load_workload(name, batch=batch, abstract=True)
        found = jaxlwp.parallelize(work.loss, work.params, *work.batch, mesh=mesh, rates=RATES)
        for strategy in strategies:
            chosen = found.space.baseline(strategy) if strategy != "search" else found.strategy
            arguments = (work.params, *work.batch)
            plan = jaxlwp.bind(found.space, chosen, mesh, arguments, found.out_tree)
            start = time.perf_counter()
            step = compile_for(plan, TARGET)
            predicted, compiled = step.predicted_memory, step.memory
            result.append(
                {
                    "model": network,
                    "batch": batch,
                    "strategy": strategy,
                    "predicted_bytes": predicted.peak_bytes,
                    "compiled_bytes": compiled.reserved_bytes,
                    "error": step.memory_error,
                    "compiled_peak_bytes": compiled.peak_bytes,
                    "parameter_bytes": predicted.parameter_bytes,
                    "optimizer_bytes": predicted.optimizer_bytes,
                    "batch_bytes": predicted.batch_bytes,
                    "kept_bytes": predicted.kept_bytes,
                    "temporary_bytes": predicted.temporary_bytes,
                    "compiled_argument_bytes": compiled.argument_bytes,
                    "compiled_temporary_bytes": compiled.temporary_bytes,
                    "predicted_collective_bytes": step.predicted_bytes_by_kind,
                    "compiled_collective_bytes": step.compiled_bytes_by_kind,
                }
            )
            print(
                f"{network:18}{strategy:10}{predicted.peak_bytes / 1e6:9.0f} MB"
                f"{compiled.reserved_bytes / 1e6:9.0f} MB{step.memory_error:+9.1%}"
                f"{time.perf_counter() - start:7.1f}",
                flush=True,
            )
    return result


def limited_rows(networks: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A row per network and limit, printed as it is made."""
    mesh = target_mesh(TARGET)
    result = []
    print(f"{'network':12}{'limit':>12}{'predicted':>12}{'compiled':>12}{'step ms':>9}{'s':>7}")
    for network, (name, batch, rates, shares) in networks.items():
        work = load_workload(name, batch=batch, abstract=True)
        arguments = (work.params, *work.batch)
        plan = functools.partial(jaxlwp.parallelize, work.loss, *arguments, mesh=mesh, rates=rates)
        most = 1.001 * MEMORY_MARGIN * plan().memory.peak_bytes
        for share in shares:
            limit, start = share * most, time.perf_counter()
            row = {"model": network, "batch": batch, "share": share, "limit_bytes": limit}
            try:
                found = plan(memory_bytes=limit)
            except jaxlwp.MemoryLimitError as error:
                result.append(row | {"fits": None, "least_bytes": error.least_bytes})
                print(f"{network:12}{limit / 1e6:9.0f} MB  refused: {error}", flush=True)
                continue
            planned = time.perf_counter()
            compiled = compile_for(found, TARGET).memory
            assert found.result is not None
            result.append(
                row
                | {
                    "predicted_bytes": found.memory.peak_bytes,
                    "compiled_bytes": compiled.reserved_bytes,
                    "fits": compiled.reserved_bytes <= limit,
                    "predicted_s": found.cost.total_s,
                    "gap": found.result.gap,
                    "plan_s": planned - start,
                }
            )
            print(
                f"{network:12}{limit / 1e6:9.0f} MB{found.memory.peak_bytes / 1e6:9.0f} MB"
                f"{compiled.reserved_bytes / 1e6:9.0f} MB{found.cost.total_s * 1e3:9.2f}"
                f"{planned - start:7.1f}{'' if result[-1]['fits'] else '  DOES NOT FIT'}",
                flush=True,
            )
    return result


def limits(networks: dict[str, tuple[Any, ...]]) -> None:
    """Plans under memory limits, compiled; writes the table."""
    made = limited_rows(networks)
    content = provenance() | {
        "summary": {
            "rows": len(made),
            "plans": sum(row["fits"] is not None for row in made),
            "fit": sum(row["fits"] is True for row in made),
        },
        "rows": made,
    }
    path = RESULTS / "memory-limits.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    summary = content["summary"]
    print(f"{summary['fit']} of {summary['plans']} plans fit as compiled; wrote {path}")


def provenance() -> dict[str, Any]:
    """When, where and with what."""
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "target": TARGET,
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "versions": {"jaxlwp": jaxlwp.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "compiled": "memory_analysis(): arguments + outputs - aliased + temporaries",
    }


def main() -> None:
    """Compile, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--others", action="store_true", help="networks that nothing was fitted to")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", action="append", help="networks of the table")
    parser.add_argument("--limits", action="store_true", help="plans under memory limits")
    options = parser.parse_args()
    if options.limits:
        limits({n: w for n, w in LIMITED.items() if not options.only or n in options.only})
        return
    networks = OTHERS if options.others else NETWORKS
    if options.only:
        networks = {name: networks[name] for name in options.only}
    made = rows(networks, options.batch, STRATEGIES)
    errors = {(row["model"], row["strategy"]): abs(row["error"]) for row in made}
    baselines = [error for (_, strategy), error in errors.items() if strategy != "search"]
    content = provenance() | {
        "summary": {
            "memory_abs_error_max": max(errors.values()),
            "memory_abs_error_max_baselines": max(baselines),
            "within_10_percent": sum(error <= 0.1 for error in errors.values()),
            "rows": len(errors),
        },
        "rows": made,
    }
    path = RESULTS / ("memory-others.json" if options.others else "memory.json")
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"largest error {max(errors.values()):.1%}, of the baselines {max(baselines):.1%}")
    print(f"wrote {path}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
