"""Scans: which are stacks of layers, which are one layer, and that these are split by sample."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import jaxlwp
from jaxlwp.check._verify import _collectives, check_layers
from jaxlwp.kernels import differentiated
from jaxlwp.measure._local import local_step
from jaxlwp.ops import RULES
from jaxlwp.plan._plan import bind as bind_plan
from jaxlwp.program._flatten import LONGEST_UNROLLED, flatten
from jaxlwp.space._config import Config

from .harness import bind, compare, drawn, every_config

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
TOLERANCE = 2e-5


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


W, X = 0.4 * array(4, 4), array(6, 5, 4)  # X: time, sample, channel
HALF = jnp.ones((5, 4)) / 2


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def recurrence(w: jax.Array, x: jax.Array = X, start: jax.Array = HALF) -> jax.Array:
    """Outputs of all steps."""

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ w + x)
        return h, h

    return lax.scan(step, start, x)[1]


# --- a stack of layers, or one layer -----------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.relu(nn.Dense(4)(x)), None


STACK = nn.scan(
    nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
)()


def fixed_point(kernel: jax.Array, length: int) -> jax.Array:
    start = jnp.ones((2, 6, 6, kernel.shape[-1]))
    return lax.scan(lambda x, _: (jnp.tanh(convolve(x, kernel)), None), start, None, length)[0]


UNROLLED: dict[str, tuple[Callable[..., Any], Any]] = {
    "convolutions": (
        lambda ks: lax.scan(lambda x, k: (convolve(x, k), None), jnp.ones((2, 6, 6, 3)), ks)[0],
        array(4, 3, 3, 3, 3),
    ),
    "one convolution again and again": (lambda k: fixed_point(k, 5), array(3, 3, 3, 3)),
    "dense layers": (
        lambda ws: lax.scan(lambda x, w: (jnp.tanh(x @ w), x.mean()), X, ws)[0],
        array(3, 4, 4),
    ),
    "dense layers, weight first": (
        lambda ws: lax.scan(
            lambda x, w: (jax.vmap(lambda row: jnp.tanh(w @ row))(x), None), HALF, ws
        )[0],
        array(3, 4, 4),
    ),
    "nn.scan with nn.remat": (
        lambda variables: STACK.apply(variables, HALF, None)[0],
        STACK.init(jax.random.key(0), HALF, None),
    ),
    "layers of a recurrence each": (
        lambda ws: lax.scan(lambda x, w: (recurrence(W, x @ w), None), X, ws)[0],
        array(3, 4, 4),
    ),
}

ONE_LAYER: dict[str, tuple[Callable[..., Any], Any]] = {
    "recurrence": (recurrence, W),
    "map": (lambda w: lax.map(lambda x: jnp.tanh(x @ w), X), W),
    "map of convolutions": (
        lambda k: lax.map(lambda x: convolve(x[None], k)[0], jnp.ones((4, 6, 6, 3))),
        array(3, 3, 3, 3),
    ),
    "scales": (
        lambda s: lax.scan(lambda x, s: (jnp.sin(x * s), None), HALF, s)[0],
        array(3, 4),
    ),
    "linear attention": (
        lambda q: lax.scan(
            lambda s, q: (0.9 * s + jnp.einsum("bk,bv->bkv", q, q), jnp.einsum("bkv,bk->bv", s, q)),
            jnp.zeros((5, 4, 4)),
            q,
        )[1],
        X,
    ),
    "gradient of a recurrence": (
        lambda w: jax.grad(lambda w: jnp.sum(recurrence(w) ** 2))(w),
        W,
    ),
    "a long stack": (
        lambda ks: lax.scan(lambda x, k: (convolve(x, k), None), jnp.ones((2, 6, 6, 2)), ks)[0],
        array(LONGEST_UNROLLED + 1, 3, 3, 2, 2),
    ),
    "a long fixed point": (lambda k: fixed_point(k, LONGEST_UNROLLED + 1), array(3, 3, 3, 3)),
}


def scans(program: Any) -> list[Any]:
    return [eqn for eqn in program.equations if eqn.name == "scan"]


@pytest.mark.parametrize("name", UNROLLED)
def test_a_stack_of_layers_is_unrolled(name: str) -> None:
    function, argument = UNROLLED[name]
    jaxpr = jax.make_jaxpr(function)(argument)
    recurrences = 3 if name == "layers of a recurrence each" else 0
    assert [eqn.params["length"] for eqn in scans(flatten(jaxpr))] == [len(X)] * recurrences
    assert len(scans(flatten(jaxpr, unroll=False))) == 1


@pytest.mark.parametrize("name", ONE_LAYER)
def test_everything_else_is_one_layer(name: str) -> None:
    function, argument = ONE_LAYER[name]
    jaxpr = jax.make_jaxpr(function)(argument)
    program = flatten(jaxpr)
    assert len(scans(program)) == len([e for e in jaxpr.eqns if e.primitive.name == "scan"]) > 0


# --- a CTC loss --------------------------------------------------------------------------------


def ctc_plan(steps: int, strategy: Any = "data") -> tuple[jaxlwp.Plan, Any, Any]:
    """A dense layer and a CTC loss; also the loss itself and its arguments."""

    def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.tanh(x @ params["w"]) @ params["v"]
        none = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
        return optax.ctc_loss(logits, none[0], labels, none[1]).mean()

    params = {"w": array(5, 8), "v": array(8, 12)}
    labels = jnp.asarray(np.random.default_rng(0).integers(1, 12, (16, 4)))
    arguments = params, array(16, steps, 5), labels
    return jaxlwp.parallelize(loss, *arguments, rates=RATES, strategy=strategy), loss, arguments


def test_ctc_loss_is_few_layers() -> None:
    plan, _, _ = ctc_plan(20)
    counts = {len(ctc_plan(steps)[0].graph.layers) for steps in (20, 40)}
    assert counts == {len(plan.graph.layers)}
    assert len(plan.graph.layers) <= 20
    (layer,) = (layer for layer in plan.graph.layers if layer.kind == "scan")
    assert set(layer.dimensions) == {"sample"}
    assert plan.strategy.configs[layer.name].describe(plan.space.devices.axis_sizes) == "sample=8"
    sizes = {len(differentiated(ctc_plan(n)[0].lowered).program.equations) for n in (20, 40)}
    assert len(sizes) == 1, "not unrolled where gradients are looked at either"


@pytest.mark.parametrize("strategy", ["data", "search"])
def test_ctc_loss_is_right_and_runs_as_priced(strategy: str) -> None:
    plan, loss, arguments = ctc_plan(20, strategy)
    check = jaxlwp.verify(plan)
    assert not check.disagreeing, str(check)
    actual = jax.jit(jax.value_and_grad(plan))(*arguments)
    expected = jax.jit(jax.value_and_grad(loss))(*arguments)
    assert max(compare(actual, expected).values()) <= TOLERANCE


def test_weights_of_a_recurrence_are_summed_once() -> None:
    """Not in every iteration: the bytes of all-reduces are those of the weights and the loss."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        inputs = jnp.moveaxis(x @ params["v"], 1, 0)
        return jnp.mean(recurrence(params["w"], inputs, jnp.zeros((16, 4))) ** 2)

    params = {"w": W, "v": 2 * W}
    plan = jaxlwp.parallelize(loss, params, array(16, 6, 4), rates=RATES, strategy="data")
    check = jaxlwp.verify(plan)
    assert not check.disagreeing, str(check)
    assert check.compiled_bytes_by_kind == {"all-reduce": 2 * 4 * 4 * 4 + 4}


def test_collectives_in_a_loop_count_once_an_iteration() -> None:
    mesh = jax.sharding.AbstractMesh((2,), ("a",), axis_types=(AxisType.Auto,))

    def inside(x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (lax.psum(c, "a") * x, None), x, None, length=5)[0]

    spec = PartitionSpec("a")
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)
    (eqn,) = jax.make_jaxpr(mapped)(jnp.ones((4, 3))).eqns
    (scan,) = scans(flatten(eqn.params["jaxpr"], unroll=False))
    (found,) = _collectives(scan)
    assert (found.kind, found.axes, found.num_bytes) == ("all-reduce", ("a",), 5 * 2 * 3 * 4)


# --- what else a body may hold -------------------------------------------------------------------


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    """Its backward pass is not linear in the cotangent."""
    return 1.0 * x


clipped.defvjp(lambda x: (1.0 * x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_vjp
def scanned(x: jax.Array) -> jax.Array:
    """A scan in body and derivative."""
    return lax.scan(lambda h, _: (2 * jnp.sin(h), None), x, None, length=4)[0]


scanned.defvjp(
    lambda x: (scanned(x), x),
    lambda x, g: (lax.scan(lambda h, _: (h * jnp.cos(x), None), g, None, length=3)[0],),
)


def clip_of_weight(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ clipped(p["w"]) + x)
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def clip_of_weight_in_a_scan(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        w, _ = lax.scan(lambda w, _: (0.9 * clipped(w), None), p["w"], None, length=2)
        h = jnp.tanh(h @ w + x)
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def clip_of_carry(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = clipped(jnp.tanh(h @ p["w"] + x))
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def condition(p: Any) -> Any:
    def step(carry: Any, x: Any) -> Any:
        i, h = carry
        h = lax.cond(i % 2 == 0, lambda h: jnp.tanh(h @ p["w"] + x), lambda h: 2 * h, h)
        return (i + 1, h), h

    return lax.scan(step, (0, HALF), p["x"])[1]


def loop(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        n = lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0)
        h = jnp.tanh(h @ p["w"] + n * x)
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def samples_mixed(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ p["w"] + x - h.mean(0))
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def power_iteration(p: Any) -> Any:
    """A scan in the body that has nothing to split."""

    def step(h: Any, x: Any) -> Any:
        v, _ = lax.scan(lambda v, _: (p["w"] @ v, None), jnp.ones(4), None, length=3)
        h = jnp.tanh(h @ p["w"] / jnp.sqrt(1 + v @ v) + x)
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def output_layer(p: Any) -> Any:
    """The last carry has no channels of the output, which could be split otherwise."""

    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ p["w"] + x)
        return h, h @ p["o"]

    h, ys = lax.scan(step, HALF, p["x"])
    return jnp.sum(h**2) + ys


def counter(p: Any) -> Any:
    """A counter that is read, and a key."""

    def step(carry: Any, x: Any) -> Any:
        i, key, h = carry
        key, now = jax.random.split(key)
        h = jnp.tanh(h @ p["w"] + x * jax.random.normal(now, x.shape))
        return (i + 1, key, h), h * i

    (i, key, h), ys = lax.scan(step, (0, jax.random.key(7), HALF), p["x"])
    return ys * i + h * jax.random.normal(key, h.shape)


def stack_in_time(p: Any) -> Any:
    """A stack of layers in the body stays a scan."""

    def step(h: Any, x: Any) -> Any:
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w + x), None), h, p["ws"])
        return h, h

    return lax.scan(step, HALF, p["x"])[1]


def sorted_rows(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        s = nn.softmax(h @ p["w"] + x)
        s = jnp.sort(s, -1) + jnp.cumsum(s, -1) + lax.top_k(s, 2)[0].sum(-1, keepdims=True)
        return s, s * jnp.argmax(s, -1)[:, None]

    return lax.scan(step, HALF, p["x"])[1]


def gated(cell: Any) -> Callable[[Any], Any]:
    model = nn.RNN(cell, reverse=True, keep_order=True)
    lengths = jnp.asarray([6, 2, 3, 6, 1])
    x = jnp.moveaxis(X, 0, 1)
    variables = model.init(jax.random.key(0), x, seq_lengths=lengths)

    def apply(p: Any) -> Any:
        scaled = jax.tree.map(lambda v: v * p["w"][0, 0], variables)
        return model.apply(scaled, jnp.moveaxis(p["x"], 0, 1), seq_lengths=lengths)

    return apply


BODIES: dict[str, tuple[Callable[[Any], Any], set[str] | None]] = {
    "clip of a weight": (clip_of_weight, None),
    "clip of a weight in a scan": (clip_of_weight_in_a_scan, None),
    "clip of the carry": (clip_of_carry, {"sample"}),
    "custom_vjp of scans": (lambda p: scanned(p["x"][0] @ p["w"]), None),
    "cond": (condition, None),
    "while": (loop, None),
    "samples mixed": (samples_mixed, None),
    "power iteration": (power_iteration, {"sample"}),
    "output layer": (output_layer, {"sample"}),
    "counter and key": (counter, {"sample"}),
    "stack in time": (stack_in_time, {"sample"}),
    "sort, top-k, argmax": (sorted_rows, {"sample"}),
    "GRU": (gated(nn.GRUCell(4)), {"sample"}),
    "vmap": (
        lambda p: jax.vmap(lambda x: recurrence(p["w"], x, jnp.ones(4)), 1)(p["x"]),
        {"sample"},
    ),
    "map in batches": (
        lambda p: lax.map(lambda x: jnp.tanh(x @ p["w"]), p["x"], batch_size=2),
        {"sample", "height", "length", "channel"},
    ),
    "associative scan": (lambda p: lax.associative_scan(jnp.multiply, p["x"] @ p["w"]), None),
    "fori_loop": (
        lambda p: lax.fori_loop(0, 7, lambda i, h: jnp.sin(h @ p["ws"][i % 2]) + h, p["h"]),
        {"sample"},
    ),
    "no inputs": (
        lambda p: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), h), p["h"], None, length=5)[1],
        {"sample"},
    ),
    "no carry": (
        lambda p: lax.scan(lambda c, x: (c, jnp.tanh(x @ p["w"])), (), p["x"])[1],
        {"sample", "length", "channel"},
    ),
    "no iteration": (
        lambda p: p["h"] + lax.fori_loop(3, 3, lambda i, h: h @ p["w"], p["h"]),
        {"sample"},
    ),
    "gradient of a recurrence": (
        lambda p: jax.grad(lambda x: jnp.sum(recurrence(p["w"], x) ** 2))(p["x"]),
        {"sample"},
    ),
}


@pytest.mark.parametrize("name", drawn(BODIES, 0.25))
def test_numbers_are_right_whatever_the_body(name: str, mesh22: Mesh) -> None:
    """Some configs of each layer; the scan has the dimensions that its body merely maps."""
    apply, dimensions = BODIES[name]
    params = {"w": W, "x": X, "ws": 0.4 * array(2, 4, 4), "o": array(4, 8), "h": HALF}
    shape = jax.eval_shape(apply, params).shape
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, shape), jnp.float32)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(apply(params) * weights) + 1e-3 * sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
        )

    graph = jaxlwp.trace(loss, params)
    layers = [layer for layer in graph.layers if layer.kind == "scan"]
    assert dimensions is None or any(set(layer.dimensions) == dimensions for layer in layers)
    assert dimensions is not None or not any(layer.dimensions for layer in layers)
    choices = every_config(graph, dict(mesh22.shape), random.Random(0))[:4]
    expected = jax.jit(jax.value_and_grad(loss))(params)
    functions = [bind(graph, configs, mesh22, expected[0]) for configs in choices]
    step = jax.jit(lambda params: [jax.value_and_grad(function)(params) for function in functions])
    for configs, actual in zip(choices, step(params), strict=True):
        errors = compare(actual, expected)
        assert max(errors.values()) <= TOLERANCE, (configs, errors)
    devices = jaxlwp.device_graph(mesh22, rates=RATES)
    space = jaxlwp.price(graph, devices, interchangeable=False)
    for configs in choices:
        places = [all_.index(c) for all_, c in zip(space.configs, configs, strict=True)]
        strategy = space.strategy("drawn", places)
        plan = bind_plan(space, strategy, mesh22, (params,), jax.tree.structure(expected[0]))
        for layer, check in zip(graph.layers, check_layers(plan), strict=False):
            assert check.agrees or layer.kind != "scan", check


# --- work and memory -----------------------------------------------------------------------------


def scan_layer(steps: int, samples: int = 8) -> tuple[Any, Any]:
    """A recurrence's graph, and its scan's layer."""
    x = array(steps, samples, 4)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(recurrence(params["w"], x, jnp.zeros((samples, 4))))

    graph = jaxlwp.trace(loss, {"w": W})
    return graph, next(layer for layer in graph.layers if layer.kind == "scan")


def test_operations_are_those_of_the_body_times_the_iterations() -> None:
    def flops(steps: int, samples: int) -> float:
        _, layer = scan_layer(steps, samples)
        (eqn,) = (m.equation for m in layer.members if m.equation.name == "scan")
        values = [v.shape for v in eqn.operand_values], [v.shape for v in eqn.result_values]
        return RULES["scan"].flops(eqn, *values)

    # A matrix product, an addition and a tanh of (samples, 4).
    assert flops(6, 8) == 6 * (2 * 8 * 4 * 4 + 2 * 8 * 4)
    assert flops(12, 8) == 2 * flops(6, 8) == flops(6, 16)


def test_local_work_is_a_scan_of_blocks() -> None:
    graph, layer = scan_layer(6)
    sizes = {"a": 2, "b": 2}
    configs = [Config(), Config.of({"sample": ("a",)}), Config.of({"sample": ("b",)})]
    whole, half, other = (local_step(graph, layer, config, sizes) for config in configs)
    assert half.key == other.key != whole.key
    assert len(scans(half.program)) == 2, "forward and backward"
    for step, samples in ((whole, 8), (half, 4)):
        operands = [jnp.ones(value.shape, value.dtype) for value in step.operands]
        made = jax.jit(step)(*operands)
        assert [x.shape for x in made] == [x.shape for x in operands[: len(made)]]
        assert any(samples in value.shape for value in step.operands)


def test_memory_of_a_loop_is_that_of_one_iteration() -> None:
    """What one iteration holds counts once, beside what is stacked for the backward pass."""

    def memory(length: int) -> int:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
                return h + jnp.tanh(h @ params["w"]) @ params["w"].T, None

            start = x @ params["w"].T
            return jnp.mean(
                lax.stop_gradient(lax.scan(step, start, None, length=length)[0]) * start
            )

        params = {"w": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
        x = jax.ShapeDtypeStruct((256, 4096), jnp.float32)
        plan = jaxlwp.parallelize(loss, params, x, devices=1, rates=RATES, strategy="data")
        return plan.memory.peak_bytes

    wide, weights = 256 * 4096 * 4, 64 * 4096 * 4
    assert memory(4) == memory(40)
    # The batch, a hidden layer of one iteration; weights, momentum, gradient.
    assert memory(4) == pytest.approx(2 * wide + 3 * weights, rel=0.05)
