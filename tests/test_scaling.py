"""Studies of systems that are not at hand: scaling, thresholds, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import jaxlwp
from jaxlwp.cli import main
from jaxlwp.devices import preset
from jaxlwp.simulate import batch_threshold, link_threshold, scaling


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    """A convolution and two dense layers, the first of them large."""
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jax.nn.relu(h).reshape(x.shape[0], -1)
    h = jax.nn.relu(h @ params["wide"])
    return jnp.mean((h @ params["out"] - y) ** 2)


def workload(batch: int) -> tuple[Any, Any, tuple[Any, ...]]:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"conv": array(3, 3, 3, 64), "wide": array(16384, 1024), "out": array(1024, 4)}
    return loss_fn, params, (array(batch, 16, 16, 3), array(batch, 4))


def systems(*hosts: int) -> list[Any]:
    return [preset("dgx-a100", hosts=count, gpus=4) for count in hosts]


def test_strategies_asked_for() -> None:
    study = scaling(workload, systems(1), batch=64, strategies=("data",))
    assert [each.strategy for each in study.points[0].outcomes] == ["found", "data"]


@pytest.mark.parametrize("weak", [True, False])
def test_points_are_those_of_plans(weak: bool) -> None:
    study = scaling(workload, systems(1, 2), batch=64, weak=weak)
    assert [point.batch for point in study.points] == ([256, 512] if weak else [64, 64])
    for point in study.points:
        fn, params, batch = workload(point.batch)
        plan = jaxlwp.parallelize(fn, params, *batch, devices=f"dgx-a100:{point.hosts}x4")
        found = point.outcome("found")
        assert math.isclose(found.step_s, plan.cost.total_s)
        assert found.memory_bytes == plan.memory.peak_bytes and found.fits
        assert found.sent_bytes == sum(c.num_bytes for c in plan.collectives)
        assert math.isclose(found.examples_per_s, point.batch / found.step_s)
        assert found.step_s == min(each.step_s for each in point.outcomes)
        alone = jaxlwp.parallelize(fn, params, *workload(64)[2], devices="dgx-a100:1x1")
        assert math.isclose(study.one_s, alone.cost.total_s)
        ideal = point.devices * 64 / alone.cost.total_s
        assert math.isclose(found.efficiency, found.examples_per_s / ideal)
        hours = study.gpu_hours(point, 1e6)
        assert math.isclose(hours, 1e6 / point.batch * found.step_s * point.devices / 3600)
    content = json.loads(study.to_json())
    assert content["scaling"] == ("weak" if weak else "strong")
    assert [p["devices"] for p in content["points"]] == [4, 8]
    assert content["points"][0]["outcomes"][0]["strategy"] == "found"
    assert "found" in str(study) and "owt" in str(study)


def test_a_baseline_that_does_not_apply_is_left_out() -> None:
    study = scaling(workload, systems(1), batch=3, weak=False)
    names = [each.strategy for each in study.points[0].outcomes]
    assert names[0] == "found" and "data" not in names


def test_what_does_not_fit_says_so() -> None:
    """More activations than a GPU has memory for, by any strategy."""
    study = scaling(workload, systems(1), batch=2_000_000)
    assert not any(each.fits for each in study.points[0].outcomes)
    assert "*" in str(study)


def test_data_parallelism_is_as_good_from_the_threshold_on() -> None:
    system = preset("dgx-a100", hosts=2, gpus=2)
    threshold = link_threshold(workload, system, batch=256, factors=(1 / 64, 1, 64, 4096))
    assert threshold.now == system.across.rate(2)  # type: ignore[union-attr]
    values = [sample.value for sample in threshold.samples]
    assert values == sorted(values)
    gains = [sample.gain for sample in threshold.samples]
    assert all(gain >= -1e-9 for gain in gains)
    assert gains[0] > 0.01  # a large dense layer over slow links
    below = [s for s in threshold.samples if threshold.value is None or s.value < threshold.value]
    assert below and below[-1].gain > 0.01
    at_or_above = [s for s in threshold.samples if s not in below]
    assert all(sample.gain <= 0.01 for sample in at_or_above)
    assert "GB/s of a GPU" in str(threshold)


def test_a_sample_is_the_plan_of_such_links() -> None:
    system = preset("dgx-a100", hosts=2, gpus=2)
    threshold = link_threshold(workload, system, batch=256, factors=(0.5,))
    across = dataclasses.replace(system.across, bytes_per_s=0.5 * system.across.rate(2))  # type: ignore[type-var, union-attr]
    slow = dataclasses.replace(system, across=across)
    fn, params, batch = workload(256)
    plan = jaxlwp.parallelize(fn, params, *batch, devices=slow)
    assert math.isclose(threshold.samples[0].found_s, plan.cost.total_s)


def test_more_examples_of_a_gpu_favour_data_parallelism() -> None:
    threshold = batch_threshold(workload, preset("dgx-a100", gpus=4), batches=(1, 64, 65536))
    gains = [sample.gain for sample in threshold.samples]
    assert gains == sorted(gains, reverse=True)
    assert threshold.value in (None, 1, 64, 65536)
    assert "examples of a GPU" in str(threshold)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: scaling(workload, [], batch=8), "no systems"),
        (lambda: scaling(workload, [preset("h100"), preset("a100")], batch=8), "one GPU model"),
        (lambda: scaling(workload, systems(1), batch=0), "batch: 0"),
        (lambda: scaling(workload, systems(1), batch=8, strategies=("dat",)), "dat given"),
        (lambda: link_threshold(workload, preset("a100", gpus=1), batch=8), "no links"),
        (lambda: batch_threshold(workload, preset("a100", gpus=2), against="best"), "'best'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        make()
    assert "\n" not in str(raised.value)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["simulate", *arguments])


def test_command(tmp_path: Path) -> None:
    lenet = "models.lenet:LeNet5"
    file = tmp_path / "lenet.json"
    options = ("--batch", "8", "--examples", "1e6", "--dtype", "bfloat16", "--json", str(file))
    done = run(lenet, "--system", "dgx-h100", "--gpus", "2,4", *options)
    assert done.exit_code == 0, done.output
    assert "weak scaling" in done.output and "GPU-hours" in done.output
    assert [p["batch"] for p in json.loads(file.read_text())["points"]] == [16, 32]
    strong = run(lenet, "--system", "h100", "--gpus", "1,2", "--total", "64")
    assert strong.exit_code == 0, strong.output
    assert "strong scaling" in strong.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--system", "dgx-9"], "unknown"),
        (["--system", "h100", "--hosts", "1,x"], "--hosts: '1,x'"),
        (["--system", "h100", "--hosts", "0"], "--hosts: '0'"),
        (["--system", "h100", "--gpus", "12"], "do not fill"),
        (["--system", "h100", "--gpus", "2", "--hosts", "2"], "one of both"),
        (["--system", "h100", "--batch", "2", "--total", "2"], "--total: 2"),
        (["--system", "h100", "--dtype", "int8"], "not floating-point"),
        (["--system", "h100", "--dtype", "half-ish"], "--dtype"),
        (["--system", "h100", "--json", "/nowhere/at/all.json"], "cannot write"),
    ],
)
def test_errors_are_one_line(options: list[str], says: str) -> None:
    done = run("models.lenet:LeNet5", *options)
    assert done.exit_code != 0 and says in done.output
    assert len(done.output.strip().splitlines()) == 1 and "Traceback" not in done.output
