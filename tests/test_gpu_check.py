"""The GPU check, tried without a GPU: tiny sizes, and ceilings fitted to times made up for it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlwp.devices import Gpu, preset
from tests.benchmarks import gpu_check
from tests.benchmarks.on_gpu.fit import Timed, fit, fitted_gpu
from tests.benchmarks.on_gpu.part import Part

ROOT = Path(__file__).parents[1]
SYSTEM = preset("h200", gpus=1)


def run_part(name: str, out: Path, content: dict[str, Any]) -> Any:
    """One part in this process, with all the time that it wants; what it has left."""
    gpu_check.write(out, content)
    part = Part(name=name, out=out, until=time.time() + 3600, system=SYSTEM, small=True)
    importlib.import_module(f"tests.benchmarks.on_gpu.{name}").run(part)
    found = gpu_check.read(out)
    assert content.items() <= found.items()
    return found[name]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLWP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "check.json"


def test_correctness(out: Path) -> None:
    rows = run_part("correctness", out, {"date": "today"})
    assert {(row["dtype"], row["sum_dtype"]) for row in rows} >= {
        ("float32", None),
        ("float32", "float32"),
        ("bfloat16", "float32"),
    }
    for row in rows:
        assert row["passed"], row


def test_ceilings(out: Path) -> None:
    found = run_part("ceilings", out, {})
    assert not found["failed"]
    assert {row["group"] for row in found["rows"]} >= {"start", "memory", "arithmetic"}
    assert set(found["preset"]) >= set(found["fitted"])
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["kernels"] > 0 and row["forecast_s"] > 0


def test_steps(out: Path) -> None:
    rows = run_part("steps", out, {"ceilings": {"fitted": {"kernel_s": 1e-6}}})
    assert [row["dtype"] for row in rows] == ["bfloat16", "float32"]
    for row in rows:
        assert "error" not in row, row
        for side in ("plain", "ours"):
            each = row["forecasts"][side]
            assert row["measured_s"][side] > 0
            assert each["kernels"] == sum(kind["count"] for kind in each["by_kind"].values())
            # 1 us a kernel in place of the preset's 2.5.
            gained_s = each["preset"]["seconds"] - each["fitted"]["seconds"]
            assert gained_s == pytest.approx(each["kernels"] * 1.5e-6)
        assert row["ratio"] > 0 and row["priced_s"] > 0


def test_layers(out: Path) -> None:
    found = run_part("layers", out, {})
    assert len(found["rows"]) == 4
    for row in found["rows"].values():
        assert row["measured"] == row["of"] > 0
        assert row["data_compute_s"] > 0
    assert found["profile"]["environments"]


def timed(name: str, gpu: Gpu, *, copy_bytes: int = 0, **row: Any) -> Timed:
    """A program of which every kernel takes what a GPU's figures say."""
    made = Timed(name=name, seconds=0.0, copy_bytes=copy_bytes, **row)
    share = gpu.vector_share if made.dtype == "float32" else gpu.tensor_share
    share *= gpu.winograd if made.winograd and made.dtype == "float32" else 1.0
    peak = gpu.peak_flops_per_s.get(made.dtype, 1.0)
    moved_s = (made.num_bytes - copy_bytes) / gpu.memory_bytes_per_s
    seconds = max(moved_s, made.flops / peak / share) + copy_bytes / gpu.memory_bytes_per_s
    return dataclasses.replace(made, seconds=seconds + made.kernels * gpu.kernel_s)


def test_fit_finds_the_figures_that_times_are_made_of() -> None:
    truth = dataclasses.replace(
        SYSTEM.gpu, kernel_s=1.7e-6, memory_share=0.9, tensor_share=0.6, vector_share=0.7,
        winograd=2.0,
    )  # fmt: skip
    rows = [
        timed("short", truth, group="start", kernels=32, num_bytes=0),
        timed("long", truth, group="start", kernels=512, num_bytes=0),
        timed("large", truth, group="memory", kernels=4, num_bytes=1 << 32),
        # Caches: much faster than memory, and no ceiling of it.
        Timed(name="small", group="memory", kernels=64, num_bytes=1 << 27, seconds=2e-4),
    ]
    for dtype in ("bfloat16", "tensorfloat32", "float32"):
        for winograd in (False, True):
            rows.append(
                timed(
                    f"{dtype} {winograd}",
                    truth,
                    group="arithmetic",
                    kernels=12,
                    copies=6,
                    copy_bytes=1 << 20,
                    num_bytes=1 << 24,
                    flops=1e12,
                    dtype=dtype,
                    winograd=winograd,
                )  # fmt: skip
            )
    # Bound by memory, so it tells nothing of arithmetic.
    rows.append(
        timed(
            "1x1",
            truth,
            group="arithmetic",
            kernels=1,
            num_bytes=1 << 32,
            flops=1e10,
            dtype="bfloat16",
        )  # fmt: skip
    )
    found = fit(rows, SYSTEM.gpu)
    for name, value in found.items():
        assert value == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert len(found) == 5
    fitted = fitted_gpu(SYSTEM.gpu, found)
    assert fitted.flops_per_s("bfloat16") == pytest.approx(truth.flops_per_s("bfloat16"), rel=1e-3)


def test_nothing_timed_tells_nothing() -> None:
    assert fit([], SYSTEM.gpu) == {}
    assert fitted_gpu(SYSTEM.gpu, {}) == SYSTEM.gpu
    # Faster than the peak, as in caches: a share is at most 1.
    assert fitted_gpu(SYSTEM.gpu, {"memory_share": 1.2}).memory_share == 1.0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--small", *arguments]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_a_part_that_takes_too_long_costs_itself_alone(out: Path) -> None:
    # Less time than it takes to start.
    done = command("--parts", "layers", "--minutes", "0.005", "--out", str(out))
    assert done.returncode == 1, done.stderr
    content = json.loads(out.read_text())
    assert content["parts"]["layers"]["state"] == "cut off"
    assert content["versions"]["jax"] and content["date"]
    assert "cut off" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_part_in_a_process_of_its_own(out: Path) -> None:
    done = command("--parts", "ceilings", "--minutes", "60", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["parts"]["ceilings"]["state"] == "done"
    assert content["device"]["platform"] == "cpu"
    assert content["ceilings"]["rows"]
    assert "programs" in done.stdout
