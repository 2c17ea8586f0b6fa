"""Verification: what was priced beside what runs; a wrong price must show."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlwp
from jaxlwp.cost import _collectives

RATES = jaxlwp.Rates(flops_per_s=1e11, memory_bytes_per_s=1e10)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n, features in enumerate((8, 8)):
            x = nn.relu(nn.Conv(features, (3, 3), name=f"conv{n}")(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        return nn.Dense(8, name="dense")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def arguments() -> tuple[Any, Any]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12, 12, 4)), jnp.float32)
    return Network().init(jax.random.key(0), x), x


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(Network().apply(params, x) ** 2)


def plan(arguments: tuple[Any, Any], strategy: str) -> jaxlwp.Plan:
    return jaxlwp.parallelize(loss, *arguments, devices=8, strategy=strategy, rates=RATES)


@pytest.mark.parametrize("strategy", ["search", "data", "model", "owt", "spatial"])
def test_every_layer_does_what_was_priced(arguments: tuple[Any, Any], strategy: str) -> None:
    made = plan(arguments, strategy)
    check = jaxlwp.verify(made)
    assert not check.disagreeing, str(check)
    assert check.predicted_bytes_by_kind == check.compiled_bytes_by_kind
    total = sum(sum(layer.program.values()) for layer in check.layers)
    assert total == sum(check.compiled_bytes_by_kind.values())
    assert check.bytes_error == 0
    assert check.measured_s is None
    assert check.compiled_memory_bytes > 0


def test_axes_are_named(arguments: tuple[Any, Any]) -> None:
    check = jaxlwp.verify(plan(arguments, "spatial"))
    halos = [
        axes
        for layer in check.layers
        for kind, axes in layer.program
        if kind == "collective-permute"
    ]
    assert halos
    assert all(set(axes) <= {"device0", "device1", "device2"} for axes in halos)


def test_a_wrong_price_shows(arguments: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(arguments, "spatial")
    right = _collectives.step_collectives

    def wrong(step: Any, cotangents: Any) -> Any:
        for each in right(step, cotangents):
            yield dataclasses.replace(each, num_bytes=each.num_bytes + 4)

    monkeypatch.setattr(_collectives, "step_collectives", wrong)
    check = jaxlwp.verify(made)
    assert {layer.name for layer in check.disagreeing} >= {"conv0", "conv1"}
    assert check.bytes_error > 0
    assert "differs from what was priced" in str(check)


def test_the_step_is_run(arguments: tuple[Any, Any]) -> None:
    check = jaxlwp.verify(plan(arguments, "data"), *arguments)
    assert check.measured_s is not None
    assert check.measured_s > 0
    assert "measured" in str(check)


def test_a_target_is_not_run(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="leave one of the two out"):
        jaxlwp.verify(plan(arguments, "data"), *arguments, target="h200:8")


class TestCheck:
    def test_the_faster_is_kept(
        self, arguments: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from jaxlwp.check import _compare

        for times, kept in (([[3.0], [1.0]], "data"), ([[1.0], [3.0]], "search")):
            monkeypatch.setattr(_compare, "measured_steps", lambda *_, t=times: t)
            made = jaxlwp.parallelize(loss, *arguments, devices=8, rates=RATES, check="measure")
            assert made.strategy.name == kept
            assert made.checked == {"search": times[0][0], "data": times[1][0]}
            assert f"kept: {kept}" in repr(made)

    def test_steps_are_run(self, arguments: tuple[Any, Any]) -> None:
        made = jaxlwp.parallelize(loss, *arguments, devices=4, rates=RATES, check="measure")
        assert made.checked[made.strategy.name] == min(made.checked.values()) > 0

    def test_other_baselines_are_run_on_request(self, arguments: tuple[Any, Any]) -> None:
        made = jaxlwp.parallelize(
            loss, *arguments, devices=4, rates=RATES, check=("spatial", "model")
        )
        assert set(made.checked) == {"search", "data", "spatial", "model"}
        assert made.checked[made.strategy.name] == min(made.checked.values()) > 0

    def test_a_memory_limit_is_kept(
        self, arguments: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Data parallelism would be faster, and needs more than is allowed."""
        from jaxlwp.check import _compare

        monkeypatch.setattr(
            _compare, "measured_steps", lambda steps, *_: [[3.0], [1.0]][: len(steps)]
        )
        given = {"devices": 8, "rates": RATES, "check": "measure"}
        needed_bytes = 1.15 * plan(arguments, "data").memory.peak_bytes
        made = jaxlwp.parallelize(loss, *arguments, memory_bytes=needed_bytes - 1, **given)
        assert made.checked == {"search": 3.0, "data": math.inf}
        assert "data needs more memory; kept: search" in repr(made)
        made = jaxlwp.parallelize(loss, *arguments, memory_bytes=needed_bytes + 1, **given)
        assert made.checked == {"search": 3.0, "data": 1.0}
        assert made.strategy.name == "data"

    def test_what_does_not_fit_into_the_device_is_not_run(
        self, arguments: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from jaxlwp.check import _compare

        needed_bytes = plan(arguments, "data").memory.peak_bytes
        for free_bytes in (needed_bytes - 1, needed_bytes):
            monkeypatch.setattr(_compare, "accelerator_bytes", lambda devices, b=free_bytes: b)
            made = jaxlwp.parallelize(loss, *arguments, devices=8, rates=RATES, check="measure")
            assert math.isfinite(made.checked["data"]) == (free_bytes == needed_bytes)
            assert math.isfinite(made.checked["search"])

    def test_shapes_cannot_be_run(self, arguments: tuple[Any, Any]) -> None:
        shapes = jax.eval_shape(lambda *a: a, *arguments)
        with pytest.raises(ValueError, match="pass arrays"):
            jaxlwp.parallelize(loss, *shapes, devices=4, rates=RATES, check="measure")

    def test_unknown(self, arguments: tuple[Any, Any]) -> None:
        for check in ("yes", ("data", "yes"), 5):
            with pytest.raises(ValueError, match="give 'measure'"):
                jaxlwp.parallelize(loss, *arguments, devices=4, rates=RATES, check=check)


@pytest.mark.parametrize("two_passes", [False, True])
def test_sums_that_are_ready_together_start_once(two_passes: bool) -> None:
    """As many all-reduces of statistics and their gradients are priced as XLA leaves."""

    def normalised(params: Any, x: jax.Array) -> jax.Array:
        for kernel in params:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean = x.mean((0, 1, 2))
            if two_passes:
                variance = ((x - mean) ** 2).mean((0, 1, 2))
            else:
                variance = (x**2).mean((0, 1, 2)) - mean**2
            x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3))
        return jnp.mean(x**2)

    params = [jnp.ones((3, 3, channels, 24)) for channels in (4, 24)]
    x = jnp.ones((8, 6, 6, 4))
    made = jaxlwp.parallelize(normalised, params, x, devices=8, strategy="data", rates=RATES)
    text = jax.jit(jax.grad(made)).lower(params, x).compile().as_text()
    results = re.findall(r" = (.*) all-reduce\(", text)
    # Both sums of a normalisation side by side, or one.
    shapes = ("f32[48]", "f32[24]", "f32[1,1,1,48]", "f32[1,1,1,24]")
    compiled = sum(any(shape in result for shape in shapes) for result in results)
    space = made.space
    priced = 0
    for layer in space.graph.layers:
        config = made.strategy.configs[layer.name]
        inside = _collectives.layer_collectives(layer, config, space.devices.axis_sizes)
        priced += sum(c.kind == "all-reduce" and c.num_bytes == 4 * 24 for c in inside)
        priced -= sum(spare.count for spare in _collectives.spare_sums(layer))
    assert priced == compiled == 4 * (1 + two_passes)
