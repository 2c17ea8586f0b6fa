"""Forecasts beside published measurements of training on GPUs: `make bench-truth`.

Plain JAX's data-parallel step (SGD with momentum, state donated) is compiled for GPUs that are not
there and forecast from the scheduled program, for one GPU and for each number that was measured.
Two programs on several GPUs:

- "own": each GPU trains on its own examples in a `jax.shard_map`, and gradients are averaged. That
  is what MxNet with Horovod and TensorFlow ran: batch normalisation by each GPU's examples.
- "partitioned": the batch is split by sample and all else left to XLA's partitioner, so statistics
  are those of the whole batch, and every one is an exchange that kernels wait for.

Two forecasts of "own": by XLA's schedule, and with gradient sums beside the backward pass as the
frameworks that were measured have them (`hidden.py`). Growth is held against the second: the
schedule is XLA's and says nothing about theirs.

A100 is known to JAX's plugin for CUDA 13, P100 and V100 to the one for CUDA 12, so this runs once
in an environment with each; rows of other GPUs are passed over, and kept as they are in
results/truth.json. Compiled programs are kept (`--programs`). `--summary` prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check import forecast, target_mesh
from jaxlwp.check._target import GPUS
from jaxlwp.cli._workload import Workload, load_workload
from jaxlwp.devices import System, preset
from jaxlwp.plan import OPTIMIZER, lower_step, state_shapes
from tests.benchmarks.gpu import NETWORKS, Programs
from tests.benchmarks.hidden import hidden

RESULTS = Path(__file__).parent / "results" / "truth.json"
MXNET = "NVIDIA DeepLearningExamples, MxNet/Classification/RN50v1.5/README.md"
TENSORFLOW = "TensorFlow, performance/benchmarks.md of 2017, synthetic data"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Images per second of whole training steps, as published.

    Attributes:
      network: as in `tests.benchmarks.gpu`.
      system: preset of the machine.
      dtype: of the computation; parameters are float32. Mixed precision is float16 on V100 and
        A100, as the source's `--dtype float16`. float32 on A100 runs as TF32, as there.
      batch: examples of each GPU, as the source has it.
      images_per_s: number of GPUs -> images per second of all of them.
      source: where it is published.
      growth_bar: by how much the growth from one GPU may be off.
      rate_bar: by how much one GPU's rate may be off, None where that is no bar.
    """

    network: str
    system: str
    dtype: str
    batch: int
    images_per_s: Mapping[int, float]
    source: str
    growth_bar: float = 0.05
    rate_bar: float | None = 0.25

    @property
    def key(self) -> str:
        return f"{self.network}, {self.dtype}, {self.system}, batch {self.batch} a GPU"

    @property
    def gpu(self) -> str:
        return preset(self.system).gpu.name.partition("-")[0]


def _resnet(system: str, dtype: str, batch: int, rates: dict[int, float], **more: Any) -> Measured:
    return Measured("ResNet-50", system, dtype, batch, rates, MXNET, **more)


MEASURED = (
    _resnet("dgx-1-v100", "float32", 96, {1: 384, 2: 763, 4: 1513, 8: 3005}),
    _resnet("dgx-1-v100", "float16", 192, {1: 1376, 2: 2768, 4: 5357, 8: 10723}),
    _resnet("dgx-2", "float32", 128, {1: 417, 2: 821, 4: 1623, 8: 3223, 16: 6338}),
    _resnet("dgx-2", "float16", 256, {1: 1492, 2: 2935, 4: 5726, 8: 11368, 16: 21484}),
    _resnet("dgx-a100", "float32", 256, {1: 1056, 4: 4182, 8: 8247}, rate_bar=None),
    _resnet("dgx-a100", "float16", 256, {1: 3411, 4: 13443, 8: 26674}),
    Measured(
        "VGG-16",
        "dgx-1-p100",
        "float32",
        32,
        {1: 124, 2: 241, 4: 470, 8: 738},
        TENSORFLOW,
        growth_bar=0.12,
    ),
    # Programs of 2017 fused nothing: the rate is no bar.
    Measured(
        "Inception-v3",
        "dgx-1-p100",
        "float32",
        32,
        {1: 128, 2: 259, 4: 520, 8: 995},
        TENSORFLOW,
        rate_bar=None,
    ),
)

NCCL_1 = {2: 18e9, 4: 18e9, 8: 6e9}
"""Bytes per second that each P100 of a DGX-1 sends with NCCL 1, by number of GPUs.

NCCL 1.3 (in TensorFlow until 2018) lays one ring in the order of the device numbers, in one
direction, and neighbours without peer access send through memory of the host (`commBuildMaps` in
its src/core.cu). Of 0-1-...-7 the pairs 3-4 and 7-0 have no NVLink and are on two processors, so
the ring goes at QPI's rate. Sources of rates: NVIDIA/nccl, src/graph/topo.h, SM60_NVLINK_BW,
QPI_BW; of links: jaxlwp/devices/systems/dgx-1-p100.toml.
"""


def __getattr__(name: str) -> Any:
    """The networks by name and dtype, as `load_workload` asks for them."""
    network, _, dtype = name.rpartition("_")
    if network not in NETWORKS or dtype not in ("float16", "float32"):
        raise AttributeError(name)
    module, _, attribute = NETWORKS[network].cls.partition(":")
    cls = getattr(__import__(module, fromlist=[attribute]), attribute)
    return cls(dtype=jnp.dtype(dtype))


# --- programs --------------------------------------------------------------------------------


def program(row: Measured, count: int, how: str, programs: Programs) -> str:
    """Text of a step on so many GPUs, "own" or "partitioned"."""
    target = f"{row.gpu}:{count}"
    name = f"tests.benchmarks.truth:{row.network}_{row.dtype}"
    work = load_workload(name, batch=row.batch * count, abstract=True)
    mesh = target_mesh(target)
    lowered = lower_own(work, mesh) if how == "own" else lower_partitioned(work, mesh, row)
    return programs.compiled(lowered, target)[0]


def lower_partitioned(work: Workload, mesh: Mesh, row: Measured) -> Any:
    """The batch split by sample, all else left to XLA's partitioner."""
    plan = jaxlwp.parallelize(
        work.loss,
        work.params,
        *work.batch,
        mesh=mesh,
        rates=preset(row.system, gpus=mesh.size),
        strategy="data",
    )
    return lower_step(plan, state_shapes(plan), plan.batch_shapes, OPTIMIZER, plain=True)


def lower_own(work: Workload, mesh: Mesh) -> Any:
    """Each GPU trains on its own examples, gradients are averaged."""
    every, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = (split, split, *(every for _ in work.batch[2:]))

    def loss(params: Any, *batch: Any) -> jax.Array:
        return jax.lax.pmean(work.loss(params, *batch), mesh.axis_names)

    gradients = jax.shard_map(
        jax.value_and_grad(loss), mesh=mesh, in_specs=(every, *specs), out_specs=every
    )

    def step(state: Any, *batch: Any) -> Any:
        params, slots = state
        value, found = gradients(params, *batch)
        updates, slots = OPTIMIZER.update(found, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    shardings = [NamedSharding(mesh, spec) for spec in (every, *specs)]
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=tuple(shardings),
        out_shardings=(shardings[0], shardings[0]),
    )
    state = work.params, jax.eval_shape(OPTIMIZER.init, work.params)
    return jitted.lower(state, *work.batch)


# --- figures ---------------------------------------------------------------------------------


def figures(text: str, system: System, how: str) -> dict[str, Any]:
    """What a step's program does on a system; `hidden_s` where all its collectives are sums."""
    found = forecast(text, system)
    flops: dict[str, float] = {}
    for event in found.events:
        if event.flops:
            flops[event.dtype] = flops.get(event.dtype, 0.0) + event.flops
    result = {
        "schedule_s": found.total_s,
        "kernels_s": found.compute_s,
        "collectives_s": found.communication_s,
        "exposed_s": found.exposed_s,
        "kernels": found.num_kernels,
        "kernel_bytes": found.num_bytes,
        "tflop": {dtype: round(number / 1e12, 3) for dtype, number in flops.items()},
        "collectives": {kind: total.count for kind, total in found.collectives.items()},
        "collective_bytes": {kind: total.num_bytes for kind, total in found.collectives.items()},
    }
    if how == "own":
        result["hidden_s"] = hidden(text, found).total_s
    return result


def compared(
    images_per_s: Mapping[int, float], batch: int, seconds: Mapping[int, float]
) -> dict[int, dict[str, float]]:
    """A forecast beside what was measured, by number of GPUs.

    Args:
      images_per_s: measured, of all GPUs.
      batch: examples of each GPU.
      seconds: a step, as forecast; of one GPU and of some of the others.

    Returns:
      Of each number of GPUs: images per second as forecast, the growth from one GPU as measured
      and as forecast, and the relative errors of both.
    """
    result = {}
    for count, step_s in sorted(seconds.items()):
        rate = batch * count / step_s
        growth = images_per_s[count] / images_per_s[1]
        grown = count * seconds[1] / step_s
        result[count] = {
            "images_per_s": rate,
            "error": rate / images_per_s[count] - 1,
            "growth_measured": growth,
            "growth": grown,
            "growth_error": grown / growth - 1,
        }
    return result


def with_links(system: System, rates: Mapping[int, float]) -> System:
    """A system whose links inside a host have other rates."""
    inside = dataclasses.replace(system.inside, bytes_per_s=dict(rates))
    return dataclasses.replace(system, inside=inside)


def run(row: Measured, programs: Programs, hows: list[str], content: dict[str, Any]) -> None:
    """Figures of a row's programs, into the results."""
    rows = content.setdefault("rows", {})
    entry = rows.setdefault(row.key, {"source": row.source, "programs": {}})
    entry["measured"] = {str(n): rate for n, rate in row.images_per_s.items()}
    for count in sorted(row.images_per_s):
        # On one GPU the two are one.
        for how in ["one"] if count == 1 else hows:
            text = program(row, count, "partitioned" if how == "one" else how, programs)
            system = preset(row.system, gpus=count)
            found = figures(text, system, how)
            if row.network == "VGG-16" and how == "own":
                old = figures(text, with_links(system, NCCL_1), how)
                found["nccl 1"] = {name: old[name] for name in ("schedule_s", "hidden_s")}
            entry["programs"].setdefault(str(count), {})[how] = found
            print(f"{row.key}: {count} {how} {1e3 * found['schedule_s']:.1f} ms", flush=True)
    entry["forecast"] = forecasts(row, entry["programs"])


def forecasts(row: Measured, programs: Mapping[str, Any]) -> dict[str, Any]:
    """All forecasts of a row beside what was measured, by name of the forecast."""
    names = {
        "own, sums hidden": lambda p: p["own"]["hidden_s"],
        "own, schedule": lambda p: p["own"]["schedule_s"],
        "partitioned, schedule": lambda p: p["partitioned"]["schedule_s"],
        "NCCL 1, sums hidden": lambda p: p["own"]["nccl 1"]["hidden_s"],
        "NCCL 1, schedule": lambda p: p["own"]["nccl 1"]["schedule_s"],
    }
    result = {}
    for name, read in names.items():
        seconds = {1: programs["1"]["one"]["schedule_s"]}
        for count, found in programs.items():
            try:
                seconds[int(count)] = read(found)
            except KeyError:  # one GPU, or not compiled
                continue
        if len(seconds) > 1:
            result[name] = compared(row.images_per_s, row.batch, seconds)
    return result


# --- what is shown ---------------------------------------------------------------------------


def summary(rows: Mapping[str, Any]) -> str:
    """The table: measured beside forecast, a row for each number of GPUs."""
    lines = [
        "| | GPUs | images/s published | forecast | growth published | sums hidden "
        "| XLA's schedule | statistics of the whole batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in MEASURED:
        found = rows.get(row.key, {}).get("forecast", {})
        for count in row.images_per_s:
            best = found.get("own, sums hidden", {}).get(str(count))
            if best is None:
                continue
            cells = [row.key if count == 1 else "", str(count), f"{row.images_per_s[count]:g}"]
            cells += [f"{best['images_per_s']:.0f} ({100 * best['error']:+.0f} %)"]
            cells += ["" if count == 1 else f"{best['growth_measured']:.2f}"]
            for name in ("own, sums hidden", "own, schedule", "partitioned, schedule"):
                other = found.get(name, {}).get(str(count))
                shown = count > 1 and other is not None
                cells += [_growth(other) if shown else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _growth(found: Mapping[str, float]) -> str:
    return f"{found['growth']:.2f} ({100 * found['growth_error']:+.1f} %)"


def missed(rows: Mapping[str, Any]) -> list[str]:
    """The bars that are not reached, a line each, and what is not compiled."""
    lines = []
    for row in MEASURED:
        found = rows.get(row.key, {}).get("forecast", {}).get("own, sums hidden", {})
        for count in map(str, row.images_per_s):
            if count not in found:
                lines.append(f"{row.key}: {count} not compiled")
                continue
            error, grown = found[count]["error"], found[count]["growth_error"]
            if count == "1" and row.rate_bar and abs(error) > row.rate_bar:
                lines.append(f"{row.key}: rate of one GPU {100 * error:+.0f} %")
            if abs(grown) > row.growth_bar:
                lines.append(f"{row.key}: growth to {count} {100 * grown:+.1f} %")
    return lines


def main(arguments: list[str]) -> int:
    """Run the benchmark for the GPUs whose compiler is installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, default=Path("build/gpu-programs"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--systems", nargs="*", default=sorted({row.system for row in MEASURED}))
    parser.add_argument("--hows", nargs="*", default=["own", "partitioned"])
    parser.add_argument("--summary", action="store_true", help="print what is in the file, only")
    given = parser.parse_args(arguments)
    content = json.loads(given.json.read_text()) if given.json.exists() else {}
    for row in () if given.summary else MEASURED:
        plugin = f"jax_plugins.xla_cuda{GPUS[row.gpu][1]}"
        if row.system not in given.systems or importlib.util.find_spec(plugin) is None:
            continue
        run(row, Programs(given.programs), given.hows, content)
        names = ("jax", "jaxlib", "flax")
        content |= {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in names},
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(given.json.read_text())
    print(summary(content["rows"]))
    print("\n".join(["bars not reached:", *missed(content["rows"])]))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
