"""Memory: the state against arrays that are there, buffers against programs worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh

from jaxlwp import BASELINES, Config, Plan, Rates, parallelize
from jaxlwp.cli._workload import load_workload
from jaxlwp.devices import BUCKET_BYTES
from jaxlwp.kernels import Builder, fuse
from jaxlwp.memory._buffers import _order, predict
from jaxlwp.memory._memory import (
    differentiated,
    memory_costs,
    strategy_memory,
)
from jaxlwp.plan._plan import OPTIMIZER, plan_memory
from jaxlwp.program import flatten
from jaxlwp.space._strategy import make_strategy

RATES = Rates(flops_per_s=1e11, memory_bytes_per_s=1e10)
DIMS = ("NHWC", "HWIO", "NHWC")
F32 = 4


def _conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=DIMS)


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _predicted(step: Callable[..., Any], *arguments: Any, trained: int) -> Any:
    """Buffers of loss and gradients by the first `trained` arguments, on one device."""

    def program(*arguments: Any) -> tuple[Any, ...]:
        wanted = tuple(range(trained))
        value, gradients = jax.value_and_grad(step, argnums=wanted)(*arguments)
        return (*gradients, value)

    flat = flatten(jax.make_jaxpr(program)(*arguments), derivatives=False)
    return predict(flat, {n: n for n in range(trained)}, loss=trained)


def _kept(buffers: Any) -> list[int]:
    """Bytes of what is kept, filters and scalars left out, largest first."""
    kept = (node.num_bytes for node in buffers.kept if node.kind != "filter")
    return sorted((num_bytes for num_bytes in kept if num_bytes > 64), reverse=True)


@functools.cache
def _lenet() -> Any:
    return load_workload("models.lenet:LeNet5", batch=16)


# --- the state, against arrays ---------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["search", "model", "spatial"])
def test_state_is_as_large_as_its_arrays(mesh222: Mesh, strategy: str) -> None:
    work = _lenet()
    plan = parallelize(
        work.loss, work.params, *work.batch, mesh=mesh222, strategy=strategy, rates=RATES
    )
    momentum, adam = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    memory = plan_memory(plan, momentum)
    for predicted, placed in (
        (memory.parameter_bytes, plan.place(work.params)),
        (memory.optimizer_bytes, plan.place(momentum.init(work.params))),
        (plan_memory(plan, adam).optimizer_bytes, plan.place(adam.init(work.params))),
        (memory.batch_bytes, plan.place_batch(*work.batch)),
    ):
        leaves = jax.tree.leaves(placed)
        assert predicted == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def test_memory_is_that_of_the_optimizer_given(mesh22: Mesh) -> None:
    work, adam = _lenet(), optax.adam(0.1)
    options = {"mesh": mesh22, "rates": RATES}
    plan = parallelize(work.loss, work.params, *work.batch, optimizer=adam, **options)
    plain = parallelize(work.loss, work.params, *work.batch, **options)
    assert plan.memory == plan_memory(plain, adam) != plain.memory
    assert plan.rebind(*work.batch).memory.optimizer_bytes == plan.memory.optimizer_bytes
    assert plan_memory(plan, OPTIMIZER) == plain.memory


def test_plan_tells_its_memory(mesh22: Mesh) -> None:
    work = load_workload("models.lenet:LeNet5", batch=16, abstract=True)
    plan = parallelize(work.loss, work.params, *work.batch, mesh=mesh22, rates=RATES)
    assert plan.memory == plan_memory(plan)
    assert plan.memory.peak_bytes > plan.memory.argument_bytes + plan.memory.kept_bytes > 0
    assert sum(plan.memory.layer_kept_bytes) == plan.memory.kept_bytes


# --- what is kept, by hand -------------------------------------------------------------------


def test_chain_of_dense_layers_keeps_the_operands_of_its_products() -> None:
    """An activation that costs nothing to evaluate again is kept as what it is made of."""

    def loss(w1: Any, w2: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.sin(x @ w1) @ w2))

    buffers = _predicted(loss, _array(8, 64), _array(64, 32), _array(128, 8), trained=2)
    first, second = 128 * 64 * F32, 128 * 32 * F32
    # The product of each layer, from which the cosine is evaluated, and the sine of the first,
    # which the second layer's product and the gradient of its weight read.
    assert _kept(buffers) == [first, first, second]


def test_elementwise_chain_is_not_kept() -> None:
    def loss(w: Any, x: Any) -> Any:
        y = x @ w
        return jnp.sum(jnp.exp(jnp.sin(y) * 2 + 1) - y)

    assert _kept(_predicted(loss, _array(8, 64), _array(128, 8), trained=1)) == [128 * 64 * F32]


def test_result_is_kept_if_the_derivative_is_made_of_it() -> None:
    def loss(w1: Any, w2: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w1) @ w2))

    buffers = _predicted(loss, _array(8, 64), _array(64, 32), _array(128, 8), trained=2)
    assert _kept(buffers) == [128 * 64 * F32, 128 * 32 * F32]


def test_checkpoint_keeps_what_it_reads_only() -> None:
    def layer(x: Any, w: Any) -> Any:
        return jnp.sin(x @ w)

    def loss(wrap: Callable[[Any], Any], *arguments: Any) -> Any:
        *weights, x = arguments
        for w in weights:
            x = wrap(layer)(x, w)
        return jnp.sum(x)

    arguments = [*[_array(64, 64)] * 4, _array(256, 64)]
    kept = {
        wrap: sum(_kept(_predicted(lambda *a: loss(wrap, *a), *arguments, trained=4)))  # noqa: B023
        for wrap in (lambda f: f, jax.checkpoint)
    }
    plain, checkpointed = kept.values()
    size = 256 * 64 * F32
    assert plain == 7 * size  # four products, sines of three
    assert checkpointed == 3 * size


def test_max_pooling_keeps_zeros_and_finds_places() -> None:
    def loss(w1: Any, w2: Any, x: Any) -> Any:
        y = lax.reduce_window(
            jnp.maximum(_conv(x, w1), 0), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        return jnp.sum(_conv(y, w2) ** 2)

    arguments = _array(3, 3, 3, 16), _array(3, 3, 16, 16), _array(4, 32, 32, 3)
    buffers = _predicted(loss, *arguments, trained=2)
    before, after = 4 * 32 * 32 * 16 * F32, 4 * 16 * 16 * 16 * F32
    # What relu reads, zeros for relu and the scatter, what is pooled, and the second result.
    assert _kept(buffers)[:2] == [before, before]
    assert after in _kept(buffers)
    # A number and four places for each element that was pooled.
    assert {node.num_bytes for node in buffers.live if node.kind == "places"} <= {5 * after}


@pytest.mark.parametrize("skip", [False, True])
def test_gradient_of_max_pooling_is_scattered_into_what_it_is_added_to(skip: bool) -> None:
    """Into zeros, which takes an array of them; or into the gradient of a skip connection."""

    def loss(w: Any, x: Any) -> Any:
        y = _conv(x, w)
        pooled = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.sum(pooled**2) + (jnp.sum(jnp.sin(y)) if skip else 0)

    arguments = _array(3, 3, 3, 16), _array(4, 32, 32, 3)
    program = jax.make_jaxpr(jax.value_and_grad(loss))(*arguments)
    builder = Builder(flatten(program, derivatives=False))
    kinds = [node.kind for node in fuse(builder.root({1: 0}))]
    assert kinds.count("scatter") == 1
    assert kinds.count("full") == kinds.count("copy") == (0 if skip else 1)


def test_a_piece_is_cut_from_the_whole_not_from_the_first_piece() -> None:
    def loss(w: Any, x: Any) -> Any:
        y = x @ w
        first, second = lax.split(y, (1, 63))
        return jnp.sum(lax.cumsum(first)) + jnp.sum(jnp.sin(second))

    buffers = _predicted(loss, _array(32, 256), _array(64, 32), trained=1)
    assert _kept(buffers) == [64 * 256 * F32]


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "rows"),
    [
        (1, (1, 1), 1, None),  # as cuDNN pads
        (2, (1, 1), 1, None),
        (2, (0, 1), 1, 33),  # "SAME" of an even size
        (1, (0, 0), 2, 63),  # a transposed convolution
        (1, (2, 2), 2, 67),
    ],
)
def test_what_the_library_cannot_pad_is_a_padded_copy(
    stride: int, padding: tuple[int, int], dilation: int, rows: int | None
) -> None:
    def loss(w: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            lax.cumsum(x, axis=1),
            w,
            (stride, stride),
            (padding, padding),
            lhs_dilation=(dilation, dilation),
            dimension_numbers=DIMS,
        )
        return jnp.sum(jnp.sin(y))

    buffers = _predicted(loss, _array(3, 3, 8, 1), _array(4, 32, 32, 8), trained=1)
    # For the gradient of the filter: the operand, or its copy alone.
    assert _kept(buffers)[0] == 4 * (rows or 32) ** 2 * 8 * F32
    assert sum(_kept(buffers)) < 1.5 * _kept(buffers)[0]


def test_half_the_width_of_numbers() -> None:
    """Half the width, half the bytes."""

    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(_conv(jnp.sin(_conv(x, w)), w)).astype(jnp.float32))

    shapes = (3, 3, 8, 8), (4, 16, 16, 8)
    kept = [
        sum(_kept(_predicted(loss, *(_array(*shape, dtype=dtype) for shape in shapes), trained=1)))
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert kept[0] == 2 * kept[1] > 0


def test_elementwise_kernel_writes_over_what_nobody_reads_later() -> None:
    """Two arrays at a time: the sum overwrites one of the two that it is made of."""

    def loss(w: Any, x: Any) -> Any:
        first, second = lax.cumsum(x), lax.cumsum(x, reverse=True)
        return jnp.sum(w * lax.cumsum(jnp.floor(first) + jnp.floor(second))[0])

    buffers = _predicted(loss, _array(8), _array(4096, 8), trained=1)
    assert 2 * 4096 * 8 * F32 <= buffers.live_bytes < 2.5 * 4096 * 8 * F32


def test_donated_state_takes_nothing_more() -> None:
    """One weight: beside it, its gradient alone."""
    buffers = _predicted(lambda w, x: jnp.sum(x @ w), _array(1024, 512), _array(2, 1024), trained=1)
    assert 1024 * 512 * F32 <= buffers.live_bytes < 1.05 * 1024 * 512 * F32


@pytest.mark.parametrize("name", ["models.alexnet:AlexNet", "models.resnet:ResNet18"])
@pytest.mark.parametrize("baseline", ["data", "model", "spatial"])
def test_kernels_run_after_what_they_read(mesh222: Mesh, name: str, baseline: str) -> None:
    work = load_workload(name, batch=16, input_shape=(64, 64, 3), abstract=True)
    plan = parallelize(
        work.loss, work.params, *work.batch, mesh=mesh222, strategy=baseline, rates=RATES
    )
    local = differentiated(plan.lowered, named=True)
    kernels = fuse(Builder(local.program).root(local.gradients))
    order = _order(kernels)
    done: set[Any] = set()
    for node in order:
        assert done.issuperset(kernels[node])
        done.add(node)
    assert done == set(kernels)


# --- under strategies ------------------------------------------------------------------------


def _plan(mesh: Mesh, strategy: str, batch: int = 16) -> Plan:
    def loss(params: Any, x: Any) -> Any:
        for w in params["conv"]:
            x = jnp.maximum(_conv(x, w), 0)
        return jnp.mean((x.reshape(x.shape[0], -1) @ params["dense"]) ** 2)

    params = {"conv": [_array(3, 3, 16, 16)] * 3, "dense": _array(16 * 16 * 16, 32)}
    return parallelize(
        loss,
        params,
        _array(batch, 16, 16, 16),
        mesh=mesh,
        strategy=strategy,
        rates=RATES,
    )


def test_data_parallelism_divides_what_is_kept(mesh22: Mesh, mesh222: Mesh) -> None:
    four, eight = (_plan(mesh, "data").memory for mesh in (mesh22, mesh222))
    twice = _plan(mesh222, "data", batch=32).memory
    assert four.parameter_bytes == eight.parameter_bytes == eight.gradient_bytes
    # Filters in the library's order are kept too, and as large on all devices.
    assert twice.kept_bytes == four.kept_bytes > eight.kept_bytes > four.kept_bytes / 2
    assert twice.layer_kept_bytes == four.layer_kept_bytes


def test_uneven_blocks_are_as_large_as_the_largest(mesh22: Mesh) -> None:
    """Five samples over four devices: each has room for two."""
    plan = _plan(mesh22, "data", batch=8)
    uneven = _plan(mesh22, "search", batch=5)
    configs = [
        Config.of({"sample": tuple(uneven.mesh.axis_names)}) if layer.dimensions else Config()
        for layer in uneven.graph.layers
    ]
    strategy = make_strategy("u", uneven.graph, configs, uneven.space.devices.axis_sizes)
    memory = strategy_memory(
        uneven.graph, strategy.for_graph(uneven.graph), uneven.space.devices.axis_sizes
    )
    assert memory.kept_bytes >= plan.memory.kept_bytes


def test_all_reduces_are_combined_up_to_a_size() -> None:
    """Two weights of 20 MiB do not fit into one buffer, two of 10 MiB do."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("device",), axis_types=auto)

    def concatenated(rows: int) -> int:
        def step(w1: Any, w2: Any, x: Any) -> tuple[Any, ...]:
            def loss(w1: Any, w2: Any) -> Any:
                return lax.psum(jnp.sum((x @ w1) @ w2), "device")

            value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(w1, w2)
            return (*gradients, value)

        none = jax.sharding.PartitionSpec()
        split = jax.sharding.PartitionSpec("device")
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(none, none, split), out_specs=(none, none, none)
        )
        arguments = _array(rows, 1024), _array(1024, rows), _array(4, rows)
        (eqn,) = jax.make_jaxpr(mapped)(*arguments).jaxpr.eqns
        body = jax.extend.core.ClosedJaxpr(eqn.params["jaxpr"], ())
        buffers = predict(flatten(body, derivatives=False), {0: 0, 1: 1}, loss=2)
        return max(node.num_bytes for node in buffers.live)

    mebi = 1024 * 1024
    assert BUCKET_BYTES == 30 * mebi
    assert concatenated(20 * 256) == 20 * mebi
    assert concatenated(10 * 256) == 20 * mebi


# --- bytes of each config --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["models.lenet:LeNet5", "models.alexnet:AlexNet"])
def test_costs_of_configs_add_up(mesh222: Mesh, name: str) -> None:
    work = load_workload(name, batch=64, abstract=True)
    plan = parallelize(work.loss, work.params, *work.batch, mesh=mesh222, rates=RATES)
    space, sizes = plan.space, plan.space.devices.axis_sizes
    costs = memory_costs(plan.graph, space.configs, sizes)
    for cost, configs in zip(costs.layers, space.configs, strict=True):
        assert {part.shape for part in cost} == {(len(configs),)}
        assert all((part >= 0).all() and part.dtype == np.int64 for part in cost)
    for baseline in BASELINES:
        strategy = space.baseline(baseline)
        choices = space.choices(strategy)
        memory = strategy_memory(plan.graph, strategy.for_graph(plan.graph), sizes)
        parameters = sum(
            int(c.parameter_bytes[i]) for c, i in zip(costs.layers, choices, strict=True)
        )
        assert parameters == memory.parameter_bytes
        if baseline == "data":
            kept = sum(int(c.kept_bytes[i]) for c, i in zip(costs.layers, choices, strict=True))
            assert kept == pytest.approx(memory.kept_bytes, rel=0.01)
        peak_bytes = memory.peak_bytes + memory.parameter_bytes  # the momentum
        estimate = costs.estimate(choices) + memory.batch_bytes
        assert estimate == pytest.approx(peak_bytes, rel=0.35), baseline


def test_what_is_laid_out_anew_is_kept_twice(mesh222: Mesh) -> None:
    """Copies are zero where layouts agree; with them, the estimate is above what is kept."""
    plan = _plan(mesh222, "search")
    space, sizes = plan.space, plan.space.devices.axis_sizes
    memory = memory_costs(plan.graph, space.configs, sizes)
    assert memory.edges == space.tables.edges
    for edge, copied in zip(plan.graph.edges, memory.copied_bytes, strict=True):
        use = edge.use
        there = [c.layout(use.source_labels) for c in space.configs[edge.source]]
        here = [c.layout(use.labels) for c in space.configs[edge.target]]
        agree = np.array([[a == b for b in here] for a in there])
        assert copied.shape == agree.shape and (copied[agree] == 0).all()
        assert use.gradient or not copied.any()
        if copied.any():
            whole = np.prod(use.info.shape) * use.info.itemsize
            assert (copied[~agree] >= whole // 8).all() and copied.max() <= whole
    assert any(copied.any() for copied in memory.copied_bytes)
    by_layer = [cost.kept_bytes for cost in memory.layers]
    rng = np.random.default_rng(0)
    for _ in range(20):
        choices = [int(rng.integers(len(configs))) for configs in space.configs]
        kept = sum(int(kept[c]) for kept, c in zip(by_layer, choices, strict=True))
        kept += sum(
            int(table[choices[i], choices[j]])
            for (i, j), table in zip(memory.edges, memory.copied_bytes, strict=True)
        )
        assert memory.estimate(choices) >= kept


def test_splitting_never_adds_parameters(mesh222: Mesh) -> None:
    plan = _plan(mesh222, "search")
    for layer, cost in zip(
        plan.graph.layers,
        memory_costs(plan.graph, plan.space.configs, plan.space.devices.axis_sizes).layers,
        strict=True,
    ):
        whole = plan.space.configs[layer.index].index(Config())
        assert (cost.parameter_bytes <= cost.parameter_bytes[whole]).all()
        assert (cost.kept_bytes <= cost.kept_bytes[whole]).all()
