"""Several processes make one plan and train with it as one device does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import xla_flags
from tests.processes_worker import SHAPES, STEPS, loss, network, rows, train

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def results(checks: str, count: int, devices: int, folder: Path) -> list[dict[str, Any]]:
    """What the workers print: each has devices and a cache of its own."""
    coordinator = f"127.0.0.1:{free_port()}"
    return gathered(
        subprocess.Popen(
            [*f"{sys.executable} -m tests.processes_worker".split(), checks, coordinator]
            + [str(count), str(rank)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": xla_flags.simulated(devices),
                "JAXLWP_CACHE_DIR": str(folder / str(rank)),
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    )


def gathered(started: Iterable[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What workers print as JSON in the end; fails if one fails."""
    workers = list(started)
    try:
        outputs = [worker.communicate(timeout=500) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def reference() -> list[float]:
    """Losses of one process."""
    params, _ = network()
    batches = [tuple(rows(shape, step) for shape in SHAPES) for step in range(STEPS)]
    return train(loss, params, batches)


def check_feeding(found: dict[str, Any]) -> None:
    """Losses are one process's, and a process holds a part of what is split."""
    for name, result in found.items():
        np.testing.assert_allclose(result["losses"], reference(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            result["first loss of whole arrays"], result["losses"][0], rtol=1e-6
        )


def test_two_processes(tmp_path: Path) -> None:
    """One launch for what needs two processes, since starting them is what takes time."""
    checks = "measured,feeding,sharded,differing,strategies,traced,files,command,compared,shapes"
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    both = results(checks, 2, 2, tmp_path)
    first, second = both
    params, batch = network()

    assert first["measured"] == second["measured"]
    assert set(first["measured"]["checked"]) >= {"data"}
    assert first["measured"]["num_measured"] > 0
    value, grads = jax.value_and_grad(loss)(params, *batch)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    for result in both:
        np.testing.assert_allclose(result["measured"]["loss"], float(value), rtol=1e-5)
        np.testing.assert_allclose(result["measured"]["norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(result["traced"]["loss"], float(value), rtol=1e-5)
        check_feeding(result["feeding"])
        assert all(one["held"][0] == 0.5 for one in result["feeding"].values())

    boxes = [{name: one["box"] for name, one in r["feeding"].items()} for r in both]
    assert [box["data, in order"][0] for box in boxes] == [[0, 4], [4, 8]]
    assert [box["data, reversed"][0] for box in boxes] == [[4, 8], [0, 4]]
    assert [box["data, interleaved"][0] for box in boxes] == [[0, 6], [2, 8]]
    assert [box["spatial, in order"] for box in boxes] == [
        [[0, 8], [0, 4], [0, 8], [0, 3]],
        [[0, 8], [4, 8], [0, 8], [0, 3]],
    ]

    for result in both:
        made = result["sharded"]
        assert made["held"] == made["slots"] == {"kernel": 0.5, "dense": 0.5}
        assert made["same numbers"] and made["whole"] == 0.5
    message = both[0]["sharded"]["error"]
    assert message.startswith("place: training states differ between processes 0 and 1")
    assert "['params']['dense']: float32[1024, 16]" in message and "state_shardings" in message

    assert first["files"]["written"] and not second["files"]["written"]
    assert first["command"]["written"] and not second["command"]["written"]
    assert "batch 16, on 4 x" in first["command"]["printed"] and not second["command"]["printed"]
    assert first["compared"] == second["compared"] and set(first["compared"]) == {"search", "data"}
    assert "shape (3, 8, 8, 3)" in first["shapes"]["message"]
    assert "(8, 8, 8, 3) and this process holds (4, 8, 8, 3)" in first["shapes"]["message"]
    check_differing(first["differing"], second["differing"])
    assert first["strategies"] == second["strategies"]
    assert "strategies found differ" in first["strategies"]["message"]


def check_differing(first: dict[str, str], second: dict[str, str]) -> None:
    """Each difference is named, in both processes; and nothing hangs afterwards."""
    named = {
        "batch": ("arguments", "args[0]: float32[8, 8, 8, 3]", "args[0]: float32[4, 8, 8, 3]"),
        "function": ("traced functions", "in process 0", "in process 1"),
        "rates": ("rates", "10000000000.0", "20000000000.0"),
        "profile": ("profiles", "some layer: 0.25", "some layer: 0.5"),
        "option": ("options", "constraints=None", "forbid=('height',)"),
        "check": ("options", "check=None", "check=measure"),
        "mesh": ("meshes", "host0=2", "a=2"),
        "failure": ("outcomes", "'traced' in process 0", "'ValueError: loss function"),
        "versions": ("versions", importlib_version("jaxlib"), "jaxlib 0.0.1"),
    }
    for name, (part, *texts) in named.items():
        start = f"parallelize: {part} differ between processes 0 and 1: "
        assert first[name].startswith(start), first[name]
        assert all(text in first[name] for text in texts), first[name]
        if name == "failure":  # an error of its own
            assert second[name].startswith("loss function")
        else:
            assert second[name] == first[name]
    assert first["none"] == second["none"] == ""


def importlib_version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def test_four_processes(tmp_path: Path) -> None:
    """Four processes feed their shares: by sample, and by height."""
    for rank, result in enumerate(results("feeding", 4, 1, tmp_path)):
        check_feeding(result["feeding"])
        assert all(one["held"][0] == 0.25 for one in result["feeding"].values())
        assert result["feeding"]["data, in order"]["box"][0] == [2 * rank, 2 * rank + 2]
        assert result["feeding"]["spatial, reversed"]["box"][1] == [6 - 2 * rank, 8 - 2 * rank]
