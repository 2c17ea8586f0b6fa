"""One host of `tests.cluster.measure`: called with JOB COORDINATOR RANK.

JOB is JSON: what to do ("alone" or "compare"), model, batch of a device, image, hosts, rounds,
strategies.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import jax
import numpy as np

import jaxlwp
from jaxlwp.check._steps import step_times
from jaxlwp.cli._workload import load_workload
from jaxlwp.devices import local_devices
from jaxlwp.program import canonical


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a data-parallel step of one host by itself, while all others do the same."""
    devices = jax.local_devices()
    work = load_workload(
        job["model"], batch=job["batch"] * len(devices), input_shape=tuple(job["image"])
    )
    rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
    mesh = jaxlwp.make_mesh(devices)
    plan = jaxlwp.parallelize(
        work.loss, work.params, *work.batch, mesh=mesh, strategy="data", rates=rates
    )
    arguments = canonical("alone", work.loss, (work.params, *work.batch), {})
    times = step_times(plan, arguments, rounds=job["rounds"])
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(work.params)]
    return {"step_s": statistics.median(times), "parameter_bytes": sum(sizes)}


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Strategies side by side, on the links as they are now; and losses beside one device's."""
    work = load_workload(
        job["model"], batch=job["batch"] * jax.device_count(), input_shape=tuple(job["image"])
    )
    mesh = jaxlwp.make_mesh(jax.devices())
    rates = jaxlwp.device_graph(mesh, again=True)  # links were others when they were measured
    found = jaxlwp.compare(
        work.loss,
        work.params,
        *work.batch,
        strategies=job["strategies"],
        rounds=job["rounds"],
        name=job["model"],
    )
    plan = jaxlwp.parallelize(work.loss, work.params, *work.batch, mesh=mesh)
    loss = jax.jit(plan)(plan.place(work.params), *plan.place_batch(*work.batch))
    with jax.default_device(local_devices(mesh)[0]):
        expected = jax.jit(work.loss)(work.params, *work.batch)
    return {
        "rates": rates.to_json(),
        "loss": float(np.asarray(loss.addressable_data(0))),
        "loss_of_one_process": float(expected),
        "strategy": json.loads(plan.strategy.to_json()),
        **json.loads(found.to_json()),
    }


def main() -> None:
    """Do the job; the first process prints what came of it."""
    job, coordinator, rank = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(coordinator, num_processes=job["hosts"], process_id=rank)
    done = {"alone": alone, "compare": compare}[job["do"]](job)
    if rank == 0:
        print(json.dumps(done))


if __name__ == "__main__":
    main()
