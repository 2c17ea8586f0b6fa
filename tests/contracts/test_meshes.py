"""Contract 1 on the meshes that users make: any order of sizes, any order of axes, any devices.

Configs name mesh axes in every order, so nothing may rely on that of the mesh. Meshes of twelve
devices are swept in a process of their own, since all other tests simulate eight.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from .cases import CASES
from .harness import SEED_VARIABLE, Case, draw_seed, drawn, reorders, sweep

SEED = draw_seed()
SHAPES = ((2, 4), (4, 2), (2, 3), (3, 2), (2, 1, 3))
TWELVE = ((3, 4), (2, 3, 2))
INSIDE = "JAXLWP_TEST_DEVICES" in os.environ  # the process of `test_twelve_devices`
KINDS = ("Auto", "Explicit")
FAST = ("conv-3x3/1-14x15", "max_pool-3/2-SAME-27x15-ties", "dense-5x13")
MOST = 8


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    yield
    jax.clear_caches()


def mesh_of(shape: tuple[int, ...], kind: str) -> Mesh:
    """A mesh of permuted devices with names of its own."""
    devices = jax.devices()
    if len(devices) < math.prod(shape):
        pytest.skip(f"needs {math.prod(shape)} devices")
    chosen = np.random.default_rng(SEED).permutation(np.array(devices, dtype=object))
    names = ("rows", "columns", "boards")[: len(shape)]
    types = (getattr(AxisType, kind),) * len(shape)
    return Mesh(chosen[: math.prod(shape)].reshape(shape), names, axis_types=types)


def check(case: Case, shape: tuple[int, ...], kind: str, most: int | None) -> None:
    print(f"repeat with {SEED_VARIABLE}={SEED}")
    mesh = mesh_of(shape, kind)
    orders = list(itertools.permutations(mesh.axis_names))
    report = sweep(case, mesh, SEED, orders=orders, most=most)
    assert any(reorders(choice, mesh.axis_names) for choice in report.checked)
    assert not report.wrong, str(report)


def chosen(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


PLACES = list(itertools.product(TWELVE if INSIDE else SHAPES, KINDS))


@pytest.mark.parametrize("place", drawn(PLACES, 0.5))
@pytest.mark.parametrize("name", FAST)
def test_meshes(name: str, place: tuple[tuple[int, ...], str]) -> None:
    check(chosen(name), *place, MOST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", TWELVE if INSIDE else SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_meshes_every_case(case: Case, shape: tuple[int, ...], kind: str) -> None:
    check(case, shape, kind, 64)


def on_twelve_devices(test: str, marks: str, count: int) -> None:
    """Run a test of this file in a process that simulates twelve devices; all of it passes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-m", marks, f"{__file__}::{test}"],
        env={**os.environ, "JAXLWP_TEST_DEVICES": "12", SEED_VARIABLE: str(SEED)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{count} passed" in done.stdout


if not INSIDE:

    def test_twelve_devices() -> None:
        half = len(TWELVE) * len(KINDS) // 2
        on_twelve_devices("test_meshes", "not slow", len(FAST) * half)

    @pytest.mark.slow
    def test_twelve_devices_every_place() -> None:
        on_twelve_devices("test_meshes", "", len(FAST) * len(TWELVE) * len(KINDS))

    @pytest.mark.slow
    def test_twelve_devices_every_case() -> None:
        on_twelve_devices("test_meshes_every_case", "", len(CASES) * len(TWELVE) * len(KINDS))
