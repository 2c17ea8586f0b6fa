"""Comparison in Python: what is measured and counted, and how it is told."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlwp import BASELINES, Rates, parallelize
from jaxlwp.check import _compare, _steps
from jaxlwp.check._compare import Comparison, StrategyResult, compare
from jaxlwp.devices import device_graph, make_mesh
from jaxlwp.solver._tables import Cost

RATES = Rates(flops_per_s=1e9, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,))


def _loss(params: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = jax.nn.relu(x @ params["first"]) @ params["second"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.square(losses).mean()


def _arguments(batch: int) -> tuple[Any, jax.Array, jax.Array]:
    params = {"first": jnp.full((6, 8), 0.1), "second": jnp.full((8, 4), 0.1)}
    return params, jnp.ones((batch, 6)), jnp.zeros((batch,), jnp.int32)


@pytest.mark.parametrize("free", [1e12, 0.0], ids=["states stay", "states take turns"])
def test_every_strategy_is_measured_in_every_round(
    free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    monkeypatch.setattr(_steps, "_free_bytes", lambda plan: free)
    told: dict[str, list[tuple[int, int]]] = {}
    params, x, labels = _arguments(8)

    result = compare(
        _loss, params, x, labels,
        devices=4, rounds=3, rates=RATES, name="tiny",
        on_progress=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )  # fmt: skip

    assert [r.strategy for r in result.results] == ["search", *BASELINES]
    assert (result.model, result.batch, result.devices.num_devices) == ("tiny", 8, 4)
    assert result.machine["simulated"] == (jax.devices()[0].platform == "cpu")
    assert result.speedup("data") == 1.0
    for each in result.results:
        assert len(each.times_s) == 3
        assert min(each.times_s) <= each.measured_s <= max(each.times_s)
        assert each.argument_bytes > 0
        assert each.peak_bytes > 0
        # The loss function's second output is computed too, and the optimizer adds nothing.
        assert each.compiled_bytes_by_kind == each.predicted_bytes_by_kind
    fastest = min(result.results, key=lambda each: each.predicted_s)
    assert result.result("search").predicted_s == fastest.predicted_s
    assert all(steps == sorted(steps) for steps in told.values())
    assert all(steps[-1][0] == steps[-1][1] for steps in told.values())
    assert jnp.sum(params["first"]) > 0  # the arguments are still there


def test_what_does_not_fit_is_not_run_but_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device's memory one byte less is left than data parallelism is predicted to need."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    arguments = _arguments(8)
    given: dict[str, Any] = {"devices": 4, "rates": RATES}
    plan = parallelize(_loss, *arguments, strategy="data", **given)
    needed_bytes = plan.memory.peak_bytes
    monkeypatch.setattr(_compare, "accelerator_bytes", lambda devices: needed_bytes - 1.0)

    result = compare(_loss, *arguments, strategies=("data",), rounds=1, **given)

    assert [each.strategy for each in result.results] == ["search"]
    assert result.left_out == {"data": needed_bytes}
    assert result.speedup("search") is None
    assert "data: not run, predicted to need" in str(result)
    told = json.loads(result.to_json())
    assert told["left_out"] == {"data": needed_bytes}
    assert told["results"][0]["speedup"] is None

    monkeypatch.setattr(_compare, "accelerator_bytes", lambda devices: float(needed_bytes))
    result = compare(_loss, *arguments, strategies=("data",), rounds=1, **given)
    assert [each.strategy for each in result.results] == ["search", "data"]
    assert result.left_out == {}


def test_a_memory_limit_holds_for_all() -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    params = {"first": jnp.full((600, 800), 0.1), "second": jnp.full((800, 400), 0.1)}
    arguments = (params, jnp.ones((8, 600)), jnp.zeros((8,), jnp.int32))
    given: dict[str, Any] = {"devices": 4, "rates": RATES}
    plan = parallelize(_loss, *arguments, strategy="data", **given)
    limit_bytes = 0.8 * plan.memory.peak_bytes

    result = compare(
        _loss, *arguments, strategies=("data", "model"), rounds=1, memory_bytes=limit_bytes, **given
    )

    assert [each.strategy for each in result.results] == ["search", "model"]
    assert result.left_out == {"data": plan.memory.peak_bytes}
    assert all(each.peak_bytes <= limit_bytes for each in result.results)


def test_small_states_stay_on_the_devices() -> None:
    memories = [
        _steps.ProgramMemory(
            argument_bytes=size, temporary_bytes=50, new_bytes=0, peak_bytes=size + 50
        )
        for size in (300, 100, 200)
    ]
    assert _steps._staying(memories, 350.0 + 100 + 200 + 300) == {0, 1, 2}
    assert _steps._staying(memories, 350.0 + 100 + 200) == {1, 2}
    assert _steps._staying(memories, 350.0) == set()


def test_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds is 0; give at least 1"):
        compare(_loss, *_arguments(8), rounds=0, rates=RATES)


def test_data_parallelism_needs_an_even_batch() -> None:
    with pytest.raises(ValueError, match="batch of 7, which 2 devices do not divide"):
        compare(_loss, *_arguments(7), devices=2, rounds=1, rates=RATES)


# --- telling -------------------------------------------------------------------------------------


def _result(strategy: str, times_s: tuple[float, ...]) -> StrategyResult:
    return StrategyResult(
        strategy=strategy,
        predicted=Cost(compute_s=0.25, transfer_s=0.5, sync_s=0.125),
        times_s=times_s,
        predicted_bytes_by_kind={"all-reduce": 1000, "all-gather": 24},
        compiled_bytes_by_kind={"all-gather": 24, "all-reduce": 1000},
        argument_bytes=100,
        temporary_bytes=20,
        peak_bytes=150,
    )


def _comparison() -> Comparison:
    mesh = make_mesh(jax.devices()[:1])
    return Comparison(
        model="net",
        batch=32,
        devices=device_graph(mesh, rates=RATES),
        machine={"simulated": True, "cpu_count": 3},
        versions={},
        date="2025-01-01T00:00:00+00:00",
        results=(_result("search", (0.5, 0.25, 1.0)), _result("data", (1.0, 0.75, 2.0))),
    )


def test_json() -> None:
    data = json.loads(_comparison().to_json())
    assert (data["model"], data["batch"], data["devices"], data["rounds"]) == ("net", 32, 1, 3)
    first = data["results"][0]
    assert first["strategy"] == "search"
    assert first["predicted_s"] == 0.875
    assert first["measured_s"] == 0.5
    assert (first["measured_min_s"], first["measured_max_s"]) == (0.25, 1.0)
    assert first["speedup"] == 2.0
    assert first["predicted_bytes"] == first["compiled_bytes"] == 1024
    assert first["peak_bytes"] == 150


def test_text() -> None:
    text = str(_comparison())
    assert "net, batch 32" in text
    assert "simulated on 3 processor cores" in text
    assert "250..1,000" in text
    assert "2.00x" in text
    assert "*" not in text


def test_text_tells_bytes_that_differ() -> None:
    comparison = _comparison()
    odd = dataclasses.replace(
        comparison.results[0], compiled_bytes_by_kind={"all-reduce": 1004, "all-gather": 24}
    )
    text = str(dataclasses.replace(comparison, results=(odd, comparison.results[1])))
    assert "* search: all-reduce 1,000 B predicted, 1,004 B compiled" in text
    assert "* data" not in text
