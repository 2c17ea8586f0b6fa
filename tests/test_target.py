"""Targets: plans for GPUs that are not there, compiled where their compiler is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh

from jaxlwp import BASELINES, Rates, device_graph, parallelize
from jaxlwp.check._target import Target, compile_for, target_mesh

RATES = Rates(
    flops_per_s=5e13, memory_bytes_per_s=4e12, latency_s=(1e-6,), link_bytes_per_s=(2e11,)
)


def _is_installed() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


# Marked, so that `make test-gpu-aot`, which installs the compiler, runs these alone; skipped, so
# that without it they are not taken for tests that passed.
gpu_aot = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(not _is_installed(), reason="the extra gpu-aot is not installed"),
]


def _cnn(params: dict[str, Any], x: jax.Array, labels: jax.Array) -> jax.Array:
    """Convolution, bias, relu, pooling, convolution, and two dense layers."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, params["c1"], (1, 1), "SAME", dimension_numbers=dims)
    x = jnp.maximum(x + params["b1"], 0)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = lax.conv_general_dilated(x, params["c2"], (2, 2), "SAME", dimension_numbers=dims)
    x = jnp.maximum(x, 0).reshape(x.shape[0], -1)
    x = jnp.maximum(x @ params["d1"], 0) @ params["d2"]
    return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], 1).mean()


def _arguments() -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    shapes = {
        "c1": (3, 3, 4, 64),
        "b1": (64,),
        "c2": (3, 3, 64, 128),
        "d1": (8 * 8 * 128, 512),
        "d2": (512, 128),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    images = jax.ShapeDtypeStruct((64, 32, 32, 4), jnp.float32)
    return params, images, jax.ShapeDtypeStruct((64,), jnp.int32)


# --- without the compiler --------------------------------------------------------------------


def test_parse() -> None:
    assert Target.parse("h200:16") == Target(gpu="h200", hosts=1, gpus_per_host=16)
    assert Target.parse("A100:2x8") == Target(gpu="a100", hosts=2, gpus_per_host=8)
    assert Target.parse("p100:2x8").num_devices == 16
    assert str(Target.parse("h100:2x8")) == "h100:2x8"


@pytest.mark.parametrize("text", ["", "h200", "h200:", "h200:0", "h200:2x0", "b300:8", "h200:8x"])
def test_parse_says_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not GPU:COUNT"):
        Target.parse(text)


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'jaxlwp\[gpu-aot\]'"):
        target_mesh("h100:3")  # not asked for by another test: targets are remembered
    with pytest.raises(RuntimeError, match=r"pip install 'jaxlwp\[gpu-aot-cuda12\]'"):
        target_mesh("v100:3")


def test_number_of_devices(mesh22: Mesh) -> None:
    plan = parallelize(_cnn, *_arguments(), mesh=mesh22, strategy="data", rates=RATES)
    with pytest.raises(ValueError, match="the plan is for 4 devices, h200:16 has 16"):
        compile_for(plan, "h200:16")


# --- with it ---------------------------------------------------------------------------------


class TestCompiled:
    pytestmark = gpu_aot

    @pytest.mark.parametrize("strategy", ["search", *BASELINES])
    def test_what_is_predicted_is_what_is_compiled(self, strategy: str) -> None:
        mesh = target_mesh("h200:2x8")
        plan = parallelize(_cnn, *_arguments(), mesh=mesh, strategy=strategy, rates=RATES)
        step = compile_for(plan, "h200:2x8")
        assert "num_partitions=16" in step.text
        assert step.compiled_bytes_by_kind == step.predicted_bytes_by_kind
        assert all(collective.trip_known for collective in step.collectives)
        arguments_bytes = step.predicted_memory.argument_bytes
        assert step.memory.argument_bytes == pytest.approx(arguments_bytes, abs=1024)
        assert abs(step.memory_error) < 0.1

    def test_a_plan_of_other_devices(self, mesh222: Mesh) -> None:
        """Made for simulated devices, compiled for GPUs."""
        plan = parallelize(_cnn, *_arguments(), mesh=mesh222, strategy="owt", rates=RATES)
        step = compile_for(plan, "a100:8")
        assert step.compiled_bytes_by_kind == step.predicted_bytes_by_kind
        assert plan.mesh is mesh222

    def test_rates_must_be_given(self) -> None:
        with pytest.raises(ValueError, match="NVIDIA H200.* is not there to be measured"):
            parallelize(_cnn, *_arguments(), mesh=target_mesh("h200:16"))

    def test_rates_of_a_system(self) -> None:
        """A name has the target's hosts; GPUs of one large host count as those of several."""
        plan = parallelize(_cnn, *_arguments(), mesh=target_mesh("h200:2x8"), rates="h200")
        found = plan.space.devices
        assert [(axis.name, axis.level) for axis in found.axes if axis.level == 0] == [("host0", 0)]
        assert found.source == "system dgx-h200" and plan.space.num_measured == 0
        one = device_graph(target_mesh("h200:16"), rates="dgx-h200")
        rates = [(axis.level, axis.bytes_per_s, axis.latency_s) for axis in one.axes]
        assert rates == [(axis.level, axis.bytes_per_s, axis.latency_s) for axis in found.axes]
        with pytest.raises(ValueError, match="rates: dgx-h200 has 8 GPUs in a host, the mesh 16; "):
            device_graph(target_mesh("h200:2x16"), rates="h200")

    def test_plan_is_printed(self) -> None:
        plan = parallelize(_cnn, *_arguments(), mesh=target_mesh("h200:16"), rates=RATES)
        assert "NVIDIA H200" in str(plan)
        assert "kept for the backward pass" in " ".join(str(plan).split())
