"""The program of docs/processes.md: as one process, and as two, of which one is killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.test_processes import ROOT, free_port
from tests.test_readme import blocks

PROGRAM = blocks("python", "docs/processes.md")[0]
START = next(line for line in PROGRAM.splitlines() if line.startswith("jax.distributed"))
STEPS = 12
KILLED_AT = 4
RATES = "rates=jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)"


def program(start: str) -> str:
    """The page's program, without measuring, that starts otherwise."""
    quick = PROGRAM.replace("optimizer=tx)", f"optimizer=tx, {RATES})").replace(START, start)
    assert RATES in quick and START not in quick.replace(start, "")
    return quick


def slurm(port: int, rank: int) -> dict[str, str]:
    """What Slurm sets for a process of two."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi(port: int, rank: int) -> dict[str, str]:
    """What Open MPI's mpirun sets for a process of two."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


class Pair:
    """Two processes that run a program in a folder."""

    def __init__(
        self, folder: Path, text: str, started_by: Callable[[int, int], dict[str, str]]
    ) -> None:
        (folder / "train.py").write_text(text)
        port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-u", "train.py"],
                env=os.environ
                | started_by(port, rank)
                | {
                    "PYTHONPATH": str(ROOT),
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                },
                cwd=folder,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=(folder / f"errors{rank}").open("w"),
                text=True,
            )
            for rank in range(2)
        ]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, step: int) -> str:
        """What the first one prints, up to a step."""
        text = ""
        for line in self.processes[0].stdout or ():
            text += line
            if f"step {step}:" in line:
                break
        return text

    def rest(self) -> tuple[str, list[int]]:
        """What it still prints, and how they end; fails if they do not."""
        text, _ = self.processes[0].communicate(timeout=240)
        return text, [process.wait(timeout=240) for process in self.processes]


def losses(text: str) -> dict[int, float]:
    return {int(n): float(x) for n, x in re.findall(r"step (\d+): loss (\S+)", text)}


def test_a_killed_process_and_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        images = generator.standard_normal((STEPS * 16, 12, 12, 1)).astype(np.float32)
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", (np.arange(STEPS * 16) % 10).astype(np.int32))
        generator = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path / "one")
    exec(compile(program("pass"), "docs/processes.md", "exec"), {"__name__": "page"})
    expected = losses(capsys.readouterr().out)
    assert sorted(expected) == list(range(STEPS))

    quick = START.replace("heartbeat_timeout_seconds=30", "heartbeat_timeout_seconds=10")
    with Pair(tmp_path / "two", program(quick), slurm) as pair:
        before = losses(pair.until(KILLED_AT))
        pair.processes[1].kill()
        more, codes = pair.rest()
    before |= losses(more)
    assert all(code != 0 for code in codes)
    errors = (tmp_path / "two/errors0").read_text()
    assert "Connection closed by peer" in errors or "another task died" in errors

    with Pair(tmp_path / "two", program(quick), open_mpi) as pair:
        text, codes = pair.rest()
    assert codes == [0, 0], (tmp_path / "two/errors0").read_text()[-3000:]
    after = losses(text)
    assert 0 < min(after) <= max(before) + 1 < STEPS and max(after) == STEPS - 1
    for found in (before, after):
        wanted = [expected[step] for step in found]
        np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-4)
