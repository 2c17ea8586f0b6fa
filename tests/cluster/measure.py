"""Strategies measured on an emulated cluster, on slow, middle and fast links.

    python -m tests.cluster.measure [--models alexnet vgg] [--links slow middle fast] [--rounds 7]

Link rates are related to the paper's cluster by one ratio: what data parallelism adds to a step,
over the step of one device by itself. For the paper's 16 GPUs both are published (Figure 7). Here
the step of a host by itself is measured, while all hosts do the same, and the "middle" rate is the
one at which the bytes that a host sends for data parallelism's ring all-reduce take that much
longer:

    rate = 2 (devices - 1) / devices * parameter bytes / (ratio * seconds of the step alone)

"slow" is a quarter of it, "fast" four times. Results are written after every comparison, and what
the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.hosts import ROOT, Cluster, NotAllowed, cluster, devices

RESULTS = ROOT / "tests/benchmarks/results/cluster.json"
PORT = 9912
STRATEGIES = ("data", "model", "owt")
LINKS = {"slow": 0.25, "middle": 1.0, "fast": 4.0}
"""Times the rate that corresponds to the paper's cluster."""

EXAMPLES_OF_A_GPU = 32
MODELS: dict[str, dict[str, Any]] = {
    # Images a second of one GPU and of 16 under data parallelism: the paper's Figure 7.
    "alexnet": {"model": "models.alexnet:AlexNet", "image": (64, 64, 3), "paper": (745, 3230)},
    "vgg": {"model": "models.vgg:VGG16", "image": (32, 32, 3), "paper": (184, 1660)},
    "lenet": {"model": "models.lenet:LeNet5", "image": (28, 28, 1), "paper": (745, 3230)},
}


def paper_ratio(one: float, sixteen: float) -> float:
    """Seconds that data parallelism adds to a step of 16 GPUs, over the step of one."""
    alone_s, together_s = EXAMPLES_OF_A_GPU / one, 16 * EXAMPLES_OF_A_GPU / sixteen
    return together_s / alone_s - 1


def ring_bytes(parameter_bytes: float, devices: int) -> float:
    """Bytes that a host sends in a ring all-reduce of all gradients that enters each host once."""
    return 2 * (devices - 1) / devices * parameter_bytes


def run(hosts: Cluster, job: dict[str, Any], each: int, folder: Path) -> dict[str, Any]:
    """What the first host's worker prints."""
    logs = [folder / f"errors{rank}" for rank in range(hosts.count)]
    text = json.dumps({**job, "hosts": hosts.count})
    worker = [sys.executable, "-m", "tests.cluster.measure_worker", text, hosts.coordinator(PORT)]
    with contextlib.ExitStack() as files:
        processes = [
            hosts.start(
                rank,
                [*worker, str(rank)],
                devices(each) | {"JAXLWP_CACHE_DIR": str(folder / f"cache{rank}")},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=files.enter_context(log.open("w")),
                cwd=ROOT,
            )
            for rank, log in enumerate(logs)
        ]
        printed, _ = processes[0].communicate()
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("\n".join(log.read_text()[-2000:] for log in logs))
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def measured(
    hosts: Cluster, name: str, given: argparse.Namespace, folder: Path, content: dict[str, Any]
) -> None:
    """Measure a model on all links; results go into `content`, and to the file."""
    settings = MODELS[name]
    job = {
        "model": settings["model"],
        "image": given.image or settings["image"],
        "batch": given.batch,
        "rounds": given.rounds,
        "strategies": STRATEGIES,
    }
    entry = content["models"].setdefault(name, {"links": {}})
    if "alone" not in entry:
        hosts.set_rate(None)
        entry["alone"] = run(hosts, {**job, "do": "alone"}, given.devices, folder)
        entry["paper_ratio"] = paper_ratio(*settings["paper"])
        entry |= {"image": job["image"], "batch_of_a_device": given.batch}
    num_bytes = ring_bytes(entry["alone"]["parameter_bytes"], hosts.count * given.devices)
    middle = num_bytes / (entry["paper_ratio"] * entry["alone"]["step_s"])
    entry["ring_bytes"] = num_bytes
    for link in given.links:
        if link in entry["links"]:
            continue
        bytes_per_s = LINKS[link] * middle
        hosts.set_rate(f"{round(8 * bytes_per_s / 1000)}kbit")
        found = run(hosts, {**job, "do": "compare"}, given.devices, folder)
        entry["links"][link] = {"bytes_per_s": bytes_per_s, **summary(found), "full": found}
        given.out.write_text(json.dumps(content, indent=1) + "\n")
        print(row(name, link, entry["links"][link]), flush=True)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and where the strategy found stands among what was measured."""
    medians = {each["strategy"]: each["measured_s"] for each in found["results"]}
    others = [s for strategy, s in medians.items() if strategy != "search"]
    return {
        "median_s": medians,
        "over_data": medians["data"] / medians["search"],
        "over_best_other": min(others) / medians["search"],
        "loss_error": abs(found["loss"] / found["loss_of_one_process"] - 1),
    }


def row(name: str, link: str, entry: dict[str, Any]) -> str:
    """A line for people."""
    medians = ", ".join(f"{n} {s:.3f} s" for n, s in entry["median_s"].items())
    return (
        f"{name:8} {link:7} {8e-6 * entry['bytes_per_s']:7.1f} Mbit/s: {medians}; found is "
        f"{entry['over_data']:.2f}x data, {entry['over_best_other']:.3f}x the best other; "
        f"loss off by {entry['loss_error']:.1e}"
    )


def main() -> None:
    """Measure what the file has not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["alexnet", "vgg"], choices=MODELS)
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=LINKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2, help="of each host")
    parser.add_argument("--batch", type=int, default=4, help="of each device")
    parser.add_argument("--image", type=int, nargs=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out = given.out.absolute()
    content = json.loads(given.out.read_text()) if given.out.exists() else {}
    content = {
        "hosts": given.hosts,
        "devices_of_a_host": given.devices,
        "cores": os.cpu_count(),
        "models": {},
        **content,
    }
    folder = Path(tempfile.mkdtemp(prefix="jaxlwp-cluster-"))
    try:
        with cluster(given.hosts) as hosts:
            for name in given.models:
                measured(hosts, name, given, folder, content)
    except NotAllowed as error:
        print(f"cluster-measure: ran nothing: {error}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
