"""Two processes, each with its own cache, make one plan and train with it as one device does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.processes_worker import loss, network

WORKER = Path(__file__).with_name("processes_worker.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_processes_agree(tmp_path: Path) -> None:
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes_worker", str(port), str(rank)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "JAXLWP_CACHE_DIR": str(tmp_path / str(rank)),
            },
            cwd=WORKER.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert set(first["checked"]) >= {"data"}
    assert first["num_measured"] > 0
    params, batch = network()
    value, grads = jax.value_and_grad(loss)(params, *batch)
    np.testing.assert_allclose(first["loss"], float(value), rtol=1e-5)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    np.testing.assert_allclose(first["norm"], norm, rtol=1e-5)
