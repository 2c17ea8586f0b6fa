"""Plans that only evaluate, one image or volume, for GPUs that are not there: `make bench-forward`.

For each network and target: the function on one GPU, the strategy found, the baselines that apply,
and for the decoder a split by height that is written by hand with `jax.shard_map`, compiled, and
forecast kernel by kernel (`jaxlwp.check.forecast`). Nothing runs. Compiled programs are kept
(`--programs`), so that a run can be ended and goes on where it was; rows are in
results/forward.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check import forecast
from jaxlwp.check._target import Target, target_mesh
from jaxlwp.devices import System, preset
from jaxlwp.plan import OPTIMIZER, Plan, lower_step, state_shapes, with_strategy
from models import UNet3D, VAEDecoder

from .by_hand import AXIS, decoder_by_height
from .gpu import Programs

RESULTS = Path(__file__).parent / "results" / "forward.json"
ONE, BY_HAND = "one device", "by hand"


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and the shape of its one example."""

    model: Any
    shape: tuple[int, ...]


NETWORKS = {
    "decoder 1024 px": Network(VAEDecoder(dtype=jnp.bfloat16), (128, 128, 4)),
    "decoder 2048 px": Network(VAEDecoder(dtype=jnp.bfloat16), (256, 256, 4)),
    "3-D U-Net 256^3": Network(UNet3D(dtype=jnp.bfloat16), (256, 256, 256, 3)),
}
TARGETS = ("h200:4", "h200:8")


def workload(network: Network) -> tuple[Callable[..., Any], Any, Any]:
    """The function, shapes of its parameters in bfloat16, and of one example."""
    x = jax.ShapeDtypeStruct((1, *network.shape), jnp.bfloat16)
    variables = jax.eval_shape(network.model.init, jax.random.key(0), x)
    half = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16), variables)
    return network.model.apply, half, x


def system_of(target: str) -> System:
    """The GPUs of a target, at their published rates."""
    parsed = Target.parse(target)
    return preset("dgx-h200", hosts=parsed.hosts, gpus=parsed.gpus_per_host)


def row(
    name: str, text: str, memory: dict[str, int], system: System, plan: Plan | None
) -> dict[str, Any]:
    """Figures of one compiled program, and of the prices of its plan."""
    found = forecast(text, system)
    priced: Counter[str] = Counter()
    for collective in plan.collectives if plan is not None else ():
        priced[collective.kind] += collective.num_bytes
    result = {
        "forecast_s": found.total_s,
        "predicted_s": plan.cost.total_s if plan is not None else None,
        "exposed_s": found.exposed_s,
        "kernels": found.num_kernels,
        "kernel_bytes": found.num_bytes,
        "collective_bytes": {kind: t.num_bytes for kind, t in found.collectives.items()},
        "priced_bytes": dict(priced) if plan is not None else None,
        "temporary_bytes": memory["temporary_bytes"],
        "argument_bytes": memory["argument_bytes"],
        "compile_s": memory["compile_s"],
    }
    print(
        f"  {name:12}{1e3 * result['forecast_s']:9.3f} ms"
        f"{'' if plan is None else f' (predicted {1e3 * plan.cost.total_s:.3f})':22}"
        f"{result['kernels']:6} kernels {result['kernel_bytes'] / 1e9:8.2f} GB "
        f"{sum(result['collective_bytes'].values()) / 1e6:9.2f} MB sent "
        f"({sum(priced.values()) / 1e6:.2f} priced) "
        f"{result['temporary_bytes'] / 1e9:7.3f} GB temporary {result['compile_s']:5.0f} s",
        flush=True,
    )
    return result


def lowered_plan(plan: Plan, *, plain: bool = False) -> Any:
    """An evaluation, lowered."""
    return lower_step(plan, state_shapes(plan), plan.batch_shapes, OPTIMIZER, plain=plain)


def by_hand(network: Network, target: str) -> Any:
    """The decoder by height, lowered."""
    _, variables, x = workload(network)
    mesh = Mesh(target_mesh(target).devices.reshape(-1), (AXIS,))
    split, whole = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(None, AXIS), PartitionSpec())
    )
    decode = decoder_by_height(network.model, mesh)
    step = jax.jit(decode, in_shardings=(whole, split), out_shardings=split)
    return step.lower(variables["params"], x)


def run(name: str, target: str, programs: Programs, only: list[str]) -> dict[str, Any]:
    """One network on one target: figures of every strategy that was asked for."""
    network = NETWORKS[name]
    fn, variables, x = workload(network)
    system, single = system_of(target), f"{target.partition(':')[0]}:1"
    start = time.perf_counter()
    options: dict[str, Any] = {"rates": system, "train": False}
    found = jaxlwp.parallelize(fn, variables, x, mesh=target_mesh(target), **options)
    print(f"{name}, {target}: planned in {time.perf_counter() - start:.0f} s", flush=True)
    plans = {"found": found}
    for baseline in jaxlwp.BASELINES:
        try:
            plans[baseline] = with_strategy(found, found.space.baseline(baseline))
        except ValueError:  # one example
            continue
    todo: dict[str, Callable[[], Any]] = {
        ONE: lambda: lowered_plan(
            jaxlwp.parallelize(
                fn, variables, x, mesh=target_mesh(single), rates=system.gpu.name, train=False
            ),
            plain=True,
        )
    }
    if isinstance(network.model, VAEDecoder):
        todo[BY_HAND] = lambda: by_hand(network, target)
    todo |= {label: (lambda plan=plan: lowered_plan(plan)) for label, plan in plans.items()}
    result = {}
    for label, lower in todo.items():
        if only and label not in only:
            continue
        text, memory = programs.compiled(lower(), single if label == ONE else target)
        result[label] = row(label, text, memory, system, plans.get(label))
    return result


def summary(content: dict[str, Any]) -> str:
    """How much faster than one device, temporaries beside a share of its, bytes priced."""
    lines = []
    for key, rows in content["rows"].items():
        if ONE not in rows:
            continue
        count, one = Target.parse(key.split(", ")[-1]).num_devices, rows[ONE]
        lines.append(key)
        for label, each in rows.items():
            sent = sum(each["collective_bytes"].values())
            prices = each["priced_bytes"]
            priced = "" if prices is None else f", priced {sum(prices.values()):,}"
            lines.append(
                f"  {label:12}{1e3 * each['forecast_s']:9.3f} ms "
                f"{one['forecast_s'] / each['forecast_s']:6.2f} times as fast, temporaries "
                f"{count * each['temporary_bytes'] / one['temporary_bytes']:6.2f} of its share, "
                f"bytes sent {sent:,}{priced}"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--only", nargs="*", default=[], help="of one device, by hand, found, ...")
    parser.add_argument("--programs", type=Path, default=Path("build/gpu-programs"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="of the rows that are there")
    given = parser.parse_args(arguments)
    if given.summary:
        print(summary(json.loads(given.json.read_text())))
        return 0
    programs = Programs(given.programs)
    for name in given.networks:
        for target in given.targets:
            found = run(name, target, programs, given.only)
            content = json.loads(given.json.read_text()) if given.json.exists() else {"rows": {}}
            content["rows"].setdefault(f"{name}, {target}", {}).update(found)
            content |= {
                "date": datetime.date.today().isoformat(),
                "python": platform.python_version(),
                "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")},
            }
            given.json.write_text(json.dumps(content, indent=1) + "\n")
    print(summary(content))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
