"""Plans beside plain JAX on GPUs that are not there, compiled for them: `make bench-gpu`.

For each network, dtype and target: whole training steps (SGD with momentum, state donated) of plain
JAX's data parallelism (the batch split by sample, all else left to XLA's partitioner), of the
strategy found, and of the baselines, compiled, and forecast kernel by kernel from the scheduled
program (`jaxlwp.check.forecast`). Nothing runs, so every figure is the same on every machine.

Programs that XLA refuses to compile are in the rows with what it says, and count for nothing.
Compiled programs are kept (`--programs`), so that a run can be ended and goes on where it was; the
rows are in results/gpu.json. `--random N` adds strategies drawn from the whole space.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gzip
import hashlib
import importlib.metadata
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from scipy.stats import kendalltau

import jaxlwp
from jaxlwp.check import forecast
from jaxlwp.check._target import Target, first_line, target_mesh
from jaxlwp.cli._workload import Workload, load_workload
from jaxlwp.devices import System, preset
from jaxlwp.plan import OPTIMIZER, Plan, lower_step, program_memory, state_shapes, with_strategy
from jaxlwp.space import make_strategy

RESULTS = Path(__file__).parent / "results" / "gpu.json"


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its examples for each GPU."""

    cls: str
    batch: int
    input_shape: tuple[int, ...] | None = None


NETWORKS = {
    "AlexNet": Network("models.alexnet:AlexNet", 128),
    "VGG-16": Network("models.vgg:VGG16", 32),
    "ResNet-50": Network("models.resnet:ResNet50", 32),
    "Inception-v3": Network("models.inception:InceptionV3", 32),
    "ConvNeXt-T": Network("models.convnext:ConvNeXtTiny", 32),
    "U-Net": Network("models.unet:UNet", 4),
    "3-D U-Net": Network("models.unet3d:UNet3D", 1, (128, 128, 128, 3)),
}
TARGETS = ("h200:8", "h200:2x8")
DTYPES = ("bfloat16", "float32")
SMALL = {
    "3-D U-Net": (1,),
    "U-Net": (1,),
    "VGG-16": (8, 32),
    "ResNet-50": (8, 32),
}
"""Examples in all, for two, four and eight GPUs: where splitting samples is not enough."""

SMALL_TARGETS = ("h200:2", "h200:4", "h200:8")
SLOW = 0.25
"""Rate of the adapters between hosts, where links are slow."""


def __getattr__(name: str) -> Any:
    """The networks by name and dtype, as `load_workload` asks for them."""
    network, _, dtype = name.rpartition("_")
    if network not in NETWORKS or dtype not in DTYPES:
        raise AttributeError(name)
    module, _, attribute = NETWORKS[network].cls.partition(":")
    cls = getattr(__import__(module, fromlist=[attribute]), attribute)
    return cls(dtype=jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled together: one network, dtype, batch and target."""

    network: str
    dtype: str
    batch: int
    target: str
    slow: bool = False

    @property
    def key(self) -> str:
        links = ", slow links" if self.slow else ""
        return f"{self.network}, {self.dtype}, batch {self.batch}, {self.target}{links}"

    @functools.cached_property
    def system(self) -> System:
        target = Target.parse(self.target)
        system = preset("dgx-h200", hosts=target.hosts, gpus=target.gpus_per_host)
        if not self.slow or system.across is None:
            return system
        rate = SLOW * system.across.rate(2)
        return dataclasses.replace(
            system, across=dataclasses.replace(system.across, bytes_per_s=rate)
        )

    def workload(self) -> Workload:
        if "U-Net" in self.network:
            return _labelling(self)
        return load_workload(
            f"tests.benchmarks.gpu:{self.network}_{self.dtype}", batch=self.batch, abstract=True
        )


def _labelling(row: Row) -> Workload:
    """Training of a network that labels every pixel or voxel."""
    model = __getattr__(f"{row.network}_{row.dtype}")
    shape = (row.batch, *(NETWORKS[row.network].input_shape or model.input_shape))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    variables = dict(jax.eval_shape(model.init, key, x))
    params = variables.pop("params")

    def loss(params: Any, stats: Any, seed: Any, x: Any, labels: Any) -> Any:
        logits, changed = model.apply(
            {"params": params} | stats,
            x,
            train=True,
            mutable=list(stats),
            rngs={"dropout": jax.random.wrap_key_data(seed)},
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean(), changed

    return Workload(name=row.network, loss=loss, params=params, batch=(variables, key, x, labels))


def rows(networks: list[str], dtypes: list[str], targets: list[str], slow: bool) -> Iterator[Row]:
    """The rows of large batches."""
    for target in targets:
        for dtype in dtypes:
            for network in networks:
                count = Target.parse(target).num_devices
                yield Row(network, dtype, NETWORKS[network].batch * count, target, slow)


def small_rows(networks: list[str], dtypes: list[str]) -> Iterator[Row]:
    """The rows of small batches."""
    for dtype in dtypes:
        for network in (n for n in SMALL if n in networks):
            for batch in SMALL[network]:
                for target in SMALL_TARGETS:
                    yield Row(network, dtype, batch, target)


class Programs:
    """Compiled programs on disk, by what was lowered and for what."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def compiled(self, lowered: Any, target: str) -> tuple[str, dict[str, int]]:
        """Text and memory of a lowered step, compiled unless that was done before."""
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
        content = "\n".join((target, *versions, lowered.as_text()))
        path = self.directory / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json.gz"
        if not path.exists():
            start = time.perf_counter()
            program = lowered.compile()
            memory = dataclasses.asdict(program_memory(program, "gpu"))
            memory["compile_s"] = round(time.perf_counter() - start, 1)
            kept = json.dumps({"text": program.as_text(), "memory": memory})
            partial = path.with_suffix(".partial")
            partial.write_bytes(gzip.compress(kept.encode(), compresslevel=3))
            partial.rename(path)
        content = json.loads(gzip.decompress(path.read_bytes()))
        return content["text"], content["memory"]


def plans(row: Row, work: Workload, count: int) -> dict[str, Plan]:
    """The plan found, the baselines that apply, and random ones, by name."""
    mesh = target_mesh(row.target)
    found = jaxlwp.parallelize(work.loss, work.params, *work.batch, mesh=mesh, rates=row.system)
    result = {"found": found}
    for name in jaxlwp.BASELINES:
        try:
            result[name] = with_strategy(found, found.space.baseline(name))
        except ValueError:  # a batch that the devices do not divide
            continue
    draw = random.Random(row.key)
    for number in range(count):
        configs = [draw.choice(known) for known in found.space.configs]
        sizes = found.space.devices.axis_sizes
        strategy = make_strategy(f"random {number}", found.graph, configs, sizes)
        result[strategy.name] = with_strategy(found, strategy)
    return result


def measured(row: Row, plan: Plan, programs: Programs, *, plain: bool = False) -> dict[str, Any]:
    """What a step does on the row's system, by its compiled program."""
    lowered = lower_step(plan, state_shapes(plan), plan.batch_shapes, OPTIMIZER, plain=plain)
    target = f"{row.target.partition(':')[0]}:{plan.mesh.size}"
    text, memory = programs.compiled(lowered, row.target if plan.mesh.size > 1 else target)
    found = forecast(text, row.system)
    return {
        "forecast_s": found.total_s,
        "exposed_s": found.exposed_s,
        "kernels": found.num_kernels,
        "kernel_bytes": found.num_bytes,
        "collective_bytes": {kind: t.num_bytes for kind, t in found.collectives.items()},
        "collectives": {kind: t.count for kind, t in found.collectives.items()},
        "temporary_bytes": memory["temporary_bytes"],
        "compile_s": memory["compile_s"],
        "predicted_s": None if plain else plan.cost.total_s,
    }


def run(row: Row, programs: Programs, names: list[str], count: int) -> dict[str, Any]:
    """One row: figures of every strategy, those that were asked for."""
    work = row.workload()
    start = time.perf_counter()
    every = plans(row, work, count)
    print(f"{row.key}: planned in {time.perf_counter() - start:.0f} s", flush=True)
    todo = {"plain": every["data"]} if "data" in every else {}
    if row.batch < NETWORKS[row.network].batch * Target.parse(row.target).num_devices:
        todo[ONE] = jaxlwp.parallelize(
            work.loss,
            work.params,
            *work.batch,
            mesh=target_mesh(f"{row.target.partition(':')[0]}:1"),
            rates=row.system.gpu.name,
        )
    todo |= every
    result = {}
    for name, plan in todo.items():
        if names and name.partition(" ")[0] not in names:
            continue
        plain = name in NOT_OURS
        try:
            result[name] = measured(row, plan, programs, plain=plain)
        except jax.errors.JaxRuntimeError as error:
            result[name] = {"refused": first_line(error)}
            print(f"  {name:12} refused by the compiler: {result[name]['refused']}", flush=True)
            continue
        predicted_s = result[name]["predicted_s"]
        print(
            f"  {name:12}{1e3 * result[name]['forecast_s']:9.3f} ms"
            f"{'' if predicted_s is None else f' (predicted {1e3 * predicted_s:.3f})':22}"
            f"{result[name]['kernels']:6} kernels {result[name]['kernel_bytes'] / 1e9:8.2f} GB "
            f"{sum(result[name]['collective_bytes'].values()) / 1e6:9.1f} MB sent "
            f"{result[name]['temporary_bytes'] / 1e9:7.2f} GB temporary "
            f"{result[name]['compile_s']:6.0f} s",
            flush=True,
        )
    return result


ONE = "one device"
NOT_OURS = ("plain", ONE)


def summary(content: dict[str, Any]) -> str:
    """Data parallelism beside plain JAX, what `check="compile"` keeps, and how true prices are."""
    lines = [
        "ours / plain JAX for strategy data: bytes sent, bytes moved, kernels, temporaries; "
        "then what is kept by the forecast, its time beside plain JAX's and beside that of what "
        "the search found"
    ]
    errors: list[float] = []
    orders: dict[str, list[tuple[float, float]]] = {}
    for key, every in content["rows"].items():
        row = {name: figures for name, figures in every.items() if "refused" not in figures}
        priced = {n: r for n, r in row.items() if n not in NOT_OURS}
        errors += [r["predicted_s"] / r["forecast_s"] - 1 for r in priced.values()]
        network = ", ".join(key.split(", ")[:2])
        orders.setdefault(network, []).extend(
            (r["predicted_s"], r["forecast_s"]) for r in priced.values()
        )
        best = min(priced, key=lambda name: priced[name]["forecast_s"])
        reference = row.get("plain", row.get(ONE))
        text = f"{key:48}"
        if "plain" in row and "data" in row:
            text += " ".join(f"{ratio:.3f}" for ratio in _ratios(row["data"], row["plain"]))
        if reference is not None:
            text += f"  {best:8} {priced[best]['forecast_s'] / reference['forecast_s']:.3f}"
        if "found" in row:
            text += f" {priced[best]['forecast_s'] / priced['found']['forecast_s']:.3f}"
        lines.append(text)
    size = sorted(map(abs, errors))
    if size:
        lines.append(
            f"prices beside forecasts: {len(size)} steps, median error {size[len(size) // 2]:.1%}, "
            f"90th percentile {size[int(0.9 * len(size))]:.1%}, largest {size[-1]:.1%}"
        )
    for network, pairs in orders.items():
        tau = kendalltau(*zip(*pairs, strict=True)).statistic
        lines.append(f"  order of {len(pairs):3} steps of {network}: Kendall's tau {tau:.2f}")
    return "\n".join(lines)


def _ratios(data: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    def total(row: dict[str, Any]) -> dict[str, float]:
        return {"sent": sum(row["collective_bytes"].values())} | row

    names = ("sent", "kernel_bytes", "kernels", "temporary_bytes")
    # Where a batch cannot be split neither sends anything.
    return [(total(data)[name] or 1) / (total(plain)[name] or 1) for name in names]


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--only", nargs="*", default=[], help="of plain, found, data, random, ...")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="small batches too")
    parser.add_argument("--slow", action="store_true", help="slow links between hosts")
    parser.add_argument("--programs", type=Path, default=Path("build/gpu-programs"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="of the rows that are there")
    given = parser.parse_args(arguments)
    if given.summary:
        print(summary(json.loads(given.json.read_text())))
        return 0
    programs = Programs(given.programs)
    chosen = list(rows(given.networks, given.dtypes, given.targets, given.slow))
    if given.small:
        chosen = list(small_rows(given.networks, given.dtypes))
    for row in chosen:
        found = run(row, programs, given.only, given.random)
        content = json.loads(given.json.read_text()) if given.json.exists() else {"rows": {}}
        content["rows"].setdefault(row.key, {}).update(found)
        content |= {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")},
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
