"""Strategies side by side by forecasts of compiled programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import jaxlwp
from jaxlwp.check import (
    CompiledComparison,
    CompiledStrategy,
    _compiled,
    compare_compiled,
    forecast,
    target_mesh,
)
from jaxlwp.check._compiled import PLAIN, REPLICATED
from jaxlwp.cli import main
from jaxlwp.devices import preset
from tests.test_target import _arguments, _cnn, gpu_aot

STEP = (Path(__file__).parent / "data" / "two_layers.hlo").read_text()
SYSTEM = preset("dgx-h200")


def result(strategy: str, seconds: float, memory_bytes: int = 10) -> CompiledStrategy:
    """A strategy whose step takes so long, and so much memory."""
    found = forecast(STEP, SYSTEM)
    memory = jaxlwp.plan.ProgramMemory(
        argument_bytes=memory_bytes, temporary_bytes=0, new_bytes=0, peak_bytes=memory_bytes
    )
    predicted_s = None if strategy == PLAIN else seconds
    found = dataclasses.replace(found, total_s=seconds, memory=memory)
    return CompiledStrategy(strategy=strategy, predicted_s=predicted_s, forecast=found)


def comparison(*results: CompiledStrategy, memory_bytes: float = 100) -> CompiledComparison:
    return CompiledComparison(
        model="step",
        system=SYSTEM.name,
        num_devices=8,
        results=results,
        memory_bytes=memory_bytes,
    )


def test_the_fastest_plan_that_fits_is_kept() -> None:
    found, data = result("search", 3.0), result("data", 2.0)
    plain, large = result(PLAIN, 1.0), result("owt", 1.0, memory_bytes=101)
    assert comparison(found, data).best is data
    assert comparison(found, data, plain).best is data
    assert comparison(found, large).best is found
    assert comparison(found, large, memory_bytes=101).best is large
    assert comparison(large).best is large  # nothing fits: what was asked for


def test_as_text_and_json() -> None:
    every = comparison(result("search", 3e-3), result("owt", 2e-3, 101), result(PLAIN, 6e-3))
    text = str(every)
    assert "2.00x" in text and "3.00x" in text and "101 B *" in text
    content = json.loads(every.to_json())
    assert [r["strategy"] for r in content["results"]] == ["search", "owt", PLAIN]
    assert [r["fits"] for r in content["results"]] == [True, False, True]
    assert content["results"][2]["predicted_s"] is None
    assert content["results"][0]["kernels"] == forecast(STEP, SYSTEM).num_kernels


def test_what_the_compiler_refuses_is_named() -> None:
    """In the table and in JSON; plain JAX, which may be all that is left, is no plan."""
    plain, data = result(PLAIN, 1.0), result("data", 2.0)
    every = dataclasses.replace(comparison(plain, data), refused={"owt": "INTERNAL: no tiles"})
    assert every.best is data
    assert "owt: not compiled, INTERNAL: no tiles" in " ".join(str(every).split())
    assert json.loads(every.to_json())["refused"] == {"owt": "INTERNAL: no tiles"}


def test_processors_are_refused() -> None:
    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(x @ params)

    shapes = jnp.ones((4, 4)), jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r'check: "compile" forecasts programs of GPUs, and the'):
        jaxlwp.parallelize(loss, *shapes, devices=2, rates="h200", check="compile")
    with pytest.raises(ValueError, match="none of the GPUs with published rates"):
        jaxlwp.parallelize(
            loss,
            *shapes,
            devices=2,
            rates=jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e12),
            check="compile",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "h201:8"], "'h201:8' is not GPU:COUNT"),
        (["--target", "h200:8", "--devices", "8"], "--devices: 8 given beside --target"),
        (["--target", "h201:8", "--rates", "h200"], "'h201:8' is not GPU:COUNT"),
        (["--target", "h200:9", "--rates", "dgx-h200"], "9"),
        (
            ["--target", "h200:8", "--flops", "1", "--memory-bandwidth", "1", "--latency", "1"]
            + ["--bandwidth", "1"],
            "--flops: rates by hand given beside --target",
        ),
    ],
)
def test_command_says_what_is_wrong(options: list[str], message: str) -> None:
    run = CliRunner().invoke(main, ["compare", "models.lenet:LeNet5", *options])
    assert run.exit_code != 0
    assert message in run.output and "Traceback" not in run.output


# --- with the compiler -----------------------------------------------------------------------


def _aot(test: Any) -> Any:
    for mark in gpu_aot:
        test = mark(test)
    return test


@_aot
def test_the_page_compares_for_gpus_that_are_not_there() -> None:
    """The second program of docs/forecast.md, for two GPUs."""
    page = (Path(__file__).parent.parent / "docs" / "forecast.md").read_text()
    program = page.split("```python\n")[2].split("```")[0].replace("h200:8", "h200:2")
    params, *batch = _arguments()
    names: dict[str, Any] = {"jaxlwp": jaxlwp, "loss_fn": _cnn, "params": params, "batch": batch}
    exec(compile(program, "forecast.md", "exec"), names)
    checked = names["plan"].checked
    assert PLAIN in checked and names["plan"].mesh.size == 2
    assert checked[names["plan"].strategy.name] == min(
        seconds for name, seconds in checked.items() if name != PLAIN
    )


@_aot
def test_compared_for_gpus_that_are_not_there() -> None:
    found = compare_compiled(_cnn, *_arguments(), target="h200:4")
    names = [each.strategy for each in found.results]
    assert names[0] == "search" and {"data", "owt", REPLICATED, PLAIN} <= set(names)
    data, plain = found.result("data"), found.result(PLAIN)
    assert sum(t.num_bytes for t in data.forecast.collectives.values()) == sum(
        t.num_bytes for t in plain.forecast.collectives.values()
    )
    assert not found.result(REPLICATED).forecast.collectives
    assert found.best.forecast_s == min(
        each.forecast_s for each in found.results if each.strategy != PLAIN
    )


@_aot
def test_what_is_returned_is_forecast_to_be_fastest() -> None:
    """Over links so fast that all is split, and so slow that nothing should be."""
    for start_s in (0.0, 1.0):
        level = dataclasses.replace(SYSTEM.inside, devices=4, start_s=start_s)
        system = dataclasses.replace(SYSTEM, inside=level, across=None)
        plan = jaxlwp.parallelize(
            _cnn,
            *_arguments(),
            mesh=target_mesh("h200:4"),
            rates=system,
            strategy="data",
            check="compile",
        )
        assert plan.checked_by == "forecast" and PLAIN in plan.checked
        least_s = min(s for name, s in plan.checked.items() if name != PLAIN)
        assert plan.checked[plan.strategy.name] == least_s
        assert (plan.strategy.name == REPLICATED) == (start_s == 1.0)
        assert "forecast steps:" in str(plan)


@_aot
def test_plans_that_the_compiler_refuses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others take is compared all the same; an error if no plan is left."""
    found = compare_compiled(_cnn, *_arguments(), target="h200:2", strategies=("data", "model"))
    assert not found.refused
    compiled, count = _compiled.compiled, 0

    def refusing(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count in refuses:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes\nat ...")
        return compiled(*given)

    monkeypatch.setattr(_compiled, "compiled", refusing)
    refuses = {1}  # the strategy found
    with pytest.warns(UserWarning, match="refuses to compile search, which is left out: INTERNAL"):
        plan = jaxlwp.parallelize(_cnn, *_arguments(), devices="h200:2", check="compile")
    assert "search" not in plan.checked and plan.strategy.name in plan.checked
    refuses = set(range(count + 1, count + 10))
    with pytest.raises(RuntimeError, match="refuses to compile every plan, search for instance"):
        jaxlwp.parallelize(_cnn, *_arguments(), devices="h200:2", check="compile")


@_aot
def test_a_system_by_name_is_compiled_for_too() -> None:
    plan = jaxlwp.parallelize(_cnn, *_arguments(), devices="h200:2", check="compile")
    assert plan.checked_by == "forecast" and PLAIN in plan.checked
    assert plan.mesh.size == 2
    assert all("H200" in device.device_kind for device in plan.mesh.devices.flat)
