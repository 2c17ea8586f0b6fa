"""What users do that tests rarely try: own meshes, own derivatives, printing before training.

Each of these once computed wrong numbers, raised, or ran what nobody had priced (commit 8ccba7b).
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.plan._plan import bind

RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
NHWC = ("NHWC", "HWIO", "NHWC")
KINDS = ("Auto", "Explicit")


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], kind: str = "Auto") -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))], dtype=object)
    return Mesh(devices.reshape(shape), names, axis_types=(getattr(AxisType, kind),) * len(shape))


def planned(loss: Any, *arguments: Any, **options: Any) -> jaxlwp.Plan:
    return jaxlwp.parallelize(loss, *arguments, rates=RATES, measure=False, **options)


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def assert_trains(plan: jaxlwp.Plan, loss: Any, *arguments: Any) -> None:
    """Loss and gradients of one device, and what is priced in the program."""
    expected = jax.jit(jax.value_and_grad(loss))(*arguments)
    assert_same(jax.jit(jax.value_and_grad(plan))(*arguments), expected)
    wrong = [layer for layer in check_layers(plan) if not layer.agrees]
    assert not wrong, wrong


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def convolution(kernel: Any, x: Any) -> Any:
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    return jnp.sum(y**2)


IMAGES, KERNEL = normal(0, 2, 32, 8, 2), normal(1, 3, 3, 2, 4)

# --- the order of mesh axes -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (2, 3)], ids=str)
def test_a_mesh_whose_sizes_rise(shape: tuple[int, ...]) -> None:
    mesh = mesh_of(shape, ("data", "model"))
    plan = planned(convolution, KERNEL, IMAGES, mesh=mesh, strategy="spatial")
    assert_trains(plan, convolution, KERNEL, IMAGES)


def test_a_pin_against_the_order_of_the_mesh() -> None:
    graph = jaxlwp.trace(convolution, KERNEL, IMAGES)
    pins = jaxlwp.Constraints(pin={graph.layers[0].name: {"height": ("device2", "device0")}})
    plan = planned(convolution, KERNEL, IMAGES, devices=8, constraints=pins)
    assert plan.strategy.configs[graph.layers[0].name].axes("height") == ("device2", "device0")
    assert_trains(plan, convolution, KERNEL, IMAGES)


def test_a_mesh_of_the_same_axes_in_another_order() -> None:
    plan = planned(
        convolution, KERNEL, IMAGES, mesh=mesh_of((4, 2), ("b", "a")), strategy="spatial"
    )
    other = bind(
        plan.space, plan.strategy, mesh_of((2, 4), ("a", "b")), (KERNEL, IMAGES), plan.out_tree
    )
    assert_trains(other, convolution, KERNEL, IMAGES)


def test_axes_of_size_one_cost_nothing() -> None:
    for shape, names in (((1,), ("a",)), ((1, 4, 1), ("a", "b", "c"))):
        mesh = mesh_of(shape, names)
        for strategy in ("search", "spatial"):
            plan = planned(convolution, KERNEL, IMAGES, mesh=mesh, strategy=strategy)
            assert {axis for c in plan.collectives for axis in c.axes} <= {"b"}
            assert_trains(plan, convolution, KERNEL, IMAGES)
    pins = jaxlwp.Constraints(pin={"*": {"height": ("c", "b")}})
    plan = planned(convolution, KERNEL, IMAGES, mesh=mesh, constraints=pins)
    assert all(config.axes("height") == ("b",) for config in plan.strategy.configs.values())


# --- meshes of today's JAX ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_set", [False, True], ids=["given", "set"])
def test_meshes(kind: str, is_set: bool) -> None:
    """Printed, verified, called with arguments placed by the plan, by the user, or not at all."""
    mesh = mesh_of((2, 4), ("data", "model"), kind)
    expected = jax.jit(jax.value_and_grad(convolution))(KERNEL, IMAGES)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        options = {} if is_set else {"mesh": mesh}
        plan = planned(convolution, KERNEL, IMAGES, strategy="spatial", **options)
        assert plan.mesh == mesh
        assert "height=8" in repr(plan)
        assert plan.memory.peak_bytes > 0
        assert not jaxlwp.verify(plan).disagreeing
        for placed in (
            (KERNEL, IMAGES),
            (plan.place(KERNEL), plan.place_batch(IMAGES)),
            tuple(jax.device_put((KERNEL, IMAGES), whole)),
            (np.asarray(KERNEL), np.asarray(IMAGES)),
        ):
            assert_same(jax.jit(jax.value_and_grad(plan))(*placed), expected)
            assert_same(plan(*placed), expected[0])

        def step(kernel: Any, x: Any) -> Any:
            value, gradient = jax.value_and_grad(plan)(kernel, x)
            return kernel - 0.1 * gradient, value

        kernel, _ = jax.jit(step)(plan.place(KERNEL), plan.place_batch(IMAGES))
        assert_same(kernel, KERNEL - 0.1 * expected[1])
        planned(convolution, KERNEL, IMAGES, memory_bytes=1e9, **options)


def test_a_plan_of_another_mesh_than_the_one_set() -> None:
    plan = planned(convolution, KERNEL, IMAGES, devices=4)
    with (
        jax.set_mesh(mesh_of((2, 4), ("data", "model"))),
        pytest.raises(
            ValueError, match=r"plan: it is for the mesh .*'device0': 2.* is set"
        ) as error,
    ):
        plan(KERNEL, IMAGES)
    assert "\n" not in str(error.value)


def test_measuring_under_a_mesh(quick_measurements: None) -> None:
    with jax.set_mesh(mesh_of((2, 4), ("data", "model"), "Explicit")):
        plan = jaxlwp.parallelize(convolution, KERNEL, IMAGES)
        assert_same(plan(KERNEL, IMAGES), convolution(KERNEL, IMAGES))


# --- derivatives of the user's own ----------------------------------------------------------------


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (-jnp.clip(g, -0.01, 0.01),))


@jax.custom_vjp
def ones_back(x: Any) -> Any:
    return 2 * x


ones_back.defvjp(lambda x: (2 * x, x), lambda x, g: (jnp.ones_like(x),))


@jax.custom_vjp
def cross_entropy(logits: Any, labels: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def cross_entropy_back(saved: Any, g: Any) -> Any:
    logits, labels = saved
    off = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[1])
    return g * off / len(labels), None


cross_entropy.defvjp(lambda x, y: (cross_entropy(x, y), (x, y)), cross_entropy_back)

PARAMS = {"w": normal(1, 6, 4), "s": normal(2, 8, 6), "logits": normal(3, 8, 4), "one": jnp.ones(1)}
X, Y = normal(0, 8, 6), jnp.arange(8) % 4


def read_twice(p: Any, x: Any, y: Any) -> Any:
    hidden, scaled = clipped(x @ p["w"]), clipped(x * p["s"])
    twice = jnp.mean(hidden * 2) + 0.1 * jnp.mean(hidden * hidden)
    return twice + jnp.mean(scaled * scaled) + jnp.mean(scaled)


def on_weights(p: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ clipped(p["w"])) ** 2) + jnp.mean(clipped(p["s"]) * x)


def of_labels(p: Any, x: Any, y: Any) -> Any:
    return cross_entropy(x @ p["w"] * jnp.mean(p["s"]), y)


def of_arguments(p: Any, x: Any, y: Any) -> Any:
    whole = cross_entropy(p["logits"], y) + jnp.sum(ones_back(p["one"]))
    return whole + jnp.sum(ones_back(p["w"])) + jnp.mean((x + ones_back(p["s"])[:, :1]) ** 2)


def checkpointed(p: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ jax.checkpoint(lambda w: clipped(w) * 2)(p["w"])) ** 2)


@pytest.mark.parametrize(
    "loss",
    [read_twice, on_weights, of_labels, of_arguments, checkpointed],
    ids=lambda f: f.__name__,
)
def test_custom_derivatives(loss: Any) -> None:
    """Right for every strategy, before and after the plan is printed."""
    mesh = mesh_of((2, 4), ("a", "b"))
    for strategy in ("search", "data", "model"):
        plan = planned(loss, PARAMS, X, Y, mesh=mesh, strategy=strategy)
        expected = jax.jit(jax.value_and_grad(loss))(PARAMS, X, Y)
        assert_same(jax.jit(jax.value_and_grad(plan))(PARAMS, X, Y), expected)
        assert repr(plan)
        assert_trains(plan, loss, PARAMS, X, Y)


# --- what is returned -----------------------------------------------------------------------------


def test_what_is_made_of_arguments_alone_is_priced() -> None:
    def loss(kernel: Any, x: Any) -> Any:
        return convolution(kernel, x), (x > 0, jnp.tanh(x) + 1, jnp.sum(kernel))

    mesh = mesh_of((2, 4), ("a", "b"))
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(KERNEL, IMAGES)
    for strategy in ("search", "spatial", "model"):
        plan = planned(loss, KERNEL, IMAGES, mesh=mesh, strategy=strategy)
        check = jaxlwp.verify(plan)
        assert not check.disagreeing, check.disagreeing
        assert check.predicted_bytes_by_kind == check.compiled_bytes_by_kind
        got = jax.jit(jax.value_and_grad(plan, has_aux=True))(KERNEL, IMAGES)
        assert all(map(np.array_equal, got[0][1][:1], expected[0][1][:1]))
        assert_same((got[0][0], got[1]), (expected[0][0], expected[1]))


# --- calls ----------------------------------------------------------------------------------------


def weighted(params: Any, x: Any, y: Any = None, *, scale: Any, mask: Any = None) -> Any:
    return jnp.sum((x @ params - y) ** 2 * (1 if mask is None else mask)) * scale


W, TARGET, MASK = normal(0, 6, 4), normal(1, 8, 4), jnp.arange(32.0).reshape(8, 4)


def test_arguments_by_name() -> None:
    scale = jnp.float32(2)
    plan = planned(weighted, W, X, TARGET, devices=8, strategy="data", scale=scale, mask=MASK)
    expected = jax.value_and_grad(weighted)(W, X, TARGET, scale=scale, mask=MASK)
    for call in (
        lambda w: plan(w, X, TARGET, scale=scale, mask=MASK),
        lambda w: plan(w, y=TARGET, x=X, mask=MASK, scale=scale),
        lambda w: plan(params=w, x=X, y=TARGET, mask=MASK, scale=scale),
    ):
        assert_same(jax.jit(jax.value_and_grad(call))(W), expected)
    x, y, named = plan.place_batch(X, y=TARGET, mask=MASK, scale=scale)
    share = jax.tree.map(
        lambda whole, own: whole[own], (X, TARGET, {"mask": MASK, "scale": scale}), plan.local_batch
    )
    assert_same(share, (X, TARGET, {"mask": MASK, "scale": scale}))  # one process feeds all
    assert named["mask"].sharding == plan.keyword_shardings["mask"] != named["scale"].sharding
    assert_same(plan(plan.place(W), x, y, **named), expected[0])
    check = jaxlwp.verify(plan, W, X, TARGET, keywords=named)
    assert check.measured_s is not None and not check.disagreeing
    assert_same(plan.rebind(X[:4], TARGET[:4], keywords={"scale": scale})(W, X[:4], TARGET[:4],
        scale=scale), weighted(W, X[:4], TARGET[:4], scale=scale))  # fmt: skip


def test_names_that_the_function_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"parallelize: weighted\(.*unexpected keyword.*scael"):
        planned(weighted, W, X, TARGET, scale=1.0, scael=1.0)
    plan = planned(weighted, W, X, TARGET, devices=8, scale=1.0)
    with pytest.raises(ValueError, match=r"plan: weighted\(.*missing.*'scale'"):
        plan(W, X, y=TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "8"}, r"devices: '8' is a str; give a number of devices"),
        ({"devices": 8.0}, r"devices: 8.0 is a float; give"),
        ({"optimizer": optax.sgd}, r"optimizer: sgd is a function; give an optax transformation"),
        ({"optimizer": "adam"}, r"optimizer: 'adam' is a str; give an optax transformation"),
        ({"mesh": "data"}, r"mesh: 'data' is a str; give a jax.sharding.Mesh"),
        ({"strategy": 3}, r"strategy: 3 is a int; give 'search'"),
        ({"rates": 1e12}, r"rates: 1000000000000.0 is a float; give jaxlwp.Rates"),
        ({"memory_bytes": "80GB"}, r"memory_bytes: '80GB' is a str; give a positive number"),
        ({"memory_bytes": -1}, r"memory_bytes: -1 is a int; give a positive number"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_arguments_of_a_wrong_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        jaxlwp.parallelize(convolution, KERNEL, IMAGES, **{"rates": RATES, **options})
    assert "\n" not in str(error.value)


# --- what XLA gets wrong --------------------------------------------------------------------------


def test_updates_out_of_range() -> None:
    """Start indices beyond the end are clamped, in gradients too, whatever block a device has."""

    def loss(p: Any, x: Any) -> Any:
        y = jnp.tanh(x * p["s"])
        z = lax.dynamic_update_slice(y, y[:, :6] * p["w"], (0, 9, 0))
        return jnp.sum(z**2) + jnp.sum(3 * lax.dynamic_slice(z, (0, 9, 0), (4, 6, 2)))

    params, x = {"s": normal(0, 2), "w": normal(1, 4, 1, 2)}, normal(2, 4, 7, 2)
    graph = jaxlwp.trace(loss, params, x)
    a, b = ("a",), ("b",)
    splits = [{"length": a}, {"sample": b}, *[{"sample": b, "channel": a}] * 2]
    splits += [{"sample": b, "length": a}, {}]
    names = [layer.name for layer in graph.layers]
    pins = jaxlwp.Constraints(pin=dict(zip(names, map(jaxlwp.Config.of, splits), strict=True)))
    plan = planned(loss, params, x, mesh=mesh_of((2, 4), ("a", "b")), constraints=pins)
    assert_trains(plan, loss, params, x)
