"""The program of docs/processes.md: as one process, and as two, of which one is killed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests import xla_flags
from tests.test_processes import ROOT, free_port
from tests.test_readme import blocks

PROGRAM = blocks("python", "docs/processes.md")[0]
START = next(line for line in PROGRAM.splitlines() if line.startswith("jax.distributed"))
STEPS = 12
KILLED_AT = 4
RATES = "rates=jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)"


class Page:
    """The page's program and its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images = np.random.default_rng(0).standard_normal((STEPS * 16, 12, 12, 1))
        np.save(folder / "images.npy", images.astype(np.float32))
        np.save(folder / "labels.npy", (np.arange(STEPS * 16) % 10).astype(np.int32))

    def write(self, start: str) -> None:
        """Write the program, without measuring, that starts otherwise."""
        quick = PROGRAM.replace("optimizer=tx)", f"optimizer=tx, {RATES})").replace(START, start)
        assert RATES in quick and start in quick
        (self.folder / "train.py").write_text(quick)

    def errors(self, rank: int) -> Path:
        """What a process says on its standard error."""
        return self.folder / f"errors{rank}"


def one_process(folder: Path) -> dict[int, float]:
    """Losses of the page's program as one process."""
    folder.mkdir()
    Page(folder).write("pass")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(Path("train.py").read_text(), "train.py", "exec"), {"__name__": "page"})
    found = losses(printed.getvalue())
    assert sorted(found) == list(range(STEPS))
    return found


def check_same(found: dict[int, float], expected: dict[int, float]) -> None:
    """Losses by step are those of one process."""
    wanted = [expected[step] for step in found]
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-4)


def losses(text: str) -> dict[int, float]:
    return {int(n): float(x) for n, x in re.findall(r"step (\d+): loss (\S+)", text)}


def until(process: subprocess.Popen[str], step: int) -> str:
    """What a process prints, up to a step."""
    text = ""
    for line in process.stdout or ():
        text += line
        if f"step {step}:" in line:
            break
    return text


def slurm(coordinator: str, port: int, rank: int) -> dict[str, str]:
    """What Slurm sets for a process of two."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": coordinator,
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi(coordinator: str, port: int, rank: int) -> dict[str, str]:
    """What Open MPI's mpirun sets for a process of two."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://{coordinator}:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


@contextlib.contextmanager
def pair(
    page: Page, launcher: Callable[[str, int, int], dict[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that run the page's program."""
    port = free_port()
    quick = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    quick["XLA_FLAGS"] = xla_flags.simulated(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", "train.py"],
            env=os.environ | quick | launcher("127.0.0.1", port, rank),
            cwd=page.folder,
            stdout=subprocess.PIPE,
            stderr=page.errors(rank).open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_killed_process_and_a_restart(tmp_path: Path) -> None:
    expected = one_process(tmp_path / "one")
    (tmp_path / "two").mkdir()
    page = Page(tmp_path / "two")
    page.write(START.replace("heartbeat_timeout_seconds=30", "heartbeat_timeout_seconds=10"))
    with pair(page, slurm) as (first, second):
        before = losses(until(first, KILLED_AT))
        second.kill()
        before |= losses(first.communicate(timeout=240)[0])
        assert first.returncode != 0
    errors = page.errors(0).read_text()
    assert "Connection closed by peer" in errors or "another task died" in errors
    with pair(page, open_mpi) as (first, second):
        after = losses(first.communicate(timeout=240)[0])
        codes = first.returncode, second.wait(timeout=240)
    assert codes == (0, 0), page.errors(0).read_text()[-3000:]
    assert 0 < min(after) <= max(before) + 1 < STEPS and max(after) == STEPS - 1
    check_same(before, expected)
    check_same(after, expected)
