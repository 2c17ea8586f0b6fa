"""Halos along several dimensions: every haloed tensor is written once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh

import jaxlwp
from jaxlwp import lower
from jaxlwp.check._verify import check_layers
from jaxlwp.cost._collectives import collectives_by_layer
from jaxlwp.lower._haloed import put_together, with_halo
from jaxlwp.lower._steps import Assemble, Dilate, Operate, Slice
from jaxlwp.plan._plan import bind

from .harness import compare
from .zoo import RATES

SPACE = ("depth", "height", "width")


def convolution(**options: Any) -> Callable[..., Any]:
    """Two convolutions of 2-D or 3-D arrays with a bias and an activation between them."""

    def loss(params: Any, x: Any) -> Any:
        names = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}[x.ndim]
        given = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
        for kernel in params["kernels"]:
            x = lax.conv_general_dilated(x, kernel, **given, dimension_numbers=names)
            x = jnp.sin(x + params["bias"])
        return jnp.sum(x**2)

    return loss


def circular(params: Any, x: Any) -> Any:
    """Convolutions whose padding wraps around."""
    for kernel in params["kernels"]:
        x = jnp.pad(x, [(0, 0), *[(1, 1)] * (x.ndim - 2), (0, 0)], mode="wrap")
        names = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=names)
        x = jnp.sin(x + params["bias"])
    return jnp.sum(x**2)


def pooling(params: Any, x: Any) -> Any:
    """Overlapping maxima: the padding holds the lowest number."""
    x = x * (params["bias"] + sum(map(jnp.mean, params["kernels"])))
    window, strides = (1, *[3] * (x.ndim - 2), 1), (1, *[2] * (x.ndim - 2), 1)
    return jnp.sum(lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME") ** 2)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "2-D": (convolution(), (2, 16, 12, 3)),
    "2-D, uneven": (convolution(), (2, 13, 11, 3)),
    "2-D, wrapped": (circular, (2, 16, 12, 3)),
    "2-D, strided": (convolution(window_strides=(2, 2)), (2, 22, 26, 3)),
    "2-D, transposed": (convolution(lhs_dilation=(2, 2), padding=[(1, 2)] * 2), (2, 7, 6, 3)),
    "2-D, thin blocks": (convolution(rhs_dilation=(3, 2)), (2, 8, 6, 3)),
    "2-D, maxima": (pooling, (2, 21, 16, 3)),
    "3-D": (convolution(), (1, 8, 6, 8, 3)),
    "3-D, uneven": (convolution(), (1, 7, 6, 5, 3)),
}


def arguments(shape: tuple[int, ...]) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = (*[3] * (len(shape) - 2), 3, 3)
    kernels = [jax.random.normal(key, kernel) / 3 for key in keys[:2]]
    return {"kernels": kernels, "bias": jnp.array([0.1, -0.2, 0.3])}, jax.random.normal(
        keys[2], shape
    )


def plan_of(name: str, mesh: Mesh) -> jaxlwp.Plan:
    """Every layer split along as many spatial dimensions as it has, over all devices."""
    loss, shape = PROGRAMS[name]
    given = arguments(shape)
    devices = jaxlwp.device_graph(mesh, rates=RATES)
    space = jaxlwp.price(jaxlwp.trace(loss, *given), devices)

    def wanted(configs: tuple[jaxlwp.Config, ...]) -> int:
        def key(i: int) -> tuple[int, int]:
            return len(configs[i].splits), sum(len(axes) for _, axes in configs[i].splits)

        only = [i for i, c in enumerate(configs) if all(name in SPACE for name, _ in c.splits)]
        return max(only, key=key)

    strategy = space.strategy("space", [wanted(configs) for configs in space.configs])
    out = jax.tree.structure(jax.eval_shape(loss, *given))
    return bind(space, strategy, mesh, given, out)


def copied(program: lower.DeviceProgram) -> list[str]:
    """Where a block that is put together is cut, or read by several steps.

    Its readers cannot all evaluate it on the fly, so the compiler writes it.
    """
    steps = list(lower.every_step(program.items))
    made = {block for s in steps if isinstance(s.op, Assemble | Dilate) for block in s.results}
    reads = Counter(block for step in steps for block in step.operands if block in made)
    found = [f"{block.shape} read {n} times" for block, n in reads.items() if n > 1]
    cut = (s.operands[0] for s in steps if isinstance(s.op, Slice))
    return found + [f"{block.shape} cut" for block in cut if block in made]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_haloed_block_is_read_but_by_its_operator(name: str, mesh222: Mesh) -> None:
    plan = plan_of(name, mesh222)
    steps = list(lower.every_step(plan.lowered.program.items))
    split = [len(s.op.haloed) for s in steps if isinstance(s.op, Operate)]
    assert max(split) == (3 if name.startswith("3-D") else 2)
    assert copied(plan.lowered.program) == []


def test_sees_a_copy(mesh222: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dimension after the other, each put together before the next one's rows are cut."""

    def eager(add: Any, *rest: Any) -> Any:
        return put_together(add, with_halo(add, *rest))

    monkeypatch.setattr("jaxlwp.lower._build.with_halo", eager)
    plan = plan_of("3-D", mesh222)
    assert copied(plan.lowered.program)


@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers_and_bytes(name: str, mesh222: Mesh) -> None:
    plan, (loss, shape) = plan_of(name, mesh222), PROGRAMS[name]
    assert all(layer.agrees for layer in check_layers(plan))
    given = arguments(shape)
    step = jax.jit(jax.value_and_grad(plan, (0, 1)), in_shardings=plan.shardings)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    actual = step(*jax.device_put(given, plan.shardings))
    assert max(compare(actual, expected).values()) <= 1e-4


def test_corners_travel_with_the_later_dimensions(mesh222: Mesh) -> None:
    """Two exchanges along each dimension, of blocks of 4 x 3 x 4 elements with 3 channels."""
    plan = plan_of("3-D", mesh222)
    configs = plan.strategy.for_graph(plan.graph)
    first = next(layer.index for layer in plan.graph.layers if layer.kind == "conv")
    sent = [
        collective.num_bytes
        for layer, collective in collectives_by_layer(plan.graph, configs, dict(mesh222.shape))
        if layer == first and collective.kind == "collective-permute"
    ]
    assert sent == [4 * 3 * n for n in (3 * 4, 3 * 4, 6 * 4, 6 * 4, 6 * 5, 6 * 5)]
