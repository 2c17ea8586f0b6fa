"""What depends on no argument is evaluated once, and is a constant in place of layers."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.graph import _constants
from jaxlwp.graph._trace import trace
from tests.contracts.harness import bind, compare, draw_seed, every_config

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
WAVE = ("NWC", "WIO", "NWC")


def low_pass(size: int) -> Any:
    """A filter of unit sum under a Kaiser window: Bessel functions, which have no rule."""
    at = jnp.arange(size) - (size - 1) / 2
    taps = jnp.kaiser(size, 5.0) * jnp.sinc(at / 2)
    return taps / taps.sum()


def smooth(x: Any) -> Any:
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(low_pass(7)[:, None, None], (7, 1, channels))
    return lax.conv_general_dilated(
        x, kernel, (2,), "SAME", dimension_numbers=WAVE, feature_group_count=channels
    )


def vocoder(params: Any, x: Any) -> Any:
    for kernel in params:
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=WAVE))
        x = smooth(x)
    return jnp.mean(x**2)


def wave_arguments() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        [jax.random.normal(key, (3, 4, 4)) for key in keys[:2]],
        jax.random.normal(keys[2], (8, 32, 4)),
    )


def constants_of(graph: jaxlwp.graph.ComputationGraph) -> dict[int, Any]:
    """Those that are no numbers."""
    return {i: c for i, c in graph.program.constants.items() if np.ndim(c)}


def test_filters_are_no_layers() -> None:
    graph = trace(vocoder, *wave_arguments())
    assert [layer.kind for layer in graph.layers] == ["conv"] * 4 + ["reduce"]
    assert not graph.unknown()
    (constant,) = graph.constants  # one array, though two layers read one each
    assert constant.shape == (7, 1, 1) and len(constants_of(graph)) == 2
    for value in constants_of(graph).values():
        assert np.ravel(value) == pytest.approx(np.ravel(low_pass(7)), rel=1e-6)


@pytest.mark.parametrize("strategy", ["search", *jaxlwp.BASELINES])
def test_priced_and_verified(strategy: str) -> None:
    """A constant costs nothing, communicates nothing, and is one line in the table."""
    made = jaxlwp.parallelize(
        vocoder, *wave_arguments(), devices=8, strategy=strategy, rates=RATES, measure=False
    )
    check = jaxlwp.verify(made)
    assert not check.disagreeing, str(check)
    assert check.predicted_bytes_by_kind == check.compiled_bytes_by_kind
    rows = [line for line in str(made).splitlines() if "constant" in line]
    assert len(rows) == 1
    assert re.search(r"│ \(constants\) +│ constant +│ 1 array, 28 B +│", rows[0])


def test_no_line_without_constants() -> None:
    plan = jaxlwp.parallelize(
        lambda w, x: jnp.mean((x @ w) ** 2),
        *(jnp.ones((4, 4)), jnp.ones((8, 4))),
        devices=8,
        strategy="data",
        rates=RATES,
        measure=False,
    )
    assert "constant" not in str(plan)


def encoded(params: Any, x: Any) -> tuple[Any, Any]:
    """A position encoding, a mask and a window, read in every layout that a layer may have."""
    _, height, width, channels = x.shape
    at = jnp.arange(height)[:, None] + 3 * jnp.arange(width)[None]
    angle = at[..., None] / 10.0 ** jnp.arange(2)
    code = jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.cos(2 * angle)], -1)
    x = lax.reduce_window(x, 0.0, lax.add, (1,) * 4, (1,) * 4, "VALID") + code[..., :channels]
    y = x @ params["kernel"]
    y = jnp.where(jnp.tril(jnp.ones((height, width), bool))[..., None], y, 0.1)
    window = jnp.cumsum(jnp.ones(height))
    y = jnp.tanh(y) * window[:, None, None]
    return jnp.sum(y**2), y


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_layout(mesh222: Mesh, step: int) -> None:
    """Of uneven sizes; loss, output and gradients as on one device."""
    keys = jax.random.split(jax.random.key(1))
    params = {"kernel": jax.random.normal(keys[0], (5, 6))}
    x = jax.random.normal(keys[1], (5, 7, 9, 5))
    graph = trace(encoded, params, x)
    assert [layer.kind for layer in graph.layers] == ["avg_pool", "dense", "reduce"]
    expected = jax.value_and_grad(encoded, has_aux=True)(params, x)
    choices = every_config(graph, dict(mesh222.shape), random.Random(0))
    axes = [{name for c in choices for name, _ in c[n].splits} for n in range(3)]
    assert axes[0] == {"sample", "height", "width", "channel"}
    chosen = choices[random.Random(draw_seed()).randrange(step) :: step]
    for start in range(0, len(chosen), 8):
        plans = [bind(graph, c, mesh222, expected[0]) for c in chosen[start : start + 8]]
        run = jax.jit(
            lambda p, x, plans=plans: [jax.value_and_grad(f, has_aux=True)(p, x) for f in plans]
        )
        for actual in run(params, x):
            assert max(compare(actual, expected).values()) <= 1e-5


def only_output(make: Callable[[], Any]) -> Any:
    """What the program of a function has in place of `make()`, if that is a constant."""
    graph = trace(lambda w: (jnp.sum(w), make()), jnp.ones(3))
    return graph.program.constants.get(graph.program.outputs[1])


SOME = np.array([3, 1, 0])


@pytest.mark.parametrize(
    "dtype", "bool int8 uint16 int32 float16 bfloat16 float32 float8_e4m3fn complex64".split()
)
def test_dtypes_stay(dtype: str) -> None:
    def make() -> Any:
        return lax.concatenate([jnp.asarray(SOME).astype(dtype)] * 2, 0)

    constant = only_output(make)
    assert constant.dtype == np.dtype(jnp.dtype(dtype))
    assert np.array_equal(constant, make())


def test_dtypes_stay_with_x64() -> None:
    def make() -> Any:
        half = 0.5 * jnp.sort(jnp.asarray(SOME, jnp.float32))  # a weak number beside float32
        return jnp.concatenate([half, half]), jnp.cumsum(jnp.arange(5) / 3)

    with jax.enable_x64(True):
        graph = trace(lambda w: (jnp.sum(w), make()), jnp.ones(3))
        expected = make()
    found = [graph.program.constants[i] for i in graph.program.outputs[1:]]
    assert [c.dtype for c in found] == [np.float32, np.float64]
    for constant, value in zip(found, expected, strict=True):
        assert np.array_equal(constant, value)


def test_every_bit_stays() -> None:
    """Repeated rows are kept once, but only if they are the same, signs of zero included."""
    zeros, nans = np.float32([[0.0], [-0.0]]), np.float32([[np.nan], [np.nan]])

    def make() -> Any:
        return [jnp.tile(lax.rev(jnp.asarray(a), (0,)), (1, 5)) for a in (zeros, nans)]

    graph = trace(lambda w: (jnp.sum(w), make()), jnp.ones(3))
    shapes = sorted(np.shape(c) for c in constants_of(graph).values())
    assert shapes == [(1, 1), (2, 1)]
    plan = jaxlwp.parallelize(
        lambda w: (jnp.sum(w), make()),
        jnp.ones(3),
        devices=8,
        strategy="data",
        rates=RATES,
        measure=False,
    )
    for actual, expected in zip(plan(jnp.ones(3))[1], make(), strict=True):
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


def test_outputs() -> None:
    """Constants, numbers, masks and what else no argument is needed for, as outputs."""
    key = jax.random.key(3)

    def loss(w: Any, x: Any) -> Any:
        taps = low_pass(5)
        others = (taps, taps.sum(), 7, 1.5, jnp.arange(8) > 3, key, jax.random.normal(key, (8,)))
        return jnp.mean((x @ w * taps) ** 2), others

    arguments = jnp.ones((4, 5)), jnp.ones((8, 4))
    expected = jax.jit(loss)(*arguments)
    for strategy in ("search", "data", "model"):
        plan = jaxlwp.parallelize(
            loss, *arguments, devices=8, strategy=strategy, rates=RATES, measure=False
        )
        value, gradient = jax.jit(jax.value_and_grad(plan, has_aux=True))(*arguments)
        assert gradient.shape == (4, 5)
        for actual, wanted in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
            assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
            if not jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
                assert np.asarray(actual) == pytest.approx(np.asarray(wanted), rel=1e-6)


def test_what_is_generated_stays() -> None:
    """An array of zeros, a mask and a grid are made block by block, not kept in the program."""

    def make() -> Any:
        rows, columns = jnp.meshgrid(jnp.arange(64), jnp.arange(48), indexing="ij")
        return jnp.zeros((64, 48)), rows >= columns, jnp.where(rows > 3, rows * 0.5, 1.0)

    graph = trace(lambda w: (jnp.sum(w), make()), jnp.ones(3))
    assert not constants_of(graph)
    assert [layer.kind for layer in graph.layers] == ["reduce"]


def test_what_repeats_is_kept_once() -> None:
    """How many elements an average pooling without padding counts, the same for every sample."""

    def loss(w: Any, x: Any) -> Any:
        shape = (1, 3, 3, 1)
        ones = jnp.ones(x.shape)
        total, count = (
            lax.reduce_window(a, 0.0, lax.add, shape, (1,) * 4, "SAME") for a in (x * w, ones)
        )
        return jnp.mean((total / count) ** 2)

    graph = trace(loss, jnp.ones(4), jnp.ones((8, 6, 5, 4)))
    assert [value.shape for value in graph.constants] == [(1, 6, 5, 1)]
    assert [layer.kind for layer in graph.layers] == ["avg_pool", "reduce"]


def test_random_keys_stay() -> None:
    """Noise from a key made inside is the same for every strategy, and no constant."""

    def loss(w: Any, x: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(5), 1)
        order = jax.random.permutation(jax.random.PRNGKey(2), 4)
        return jnp.mean((x @ w + jax.random.normal(key, (8, 4)))[:, order] ** 2 * jnp.arange(4.0))

    arguments = jnp.ones((4, 4)), jnp.ones((8, 4))
    for strategy in ("data", "model"):
        plan = jaxlwp.parallelize(
            loss, *arguments, devices=8, strategy=strategy, rates=RATES, measure=False
        )
        assert not constants_of(plan.graph)
        assert float(plan(*arguments)) == pytest.approx(float(loss(*arguments)), rel=1e-5)


def test_large_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes them, or their operands, is evaluated in every step, as a layer."""

    def make() -> Any:
        return jnp.cumsum(jnp.ones((16, 4)), 0) * jnp.cumsum(jnp.ones((16, 4)), 1)

    for name in ("LARGEST_KNOWN", "LARGEST_CONSTANT"):
        with monkeypatch.context() as patch:
            patch.setattr(_constants, name, 32)
            graph = trace(lambda w: jnp.sum(w * make()), jnp.ones((16, 4)))
        # Of the second pair each is constant along a dimension, but not their product.
        left = ["cumulative", "cumulative", "join"] if name == "LARGEST_KNOWN" else []
        assert [layer.kind for layer in graph.layers] == [*left, "reduce"]
        assert len(graph.constants) == (0 if left else 2)


def test_loops_share_their_constants() -> None:
    """A loop's body that makes a filter makes it once; a long chain of equations is no problem."""

    def loss(w: Any, x: Any) -> Any:
        wave = jnp.ones(4)
        for _ in range(1500):
            wave = lax.rev(wave, (0,)) * 1.01 - 0.01 * wave
        for _ in range(20):
            x = jnp.tanh(x @ w * low_pass(4))
        return jnp.mean(x * wave)

    graph = trace(loss, jnp.ones((4, 4)), jnp.ones((8, 4)))
    assert len(graph.constants) == 2
    assert len(graph.layers) == 21


def test_nothing_else_is_known() -> None:
    """An array that is closed over inside another trace is none that can be evaluated."""

    @jax.jit
    def outer(hidden: Any) -> Any:
        graph = trace(lambda w: jnp.sum(w * jnp.sort(hidden)), jnp.ones(3))
        assert [layer.kind for layer in graph.layers] == ["sort", "reduce"]
        return hidden

    outer(jnp.ones(3))


@pytest.mark.parametrize("explicit", [True, False])
def test_with_a_mesh_set(explicit: bool) -> None:
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    arguments = jax.tree.map(np.asarray, wave_arguments())
    found = []

    @jax.jit
    def step(x: Any) -> Any:
        found.append(trace(vocoder, *arguments))
        return x

    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(kind,))):
        found.append(trace(vocoder, *arguments))
        step(1.0)
    assert [[value.shape for value in graph.constants] for graph in found] == [[(7, 1, 1)]] * 2


def test_derivatives_are_not_taken() -> None:
    """No gradient is summed for a constant, though it is of a kind that could have one."""
    graph = trace(vocoder, *wave_arguments())
    assert not graph.gradients.intersection(graph.program.constants)
    for layer in graph.layers:
        for use in layer.uses:
            assert use.value not in graph.program.constants
    total = sum(math.prod(value.shape) for value in graph.constants)
    assert total == 7
