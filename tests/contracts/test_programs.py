"""What the partitioner gathers and jaxlwp does not; what a volume costs in memory; nested programs.

Each program is compared with the one that XLA's partitioner makes of plain sharding constraints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check._hlo import bytes_by_kind
from jaxlwp.plan._plan import bind
from models import UNet, UNet3D

from .harness import compare, convolve_grouped
from .zoo import RATES

Record = Callable[[str, object], None]


def space_of(loss: Any, params: Any, *batch: Any) -> tuple[jaxlwp.cost.SearchSpace, Mesh]:
    mesh = jaxlwp.make_mesh(jax.devices()[:8])
    graph = jaxlwp.trace(loss, params, *batch)
    return jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=RATES)), mesh


def plan_by(loss: Any, dimensions: tuple[str, ...], params: Any, *batch: Any) -> jaxlwp.Plan:
    """Every layer split by the first of the dimensions that it has, as far as it can be."""
    space, mesh = space_of(loss, params, *batch)

    def wanted(configs: tuple[jaxlwp.Config, ...]) -> int:
        def key(i: int) -> tuple[Any, ...]:
            return tuple(len(configs[i].axes(d)) for d in dimensions)

        only = [i for i, c in enumerate(configs) if all(name in dimensions for name, _ in c.splits)]
        return max(only, key=key)

    strategy = space.strategy("by hand", [wanted(c) for c in space.configs])
    out_tree = jax.tree.structure(jax.eval_shape(loss, params, *batch))
    return bind(space, strategy, mesh, (params, *batch), out_tree)


def compile_plan(plan: jaxlwp.Plan, *arguments: Any) -> Any:
    step = jax.jit(jax.value_and_grad(plan), in_shardings=plan.shardings)
    return step.lower(*arguments).compile()


def partitioned(loss: Any, mesh: Mesh, spec: PartitionSpec, params: Any, x: Any) -> Any:
    """The plain partitioner's program: the batch split, parameters replicated."""
    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, spec)),
    )
    return step.lower(params, x).compile()


def kinds(compiled: Any) -> dict[str, int]:
    return bytes_by_kind(jaxlwp.check.compiled_collectives(compiled.as_text()))


def record(
    record_property: Record, name: str, ours: dict[str, int], theirs: dict[str, int]
) -> None:
    for kind in sorted(ours | theirs):
        record_property(
            "gathers", f"{name:34}{kind:20}{ours.get(kind, 0):>12,}{theirs.get(kind, 0):>14,}"
        )


def test_grouped_convolution_by_sample_gathers_nothing(record_property: Record) -> None:
    """The partitioner gathers the batch of a grouped convolution."""

    def loss(kernel: Any, x: Any) -> Any:
        return jnp.mean(convolve_grouped(x, kernel, groups=4) ** 2)

    keys = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(keys[0], (3, 3, 4, 16))
    x = jax.random.normal(keys[1], (16, 12, 12, 16))
    plan = plan_by(loss, ("sample",), kernel, x)
    done = compile_plan(plan, kernel, x)
    spec = PartitionSpec(tuple(plan.mesh.axis_names))
    theirs = kinds(partitioned(loss, plan.mesh, spec, kernel, x))
    ours = kinds(done)
    record(record_property, "grouped convolution by sample", ours, theirs)
    assert set(ours) == {"all-reduce"}  # of the kernel's gradient and the loss
    assert theirs.get("all-gather", 0) > 0  # else this test shows nothing any more
    actual = done(*jax.device_put((kernel, x), plan.shardings))
    assert max(compare(actual, jax.jit(jax.value_and_grad(loss))(kernel, x)).values()) <= 1e-5


def test_unet_decoder_by_height_gathers_nothing(record_property: Record) -> None:
    """The partitioner gathers the whole input of a transposed convolution."""
    model = UNet(depth=2, width=8, num_classes=3, dropout_rate=0.0)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply(params, x) ** 2)

    x = jax.random.normal(jax.random.key(0), (2, 64, 24, 1))
    params = model.init(jax.random.key(1), x)
    plan = plan_by(loss, ("height",), params, x)
    assert all(
        config.describe(plan.space.devices.axis_sizes) == "height=8"
        for config in plan.strategy.configs.values()
    )
    done = compile_plan(plan, params, x)
    spec = PartitionSpec(None, tuple(plan.mesh.axis_names))
    theirs = kinds(partitioned(loss, plan.mesh, spec, params, x))
    ours = kinds(done)
    record(record_property, "U-Net by height", ours, theirs)
    assert set(ours) == {"all-reduce", "collective-permute"}
    assert theirs.get("all-gather", 0) > 0
    actual = done(*jax.device_put((params, x), plan.shardings))
    assert max(compare(actual, jax.jit(jax.value_and_grad(loss))(params, x)).values()) <= 1e-4


def test_volume_takes_a_sixth_of_the_memory(record_property: Record) -> None:
    """3-D U-Net, depth over four and height over two devices: temporaries of the compiled step."""
    model = UNet3D(depth=1, width=8)

    def loss(params: Any, stats: Any, x: Any) -> Any:
        y, stats = model.apply({"params": params} | stats, x, train=True, mutable=["batch_stats"])
        return jnp.mean(y**2)

    x = jax.random.normal(jax.random.key(0), (1, 64, 64, 16, 3))
    variables = model.init(jax.random.key(1), x)
    params = variables.pop("params")
    plan = plan_by(loss, ("depth", "height"), params, variables, x)
    for layer in plan.graph.layers:
        text = plan.strategy.configs[layer.name].describe(plan.space.devices.axis_sizes)
        assert "depth" in text, (layer.name, text)
    done = compile_plan(plan, params, variables, x)
    alone = jax.jit(jax.value_and_grad(loss)).lower(params, variables, x).compile()
    ours, whole = (c.memory_analysis().temp_size_in_bytes for c in (done, alone))
    record_property(
        "gathers", f"{'3-D U-Net 64x64x16':34}{'temporaries':20}{ours:>12,}{whole:>14,}"
    )
    assert ours <= whole / 6
    # Gradients are compared in the zoo: here a rounding moves some of many activations past zero.
    value, _ = done(*jax.device_put((params, variables, x), plan.shardings))
    np.testing.assert_allclose(value, alone(params, variables, x)[0], rtol=1e-5)


def test_checkpoint_stays_a_rematerialisation() -> None:
    """The program for XLA exchanges halos anew in the backward pass, and that is what is priced.

    On CPU the compiler merges the second evaluation with the first all the same, one device's too.
    """

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(3):
                x = jnp.sin(nn.Conv(8, (3, 3))(x))
            return x

    class Net(nn.Module):
        block: Any

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for i in range(4):
                x = self.block(name=f"block{i}")(x)
            return x

    x = jax.random.normal(jax.random.key(0), (2, 64, 32, 8))
    params = Net(Block).init(jax.random.key(1), x)
    counts = {}
    for name, block in (("kept", Block), ("again", nn.remat(Block))):
        model = Net(block)

        def loss(params: Any, x: Any, model: Any = model) -> Any:
            return jnp.mean(model.apply(params, x) ** 2)

        plan = plan_by(loss, ("height",), params, x)
        text = jax.jit(jax.value_and_grad(plan)).lower(params, x).as_text()
        permutes = [c for c in plan.collectives if c.kind == "collective-permute"]
        counts[name] = text.count("stablehlo.collective_permute"), len(permutes)
        assert ("optimization_barrier" in text) == (name == "again")
        actual = compile_plan(plan, params, x)(*jax.device_put((params, x), plan.shardings))
        expected = jax.jit(jax.value_and_grad(loss))(params, x)
        assert max(compare(actual, expected).values()) <= 1e-4
    # Two per convolution and pass; the first convolution's input has no gradient.
    assert counts["kept"] == (2 * (12 + 11), 2 * (12 + 11))
    assert counts["again"] == (2 * (12 + 11 + 12), 2 * (12 + 11 + 12))


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_convolution_splits_whole_groups_only(groups: int) -> None:
    def loss(kernel: Any, x: Any) -> Any:
        return jnp.sum(convolve_grouped(x, kernel, groups=groups))

    space, _ = space_of(loss, jnp.ones((3, 3, 16 // groups, 16)), jnp.ones((8, 8, 8, 16)))
    sizes = space.devices.axis_sizes
    degrees = {int(np.prod([sizes[a] for a in c.axes("channel")])) for c in space.configs[0]}
    assert max(degrees) == groups
