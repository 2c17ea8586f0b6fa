"""Contract 2 without a compiler: of every layer, what is priced is in the program for XLA.

`check_layers` counts the collectives of the differentiated program, layer by layer, and sets them
against those priced. Strategies are drawn from the whole space, every order of mesh axes, so
neighbours disagree wherever they can, and values with several readers are wanted in several
layouts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh

import jaxlwp
from jaxlwp.check._hlo import bytes_by_kind, compiled_collectives
from jaxlwp.check._verify import check_layers
from jaxlwp.cost._collectives import collectives_by_layer
from jaxlwp.plan._plan import bind

from .harness import draw_seed, drawn
from .zoo import LARGE, RATES, ZOO, case, random_batch

SEED = draw_seed()
SLOW = {*LARGE, "unet3d", "convnext_t"}
OUT = jax.tree.structure(0.0)
SHAPES = ((2, 4), (4, 2), (2, 2, 2), (2, 1, 3), (3, 2))


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    names = tuple("abc"[: len(shape)])
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def space_on(mesh: Mesh, graph: jaxlwp.graph.ComputationGraph) -> jaxlwp.cost.SearchSpace:
    rates = jaxlwp.device_graph(mesh, rates=RATES)
    return jaxlwp.price(graph, rates, interchangeable=False)


def disagreeing(plan: jaxlwp.Plan) -> list[str]:
    return [
        f"{layer.name} [{layer.config}]: priced {layer.predicted}, program {layer.program}"
        for layer in check_layers(plan)
        if not layer.agrees
    ]


def check(
    space: jaxlwp.cost.SearchSpace, mesh: Mesh, loss: Any, arguments: Any, draws: int
) -> None:
    """The strategy found, the baselines, and random strategies of a space."""
    rng = random.Random(SEED)
    out = jax.tree.structure(jax.eval_shape(loss, *arguments))
    strategies = [jaxlwp.search(space).strategy]
    for name in jaxlwp.BASELINES:
        try:
            strategies.append(space.baseline(name))
        except ValueError:  # a batch that the devices do not divide
            continue
    for n in range(draws):
        choices = [rng.randrange(len(configs)) for configs in space.configs]
        strategies.append(space.strategy(f"random {n}", choices))
    wrong = {}
    for strategy in strategies:
        if found := disagreeing(bind(space, strategy, mesh, arguments, out)):
            wrong[strategy.name] = found
    assert not wrong, f"{SEED=}, {len(wrong)} of {len(strategies)}: {list(wrong.items())[:3]}"


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", drawn(ZOO, 0.15, slow=SLOW))
def test_networks(name: str) -> None:
    this = case(name, SEED)
    mesh = mesh_of((2, 4))
    arguments = (this.params, this.stats, *random_batch(name, SEED))
    check(space_on(mesh, this.space.graph), mesh, this.loss, arguments, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_networks_random(name: str) -> None:
    this = case(name, SEED)
    mesh = mesh_of((2, 2, 2))
    arguments = (this.params, this.stats, *random_batch(name, SEED))
    check(space_on(mesh, this.space.graph), mesh, this.loss, arguments, 20)


# --- blocks ---------------------------------------------------------------------------------------


def conv(x: Any, features: int, size: int = 3) -> Any:
    return nn.Conv(features, (size, size))(x)


class Bottleneck(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.BatchNorm(use_running_average=False)(conv(x, 4, 1)))
        y = nn.relu(nn.BatchNorm(use_running_average=False)(conv(y, 4)))
        return nn.relu(x + nn.BatchNorm(use_running_average=False)(conv(y, 8, 1)))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + conv(nn.relu(conv(x, 8)), 8)


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = nn.avg_pool(x, (3, 3), padding="SAME")
        paths = [
            conv(x, 4, 1),
            conv(conv(x, 4, 1), 4),
            conv(conv(x, 4, 1), 4, 5),
            conv(pooled, 4, 1),
        ]
        return jnp.concatenate(paths, -1)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.concatenate([x, conv(nn.relu(nn.GroupNorm(2)(x)), 4)], -1)
        return x


class Down(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = conv(nn.max_pool(nn.relu(conv(x, 8)), (2, 2), (2, 2)), 8)
        up = nn.ConvTranspose(8, (2, 2), (2, 2))(inner)
        return conv(jnp.concatenate([x, up], -1), 4)


class Checkpointed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(3):
            x = nn.remat(Residual)(name=f"block{n}")(x)
        return x


class Nested(nn.Module):
    """A checkpoint in a checkpoint, and tensors that are read inside both and after them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(nn.remat(Checkpointed)()(x), 8)
        return x + nn.remat(Around)()(x)


class Around(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.GroupNorm(2)(x)
        return jnp.concatenate([x, nn.remat(Residual)()(x), conv(x, 8)], -1)[..., :8]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": Bottleneck,
    "residual": Residual,
    "inception": Inception,
    "dense": Dense,
    "unet": Down,
    "checkpointed": Checkpointed,
    "nested": Nested,
}


def block(name: str) -> tuple[Any, tuple[Any, Any]]:
    """Loss and arguments of a block between two layers."""
    model = BLOCKS[name]()
    x = jax.random.normal(jax.random.key(SEED), (6, 10, 8, 8))
    variables = model.init(jax.random.key(1), x)
    params = variables.pop("params")

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        given = {"params": params, **variables}
        y = model.apply(given, x, mutable=["batch_stats"])[0]
        return jnp.mean(y**2), jnp.tanh(x)

    return loss, (params, x)


def check_block(name: str, shape: tuple[int, ...], draws: int) -> None:
    mesh = mesh_of(shape)
    loss, arguments = block(name)
    check(space_on(mesh, jaxlwp.trace(loss, *arguments)), mesh, loss, arguments, draws)


@pytest.mark.parametrize("name", drawn(BLOCKS, 0.5))
def test_blocks(name: str) -> None:
    check_block(name, SHAPES[SEED % len(SHAPES)], 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_random(name: str, shape: tuple[int, ...]) -> None:
    check_block(name, shape, 200)


class Snake(nn.Module):
    """A learned activation: scalars for each channel, behind a reshape."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(2):
            x = conv(x, 8)
            alpha = self.param(f"alpha{n}", nn.initializers.ones, (8,)).reshape(1, 1, 1, 8)
            x = x + jnp.sin(alpha * x) ** 2 / (alpha + 1e-9)
        return x


BLOCKS["snake"] = Snake


# --- compiled -------------------------------------------------------------------------------------


def by_kind(collectives: Iterable[Any], scattered: bool) -> Counter[str]:
    """Bytes by kind; processors have no reduce-scatter: XLA makes it of an all-reduce."""
    total: Counter[str] = Counter()
    for collective in collectives:
        kind = collective.kind
        kind = "all-reduce" if scattered and kind == "reduce-scatter" else kind
        total[kind] += collective.num_bytes
    return +total


def sums(numbers: Iterable[int]) -> set[int]:
    """What some of the numbers add up to."""
    found = {0}
    for number in numbers:
        found |= {one + number for one in found}
    return found


def check_compiled(name: str, shape: tuple[int, ...], draws: int) -> None:
    """The programs that XLA makes have the bytes priced, of every kind of collective.

    But for the last layer, the mean of squares: where its input is whole on every device, the
    gradient of each device's part is that part times a number. XLA sees that gathering it gives the
    input again, times that number, and does not gather.
    """
    mesh = mesh_of(shape)
    loss, arguments = block(name)
    space = space_on(mesh, jaxlwp.trace(loss, *arguments))
    rng, out = random.Random(SEED), jax.tree.structure(jax.eval_shape(loss, *arguments))
    last = space.graph.homes[space.graph.program.outputs[0]][0]
    wrong, equal = [], 0
    for n in range(draws):
        choices = [rng.randrange(len(configs)) for configs in space.configs]
        plan = bind(space, space.strategy(f"random {n}", choices), mesh, arguments, out)
        step = jax.jit(
            jax.value_and_grad(plan, has_aux=True),
            in_shardings=plan.shardings,
            out_shardings=((None, None), plan.param_shardings),
        )
        found = Counter(
            bytes_by_kind(compiled_collectives(step.lower(*arguments).compile().as_text()))
        )
        scattered = any(c.kind == "reduce-scatter" for c in plan.collectives)
        if scattered:
            found["all-reduce"] += found.pop("reduce-scatter", 0)
        priced = by_kind(plan.collectives, scattered)
        configs = plan.strategy.for_graph(space.graph)
        spared = sums(
            collective.num_bytes
            for layer, collective in collectives_by_layer(
                space.graph, configs, space.devices.axis_sizes
            )
            if layer == last and collective.kind == "all-gather" and collective.backward
        )
        equal += priced == +found
        missing = {kind: priced[kind] - found[kind] for kind in {*priced, *found}}
        if missing.pop("all-gather", 0) not in spared or any(missing.values()):
            wrong.append((choices, priced, found))
    assert not wrong, f"{SEED=}, {len(wrong)} of {draws}: {wrong[:3]}"
    print(f"{name} on {shape}: {equal} of {draws} equal")


# XLA undoes checkpoints on processors.
COMPILED = [name for name in BLOCKS if name not in ("checkpointed", "nested")]


@pytest.mark.parametrize("name", drawn(COMPILED, 0.5))
def test_compiled(name: str) -> None:
    check_compiled(name, SHAPES[SEED % len(SHAPES)], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_random(name: str, shape: tuple[int, ...]) -> None:
    check_compiled(name, shape, 4)


# --- checkpoints ----------------------------------------------------------------------------------


def by_size(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A policy of the user's own that looks at its operands."""
    return bool(operands) and operands[0].size > 8


POLICIES = {
    "own": by_size,
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "others": jax.checkpoint_policies.save_anything_except_these_names("hidden"),
}


@pytest.mark.parametrize("outer", ["", *POLICIES])
def test_checkpoints_in_checkpoints(outer: str) -> None:
    """What a policy keeps is not evaluated again, for the call itself and for those inside it."""
    mesh = mesh_of((2,))
    params = {name: np.ones((4, 4), np.float32) for name in "abc"}
    x = np.ones((2, 4), np.float32)
    # With the coming `jax_remat3` JAX evaluates more again where calls are nested.
    one_call = outer and getattr(jax.config, "jax_remat3", False)
    for inner in [""] if one_call else ["", *POLICIES]:

        def first(params: Any, x: Any) -> Any:
            hidden = checkpoint_name(jnp.sin(x @ params["a"]), "hidden")
            return jnp.sin(hidden @ params["b"])

        def both(params: Any, x: Any, inner: str = inner) -> Any:
            inside = jax.checkpoint(first, policy=POLICIES[inner]) if inner else first
            return jnp.sin(inside(params, x) @ params["c"])

        def loss(params: Any, x: Any, both: Any = both) -> Any:
            whole = jax.checkpoint(both, policy=POLICIES[outer]) if outer else both
            return jnp.mean(whole(params, x) ** 2)

        space = space_on(mesh, jaxlwp.trace(loss, params, x))
        choices = [
            next((n for n, config in enumerate(configs) if config.axes("reduction")), 0)
            for configs in space.configs
        ]
        plan = bind(space, space.strategy("reduction", choices), mesh, (params, x), OUT)
        assert any(layer.predicted for layer in check_layers(plan))
        assert not disagreeing(plan), (outer, inner)


LINEAR_BY_INDEX = {
    "scatter-add": lambda x, at: x.at[:, at].add(1.5),
    "scatter": lambda x, at: x.at[:, at].set(1.5),
    "scatter-mul": lambda x, at: x.at[:, at].multiply(1.5),
    "gather": lambda x, at: x[:, at],
    "dynamic_slice": lambda x, at: jax.lax.dynamic_slice_in_dim(x, at[0], 2, axis=1),
    "cumsum": lambda x, at: jnp.cumsum(x, axis=1),
    "cumlogsumexp": lambda x, at: jax.lax.cumlogsumexp(x, axis=1),
    "fft": lambda x, at: jnp.fft.irfft(jnp.fft.rfft(x)),
    "sort": lambda x, at: jnp.sort(x, axis=1),
    "max": lambda x, at: x.max(axis=1, keepdims=True),
}
"""Operators with rules and without; the derivatives of some need no operand, or its index alone."""


@pytest.mark.parametrize("name", LINEAR_BY_INDEX)
def test_what_is_evaluated_again_is_what_the_derivative_reads(name: str) -> None:
    """A value that is gathered for an operator in a checkpointed call, split before it."""
    mesh = mesh_of((2, 3))
    x, at = np.arange(1.0, 37, dtype=np.float32).reshape(6, 6), np.array([1, 4])
    arguments = x, x, at

    def loss(params: Any, x: Any, at: Any) -> Any:
        y = jnp.sin(x @ params)

        @jax.checkpoint
        def call(y: Any) -> Any:
            return LINEAR_BY_INDEX[name](y, at)

        return jnp.mean(call(y) ** 2)

    space = space_on(mesh, jaxlwp.trace(loss, *arguments))
    rng, out = random.Random(SEED), jax.tree.structure(0.0)
    for n in range(8):
        choices = [rng.randrange(len(configs)) for configs in space.configs]
        plan = bind(space, space.strategy(f"random {n}", choices), mesh, arguments, out)
        wrong = [row for row in check_layers(plan) if not row.agrees]
        assert not wrong, f"{SEED=}, {choices}: {wrong}"
