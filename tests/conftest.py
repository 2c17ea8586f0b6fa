"""Eight simulated CPU devices for every test, and small meshes over them.

The environment is set at import time because JAX reads it once, when it is first imported.
JAXLWP_TEST_PLATFORM (say "cuda") runs the tests on another platform, JAXLWP_TEST_DEVICES on another
number of simulated devices.
"""

import gc
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import xla_flags

_PLATFORM = os.environ.get("JAXLWP_TEST_PLATFORM", "cpu")
_COUNT = int(os.environ.get("JAXLWP_TEST_DEVICES", "8"))
os.environ["XLA_FLAGS"] = xla_flags.simulated(
    _COUNT, os.environ.get("XLA_FLAGS", ""), fast=_PLATFORM == "cpu"
)
os.environ["JAX_PLATFORMS"] = _PLATFORM
# Drawn here, so that all workers of a run draw the same cases.
os.environ.setdefault("JAXLWP_SWEEP_SEED", str(random.SystemRandom().randrange(2**31)))
# A program out of another run's cache would be tested instead of the one just compiled.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

# Tracing makes many small objects and little garbage: looking for it took a fifth of the suite.
gc.set_threshold(200_000, 20, 100)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

import jaxlwp  # noqa: E402
from jaxlwp.devices import Measurement, _rates  # noqa: E402
from jaxlwp.measure import _timer as _measure  # noqa: E402
from jaxlwp.measure._local import LocalStep  # noqa: E402

# No test fails because the machine is slow, or busy with something else.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")


def _mesh(*axis_names: str) -> Mesh:
    shape = (2,) * len(axis_names)
    devices = jax.devices()
    if len(devices) < 2 ** len(shape):
        pytest.skip(f"needs {2 ** len(shape)} devices, {devices[0].platform} has {len(devices)}")
    return Mesh(np.array(devices[: 2 ** len(shape)]).reshape(shape), axis_names)


@pytest.fixture(scope="session")
def mesh22() -> Mesh:
    """Four devices as 2x2, axes "a" and "b"."""
    return _mesh("a", "b")


@pytest.fixture(scope="session")
def mesh222() -> Mesh:
    """Eight devices as 2x2x2, axes "a", "b" and "c"."""
    return _mesh("a", "b", "c")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests recorded: bytes of collectives, predicted and compiled."""
    tables = {
        "bytes": f"{'model':22}{'strategy':10}{'predicted':>12}{'compiled':>12}{'off by':>9}",
        "gathers": f"{'program':34}{'':20}{'jaxlwp':>12}{'without':>14}",
    }
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    properties = [pair for r in reports if r.when == "call" for pair in r.user_properties]
    for table, head in tables.items():
        rows = sorted(str(value) for key, value in properties if key == table)
        if rows:
            terminalreporter.section("bytes per device")
            for row in (head, *rows):
                terminalreporter.line(row)


@pytest.fixture
def quick_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rates and layer times from formulas, where a test is not about measuring."""
    rates = jaxlwp.Rates(
        flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
    )

    def times(steps: Sequence[LocalStep], *_: Any) -> list[Measurement]:
        sizes = [sum(math.prod(v.shape) * v.itemsize for v in step.operands) for step in steps]
        return [Measurement(seconds=1e-9 * num_bytes) for num_bytes in sizes]

    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_rates, "measure", lambda mesh: _rates.device_graph(mesh, rates=rates))
    monkeypatch.setattr(_measure, "time_together", times)
