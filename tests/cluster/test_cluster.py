"""Hosts of their own: feeding, what differs, and a host that vanishes (`make cluster-test`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import REQUIRED, Cluster, NotAllowed, cluster, devices
from tests.test_processes import check_differing, check_feeding, gathered
from tests.test_restart import KILLED_AT, STEPS, Page, check_same, losses, one_process, slurm, until

pytestmark = pytest.mark.cluster
PORT = 9911


@pytest.fixture
def four() -> Iterator[Cluster]:
    yield from _hosts(4)


@pytest.fixture
def two() -> Iterator[Cluster]:
    yield from _hosts(2)


def _hosts(count: int) -> Iterator[Cluster]:
    try:
        with cluster(count) as hosts:
            hosts.set_rate("200mbit")
            yield hosts
    except NotAllowed as error:
        if REQUIRED in os.environ:
            raise
        pytest.skip(f"no cluster here: {error}")


def results(hosts: Cluster, checks: str, each: int, folder: Path) -> list[dict[str, Any]]:
    """What the workers of `test_processes` print, one on each host."""
    worker = [sys.executable, "-m", "tests.processes_worker", checks, hosts.coordinator(PORT)]
    return gathered(
        hosts.start(
            rank,
            [*worker, str(hosts.count), str(rank)],
            devices(each) | {"JAXLWP_CACHE_DIR": str(folder / str(rank))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(hosts.count)
    )


def test_feeding(four: Cluster, tmp_path: Path) -> None:
    for result in results(four, "feeding", 2, tmp_path):
        check_feeding(result["feeding"])
        assert all(one["held"][0] <= 0.25 for one in result["feeding"].values())


def test_differing(two: Cluster, tmp_path: Path) -> None:
    first, second = results(two, "differing,sharded", 2, tmp_path)
    check_differing(first["differing"], second["differing"])
    assert set(first["sharded"]["held"].values()) == {0.5}


def test_a_host_vanishes(two: Cluster, tmp_path: Path) -> None:
    """It answers nobody any more: all end by JAX's heartbeat; then they start again."""
    expected = one_process(tmp_path / "one")
    (tmp_path / "two").mkdir()
    page = Page(tmp_path / "two")
    page.write("jax.distributed.initialize(heartbeat_timeout_seconds=15)")

    def start(rank: int) -> subprocess.Popen[str]:
        environment = devices(2) | slurm("10.77.0.1", PORT, rank)
        pipes = {"stdout": subprocess.PIPE, "stderr": page.errors(rank).open("w")}
        command = [sys.executable, "-u", "train.py"]
        return two.start(rank, command, environment, cwd=page.folder, **pipes)

    processes = [start(rank) for rank in range(2)]
    before = losses(until(processes[0], KILLED_AT))
    two.cut(1)
    before |= losses(processes[0].communicate(timeout=200)[0])
    assert processes[0].returncode != 0
    assert "another task died" in page.errors(0).read_text()
    assert processes[1].wait(timeout=200) != 0  # it is alone now
    two.join(1)

    processes = [start(rank) for rank in range(2)]
    after = losses(processes[0].communicate(timeout=200)[0])
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert 0 < min(after) <= max(before) + 1 < STEPS and max(after) == STEPS - 1
    check_same(before, expected)
    check_same(after, expected)
