"""Convolutions whose operands XLA for processors would swap wrongly: it ends the process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxlwp
from jaxlwp.ops._swapped import ConvDim, _convolutions, _ends_xla, rows_to_add, with_rows
from tests import xla_flags

NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(windows: tuple[ConvDim, ...], x: Any, kernel: Any) -> Any:
    return lax.conv_general_dilated(
        x,
        kernel,
        [w.stride for w in windows],
        [(w.low, w.high) for w in windows],
        lhs_dilation=[w.base for w in windows],
        rhs_dilation=[w.dilation for w in windows],
        dimension_numbers=NUMBERS,
    )


def shapes(windows: tuple[ConvDim, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (2, *(w.rows for w in windows), 3), (*(w.kernel for w in windows), 3, 1)


def dims(seed: int, count: int) -> list[ConvDim]:
    """Random ones of which a convolution can be made."""
    generator, found = np.random.default_rng(seed), []
    while len(found) < count:
        sizes = {"rows": (1, 6), "kernel": (1, 6), "low": (0, 3), "high": (0, 3)}
        sizes |= {"base": (1, 4), "dilation": (1, 3), "stride": (1, 3)}
        w = ConvDim(**{name: int(generator.integers(*ends)) for name, ends in sizes.items()})
        if w.dilated_rows + w.low + w.high >= w.dilated_kernel:
            found.append(w)
    return found


def wrong_ones(each: int) -> list[tuple[ConvDim, ConvDim]]:
    """Convolutions that end the process, and ones whose gradients do: so many of each kind."""
    drawn = dims(0, 30_000)
    kinds: list[list[tuple[ConvDim, ConvDim]]] = [[], [], []]
    for pair in zip(drawn[::2], drawn[1::2], strict=True):
        for kind, windows in zip(kinds, _convolutions(pair), strict=True):
            if _ends_xla(windows) and len(kind) < each:
                kind.append(pair)
    assert all(len(kind) == each for kind in kinds), list(map(len, kinds))
    return [pair for kind in kinds for pair in kind]


def windows_of(eqn: Any) -> tuple[ConvDim, ...]:
    numbers, (x, kernel) = eqn.params["dimension_numbers"], (v.aval.shape for v in eqn.invars)
    return tuple(
        ConvDim(
            rows=x[numbers.lhs_spec[2 + i]],
            kernel=kernel[numbers.rhs_spec[2 + i]],
            low=eqn.params["padding"][i][0],
            high=eqn.params["padding"][i][1],
            base=eqn.params["lhs_dilation"][i],
            dilation=eqn.params["rhs_dilation"][i],
            stride=eqn.params["window_strides"][i],
        )
        for i in range(2)
    )


@pytest.mark.parametrize("seed", range(30))
def test_gradients_are_the_convolutions_that_jax_makes(seed: int) -> None:
    windows = tuple(dims(seed, 2))
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(windows))

    def total(x: Any, kernel: Any) -> Any:
        return convolve(windows, x, kernel).sum()

    made = jax.make_jaxpr(jax.grad(total, (0, 1)))(x, kernel)
    found = [windows_of(e) for e in made.eqns if e.primitive.name == "conv_general_dilated"]
    forward, of_kernel, of_input = _convolutions(windows)
    assert {of_kernel, of_input} <= set(found) <= {forward, of_kernel, of_input}


def test_rows_of_zeros_change_nothing_and_help() -> None:
    for windows in wrong_ones(6):
        added = rows_to_add(windows)
        padded = [*map(with_rows, windows, added)]
        assert any(added) and not any(map(_ends_xla, _convolutions(padded)))
        assert [w.made for w in padded] == [w.made for w in windows]


def test_what_xla_compiles_stays_as_it_is() -> None:
    one = ConvDim(rows=8, kernel=3, low=1, high=1, base=1, dilation=1, stride=1)
    up = ConvDim(rows=8, kernel=2, low=1, high=1, base=2, dilation=1, stride=1)
    down = ConvDim(rows=8, kernel=2, low=0, high=0, base=1, dilation=1, stride=2)
    for pair in itertools.product((one, up, down), repeat=2):
        assert rows_to_add(pair) == (0, 0)


def test_plans_with_such_convolutions_run() -> None:
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.simulated(2)}
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_swapped import run_them; run_them()"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_them() -> None:
    """Loss and gradients of plans, beside JAX without XLA's simplifier. In a process of its own."""
    jax.config.update("jax_enable_x64", True)
    ones = wrong_ones(4)
    generator = np.random.default_rng(0)
    params, inputs = (
        [jnp.asarray(generator.standard_normal(shapes(windows)[place])) for windows in ones]
        for place in (1, 0)
    )

    def loss(params: Any, inputs: Any) -> Any:
        # What inputs are shifted by is a parameter, so that they have gradients.
        shifted = [x + y for x, y in zip(inputs, params["shifts"], strict=True)]
        parts = map(convolve, ones, shifted, params["kernels"])
        return sum((part**2).mean() for part in parts)

    params = {"kernels": params, "shifts": [0.5 * x[:1] for x in inputs]}
    step = jax.jit(jax.value_and_grad(loss), compiler_options={"xla_disable_hlo_passes": "algsimp"})
    expected = jax.tree.leaves(step(params, inputs))
    rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
    for strategy in ("data", "spatial"):
        plan = jaxlwp.parallelize(loss, params, inputs, strategy=strategy, rates=rates)
        found = jax.tree.leaves(jax.jit(jax.value_and_grad(plan))(params, inputs))
        for ours, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-12)
