"""Layer times of local shapes on 8 devices, measured on one: found and baselines, then the rest."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jaxlwp
from jaxlwp.cost import SearchSpace
from jaxlwp.devices import DeviceGraph, MeshAxis, Store, environment_of, make_mesh, preset
from jaxlwp.devices._device_graph import axis_shape
from jaxlwp.graph import ComputationGraph
from jaxlwp.measure._timer import LayerTimer, TimingCache
from jaxlwp.optimize._measured import measured_space
from tests.benchmarks.gpu import NETWORKS
from tests.benchmarks.on_gpu.data import workload
from tests.benchmarks.on_gpu.part import Part

MEASURED = ("AlexNet", "VGG-16", "ResNet-50", "Inception-v3")
PLANNED = 8
"""Devices that layer times are measured for; they need not exist."""

STAGES = ("found and baselines", "all")
TOGETHER = 8
"""Pairs of layer and config that are measured between two looks at the clock."""


@dataclasses.dataclass(kw_only=True)
class Queue:
    """Pairs of layer and config of one network and dtype that are to be measured, by stage."""

    network: str
    dtype: str
    graph: ComputationGraph
    space: SearchSpace
    pairs: dict[str, list[Any]]


def run(part: Part) -> None:
    """What matters of every network and dtype first, then what is left of each."""
    rows: dict[str, dict[str, Any]] = {}
    networks = ("LeNet-5",) if part.small else MEASURED
    local = [part.device]
    rates = local_rates(part)
    queues: list[Queue] = []
    with Store() as store:
        cache = TimingCache(store, environment_of(local))

        def measure(queue: Queue, stage: str) -> None:
            timer = LayerTimer(queue.graph, rates, local, cache)
            name = f"{queue.network}, {queue.dtype}, {stage}"
            rows[name] = measured(part, queue, stage, timer)
            part.write({"rows": rows})
            part.say(f"{name}: {rows[name]}")

        # Planning a network takes seconds, so it waits until the one before has been measured.
        for network in networks:
            for dtype in ("float32", "bfloat16"):
                if part.left_s > 0:
                    queues.append(planned(network, dtype))
                    measure(queues[-1], STAGES[0])
        for queue in queues:
            if part.left_s > 0:
                measure(queue, STAGES[1])
        part.write({"rows": rows, "profile": profile(store, local)})


def planned_devices() -> DeviceGraph:
    """8 H200s as on an HGX board; NVLink's rate and start as in systems/dgx-h200.toml."""
    inside, gpu = preset("dgx-h200").inside, preset("h200", gpus=1).gpu
    axes = tuple(
        MeshAxis(
            name=name,
            size=size,
            level=level,
            latency_s=inside.start_s,
            bytes_per_s=inside.rate(PLANNED),
        )
        for name, size, level in axis_shape((PLANNED,))
    )
    return DeviceGraph(
        axes=axes,
        conv_flops_per_s=gpu.flops_per_s("float32"),
        dense_flops_per_s=gpu.flops_per_s("float32"),
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        overhead_s=gpu.kernel_s,
    )


def local_rates(part: Part) -> DeviceGraph:
    """Rates of the device at hand, measured, with the axes of those that are planned for."""
    mesh = make_mesh([part.device])
    given = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9) if part.small else None
    here = jaxlwp.device_graph(mesh, rates=given).to_json()
    axes = planned_devices().to_json()["axes"]
    return DeviceGraph.from_json({**here, "axes": axes, "links": ()})


def planned(network: str, dtype: str) -> Queue:
    """Trace and price a network; the pairs of what is found and the baselines, and all."""
    batch = NETWORKS[network].batch * PLANNED
    work = workload(network, dtype, batch)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    space = jaxlwp.price(graph, planned_devices())
    strategies = [jaxlwp.search(space).strategy, *map(space.baseline, jaxlwp.BASELINES)]
    first = [pair for s in strategies for pair in space.pairs(s)]
    every = [
        (layer, config)
        for layer, configs in zip(graph.layers, space.configs, strict=True)
        for config in configs
    ]
    pairs = dict(zip(STAGES, (first, every), strict=True))
    pairs = {stage: [p for p in each if not p[0].fused] for stage, each in pairs.items()}
    return Queue(network=network, dtype=dtype, graph=graph, space=space, pairs=pairs)


def measured(part: Part, queue: Queue, stage: str, timer: LayerTimer) -> dict[str, Any]:
    """Measure while there is time. Data parallelism's layers are those of one GPU's own step."""
    todo = queue.pairs[stage][: 4 if part.small else None]
    for start in range(0, len(todo), TOGETHER):
        if part.left_s < 0:
            break
        timer.measure(todo[start : start + TOGETHER])
    space = measured_space(queue.space, timer)
    data = space.baseline("data")
    known = [timer.known_s(*pair) is not None for pair in space.pairs(data) if not pair[0].fused]
    return {
        "measured": sum(timer.known_s(*pair) is not None for pair in todo),
        "of": len(todo),
        "data_compute_s": space.evaluate(data).compute_s,
        "data_measured": sum(known),
        "data_of": len(known),
    }


def profile(store: Store, devices: list[Any]) -> Any:
    """All that was measured, as `jaxlwp cache export` writes it and `load_profile` reads it."""
    if not store.path.exists():
        return None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "profile.json"
        store.export(path, environment_of(devices))
        return json.loads(path.read_text())
