"""Work priced kernel by kernel, as XLA for GPUs fuses it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost._kernels import Kernel, Traffic, layer_kernels, update_kernels
from jaxlwp.devices import DeviceGraph, preset
from jaxlwp.kernels import Builder, differentiated, fuse
from jaxlwp.kernels._alike import AlikeLayers
from jaxlwp.lower import Lowered
from jaxlwp.memory._buffers import predict
from jaxlwp.optimize._wide import MOST_CONFIGS, _Growth
from jaxlwp.program import Program, Value
from jaxlwp.space import Config
from tests.contracts.harness import drawn

N, SIZE, INPUTS, OUTPUTS = 8, 16, 4, 32
BF16 = 2


def conv_loss(params: Any, x: jax.Array) -> jax.Array:
    """Two convolutions with bias and relu, and a mean."""
    dims = ("NHWC", "HWIO", "NHWC")
    for n in (1, 2):
        kernel, bias = params[f"k{n}"], params[f"b{n}"]
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        x = jnp.maximum(y + bias, 0)
    return jnp.mean(x)


def arguments() -> tuple[Any, Any]:
    shapes = {
        "k1": (3, 3, INPUTS, OUTPUTS),
        "b1": (OUTPUTS,),
        "k2": (3, 3, OUTPUTS, OUTPUTS),
        "b2": (OUTPUTS,),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    return params, jax.ShapeDtypeStruct((N, SIZE, SIZE, INPUTS), jnp.bfloat16)


@pytest.fixture(scope="module")
def graph() -> jaxlwp.graph.ComputationGraph:
    return jaxlwp.trace(conv_loss, *arguments())


def num_bytes(traffic: Traffic) -> float:
    return math.prod(traffic.shape) * traffic.itemsize * traffic.factor


def calls(kernels: tuple[Kernel, ...]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.kind]


def test_library_calls_count_operands_and_results(graph: jaxlwp.graph.ComputationGraph) -> None:
    first, second = (k for k, layer in zip(layer_kernels(graph), graph.layers, strict=True)
                     if layer.kind == "conv")  # fmt: skip
    image, inner = N * SIZE**2 * INPUTS * BF16, N * SIZE**2 * OUTPUTS * BF16
    weights = 9 * OUTPUTS * OUTPUTS * BF16
    # The first convolution's input has no gradient.
    assert len(calls(first)) == 2 and len(calls(second)) == 3
    flops = 2 * N * SIZE**2 * OUTPUTS * OUTPUTS * 9
    for kernel in calls(second):
        assert kernel.starts == 1 and kernel.dtype == "bfloat16"
        assert kernel.flops == pytest.approx(flops, rel=0.15)  # padding is not computed
        assert {"sample", "height", "width", "channel", "reduction"} == set(kernel.work[1])
        large = [num_bytes(t) for t in kernel.traffic if len(t.shape) == 4]
        assert sorted(large) == sorted([weights, inner, inner])
    assert any(num_bytes(t) == image for t in calls(first)[0].traffic)
    # Bias and relu: fused forward with the convolution or in one kernel, one backward each.
    assert len(second) - len(calls(second)) <= 6


def test_a_split_divides_what_has_the_dimension(graph: jaxlwp.graph.ComputationGraph) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    devices = dataclasses.replace(
        preset("h200", gpus=4).device_graph(mesh), overhead_s=0.0, memory_bytes_per_s=1e-3
    )  # so slow a memory that operations take no time beside it
    space = jaxlwp.price(graph, devices)
    (index,) = (layer.index for layer in graph.layers if layer.name.startswith("k2"))
    seconds = {
        config: float(s)
        for config, s in zip(space.configs[index], space.tables.compute_s[index], strict=True)
    }
    whole = seconds[Config()]
    by_sample = seconds[Config.of({"sample": ("a", "b")})]
    by_channel = seconds[Config.of({"channel": ("a", "b")})]
    by_both = seconds[Config.of({"sample": ("a",), "channel": ("b",)})]
    # Weights are a small part here; a split by channel leaves the input whole.
    assert whole / 4 < by_sample < whole / 3
    assert whole / 4 < by_channel < whole
    assert by_sample < by_both < by_channel


def test_starts_do_not_shrink(graph: jaxlwp.graph.ComputationGraph) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    slow = preset("h200", gpus=4).device_graph(mesh)
    fast = dataclasses.replace(slow, overhead_s=0.0)
    kernels = layer_kernels(graph)
    for layer, a, b in zip(
        graph.layers,
        jaxlwp.price(graph, slow).tables.compute_s,
        jaxlwp.price(graph, fast).tables.compute_s,
        strict=True,
    ):
        starts = sum(kernel.starts for kernel in kernels[layer.index])
        np.testing.assert_allclose(a - b, starts * slow.overhead_s, rtol=1e-6, atol=1e-15)


def test_reductions_of_one_tensor_are_one_kernel() -> None:
    """Mean and mean square of a normalisation read their input once."""

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        y = x * params
        mean, square = y.mean((0, 1)), (y * y).mean((0, 1))
        return jnp.mean((y - mean) * lax.rsqrt(square - mean * mean + 1e-3))

    shapes = (
        jax.ShapeDtypeStruct((64,), jnp.float32),
        jax.ShapeDtypeStruct((64, 64, 64), jnp.float32),
    )
    graph = jaxlwp.trace(loss, *shapes)
    tensor = 64 * 64 * 64 * 4
    every = [kernel for kernels in layer_kernels(graph) for kernel in kernels]
    moved = sum(num_bytes(t) for kernel in every for t in kernel.traffic)
    # Forward twice (both sums; the mean of the result), backward at most six times.
    assert 2 * tensor <= moved <= 9 * tensor


def test_updates() -> None:
    summed = np.array([0.0, 0.5])
    starts, copied = update_kernels(Value((3, 3, 8, 8), np.dtype("float32")), summed)
    assert starts.tolist() == [4.0, 5.5] and copied.tolist() == [4.0, 5.25]
    starts, copied = update_kernels(Value((1, 1, 8, 8), np.dtype("float32")), summed, vector=True)
    assert starts.tolist() == [3.0, 4.5] and copied.tolist() == [1.0, 2.25]
    starts, copied = update_kernels(Value((8, 8), np.dtype("float32")), summed)
    assert starts.tolist() == [1.0, 2.5] and copied.tolist() == [0.0, 1.25]


def test_processors_are_priced_operator_by_operator(graph: jaxlwp.graph.ComputationGraph) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    rated = jaxlwp.device_graph(mesh, rates=jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11))
    assert not rated.fuses and rated.exposed_share == 1 and rated.bucket_bytes == 0
    model = jaxlwp.cost.AnalyticCostModel.of(graph, rated)
    assert not model.kernels
    gpus: DeviceGraph = preset("h200", gpus=2).device_graph(mesh)
    assert gpus.fuses and jaxlwp.cost.AnalyticCostModel.of(graph, gpus).kernels


def test_layers_that_are_alike_but_for_their_kernels_have_costs_of_their_own() -> None:
    """Of equal convolutions the one before a pooling has other kernels than the one before it."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        for n in range(3):
            y = lax.conv_general_dilated(x, params[n], (1, 1), "SAME", dimension_numbers=dims)
            x = jnp.maximum(y + params[3], 0)
        window = (1, 2, 2, 1)
        return jnp.mean(lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID") ** 2)

    kernel = jax.ShapeDtypeStruct((3, 3, INPUTS, INPUTS), jnp.float32)
    params = [kernel, kernel, kernel, jax.ShapeDtypeStruct((INPUTS,), jnp.float32)]
    graph = jaxlwp.trace(loss, params, jax.ShapeDtypeStruct((N, SIZE, SIZE, INPUTS), jnp.float32))
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    growth = _Growth(graph, preset("h200", gpus=2).device_graph(mesh), None, 1.0, MOST_CONFIGS)
    alike = [layer for layer in graph.layers if layer.key == graph.layers[1].key]
    assert len({growth.model.kernels[layer.index] for layer in alike}) == len(alike) == 2
    for layer in alike:
        costs = growth.model.layer(layer, [Config()])
        own = costs.compute_s + costs.exchange_s + costs.sync_s + costs.overhead_s
        assert growth.own_s(layer.index, [Config()]) == own.tolist()


def test_names_are_made_for_memory_alone(graph: jaxlwp.graph.ComputationGraph) -> None:
    """A name for each value takes a quarter of the time of tracing, and changes no kernel."""
    whole = (Config(),) * len(graph.layers)
    lowered = Lowered(graph=graph, configs=whole, axis_sizes={"device": 1})
    made = [differentiated(lowered), differentiated(lowered, named=True)]
    names = [sum(eqn.name == "name" for eqn in each.program.equations) for each in made]
    assert names[0] == 0 < names[1]
    first, second = (
        [(node.kind, node.num_bytes, len(read)) for node, read in kernels.items()]
        for kernels in (fuse(Builder(each.program).root(each.gradients)) for each in made)
    )
    assert first == second


REPEATING = ("models.resnet:ResNet50", "models.convnext:ConvNeXtTiny")


@pytest.mark.parametrize(
    "pair",
    drawn([f"{name}-{way}" for name in REPEATING for way in ("data", "spatial", "model")], 0.3),
)
def test_what_is_alike_is_traced_once(pair: str) -> None:
    """Layers that repeat are traced in fewer steps, to the same program: its names say so too."""
    name, strategy = pair.split("-")
    work = load_workload(name, batch=8, input_shape=(64, 64, 3), abstract=True)
    plan = jaxlwp.parallelize(
        work.loss, work.params, *work.batch, devices="dgx-h100:1", strategy=strategy
    )
    layers = AlikeLayers(plan.lowered.program, None, alike=True)
    functions = {run.key for run in layers.repeated}
    assert 2 * len(functions) < len(layers.repeated)
    each, alike = (differentiated(plan.lowered, named=True, alike=alike) for alike in (False, True))
    assert lines(each.program) == lines(alike.program)
    assert each.gradients == alike.gradients
    first, second = (predict(made.program, made.gradients, made.loss) for made in (each, alike))
    assert first.live_bytes == second.live_bytes
    assert [(node.num_bytes, tag) for node, tag in zip(first.kept, first.tags, strict=True)] == [
        (node.num_bytes, tag) for node, tag in zip(second.kept, second.tags, strict=True)
    ]


def lines(program: Program) -> list[tuple[str, str]]:
    """Operators and shapes of what they make, and the names that are given; in any order."""
    made = ((eqn.name, eqn.params.get("name"), eqn.result_values) for eqn in program.equations)
    return sorted((kind, f"{name} {values}") for kind, name, values in made)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_what_a_kernel_holds_is_split_with_its_layer(dtype: Any) -> None:
    """Zeros in memory too: those that relu reads, and into which maxima are scattered back."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        x = lax.reduce_window(
            jnp.maximum(conv(params["k1"], x), 0),
            *(np.asarray(-np.inf, dtype), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        )
        return jnp.mean(jnp.maximum(conv(params["k2"], x), 0))

    def conv(kernel: jax.Array, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    params, x = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), arguments())
    traced = jaxlwp.trace(loss, params, x)
    kernels = [kernel for layer in layer_kernels(traced) for kernel in layer]
    assert any(layer.name.startswith("max") for layer in traced.layers)
    assert kernels
    for kernel in kernels:
        for traffic in kernel.traffic:
            if num_bytes(traffic) > 9 * OUTPUTS * OUTPUTS * 4:  # more than any filter
                assert "sample" in traffic.labels, traffic


def residual_loss(params: Any, x: jax.Array) -> jax.Array:
    """Blocks as in decoders: group normalisation, convolution and a shortcut; then twice the size.

    The first convolution's result is read twice. So is what each block makes.
    """
    dims = ("NHWC", "HWIO", "NHWC")

    def conv(name: str, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=dims)
        return y + params["bias"]

    x = conv("first", x)
    for n in range(2):
        groups = x.astype(jnp.float32).reshape(*x.shape[:3], 8, -1)
        mean = groups.mean((1, 2, 4), keepdims=True)
        square = (groups**2).mean((1, 2, 4), keepdims=True)
        y = ((groups - mean) * lax.rsqrt(square - mean**2 + 1e-5)).reshape(x.shape)
        x = x + conv(f"k{n}", jax.nn.silu(y).astype(x.dtype))
    n, height, width, channels = x.shape
    x = jax.image.resize(x, (n, 2 * height, 2 * width, channels), "nearest")
    return jnp.mean(conv("last", x).astype(jnp.float32) ** 2)


def residual_graph() -> jaxlwp.graph.ComputationGraph:
    kernel = jax.ShapeDtypeStruct((3, 3, OUTPUTS, OUTPUTS), jnp.bfloat16)
    params = {name: kernel for name in ("first", "k0", "k1", "last")}
    params["bias"] = jax.ShapeDtypeStruct((OUTPUTS,), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((N, 32, 32, OUTPUTS), jnp.bfloat16)
    return jaxlwp.trace(residual_loss, params, x)


def test_what_is_reshaped_or_resized_on_the_fly_is_split_with_its_reader() -> None:
    """A layer's kernel reads the tensor in memory, whose shape is none of the layer's own."""
    for layer in layer_kernels(residual_graph()):
        for traffic in (t for kernel in layer for t in kernel.traffic):
            if num_bytes(traffic) > 9 * OUTPUTS * OUTPUTS * 4:  # more than any filter
                assert {"height", "width"} <= set(traffic.labels), traffic


def test_a_convolution_adds_its_bias_and_a_shortcut() -> None:
    """One kernel reads data, filter, bias and shortcut; no other kernel adds them up again."""
    graph, tensor = residual_graph(), N * 32 * 32 * OUTPUTS * BF16
    for layer, kernels in zip(graph.layers, layer_kernels(graph), strict=True):
        forward = [k for k in kernels if k.kind == "conv"][:1]
        large = [t for k in forward for t in k.traffic if num_bytes(t) == tensor]
        if layer.name.startswith(("k0", "k1")):
            assert len(large) == 3, layer.name
        elif layer.name.startswith("first"):
            assert len(large) == 2, layer.name
        elif layer.name.startswith("reduce"):  # the sums of a normalisation, forward
            assert [num_bytes(t) for t in kernels[0].traffic].count(tensor) == 1
