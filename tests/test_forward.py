"""Plans of functions that are only evaluated: the same numbers, bytes and rules as others."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check import compiled_collectives
from jaxlwp.check._hlo import kind_of
from jaxlwp.check._module import parse
from jaxlwp.check._verify import check_layers
from jaxlwp.devices import preset
from jaxlwp.plan import with_strategy
from jaxlwp.space import make_strategy

RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
DIMS = ("NHWC", "HWIO", "NHWC")


def network(params: Any, x: jax.Array) -> dict[str, Any]:
    """A small decoder: convolutions, a pool, upsampling, attention, a dense head; two outputs."""
    x = jax.nn.relu(lax.conv_general_dilated(x, params["k1"], (1, 1), "SAME", None, None, DIMS))
    low = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    n, h, w, c = low.shape
    tokens = low.reshape(n, h * w, c)
    scores = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", tokens @ params["q"], tokens), axis=-1)
    low = jnp.einsum("nqk,nkc->nqc", scores, tokens).reshape(low.shape)
    up = jax.image.resize(low, x.shape, "nearest")
    y = lax.conv_general_dilated(up + x, params["k2"], (1, 1), "SAME", None, None, DIMS)
    return {"image": jnp.tanh(y), "score": y.mean((1, 2)) @ params["head"]}


def arguments(batch: int = 2, size: int = 8) -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    shapes = {"k1": (3, 3, 3, 8), "q": (8, 8), "k2": (3, 3, 8, 4), "head": (4, 5)}
    params = {name: draw.normal(size=shape) * 0.3 for name, shape in shapes.items()}
    return params, draw.normal(size=(batch, size, size, 3))


def mesh_of(*sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))], dtype=object).reshape(sizes)
    return Mesh(devices, tuple("abc"[: len(sizes)]))


SLOW = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((4, 2), (2, 1, 3), (3, 2))]


@pytest.mark.parametrize("sizes", [(8,), (2, 3), *SLOW], ids=str)
def test_same_numbers_and_bytes_under_every_strategy(sizes: tuple[int, ...]) -> None:
    params, x = arguments()
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, (params, x))
        want = network(*given)
        found = jaxlwp.parallelize(
            network, *given, mesh=mesh_of(*sizes), rates=RATES, measure=False, train=False
        )
        plans = [found]
        for name in jaxlwp.BASELINES:
            try:
                plans.append(with_strategy(found, found.space.baseline(name)))
            except ValueError:  # two examples
                continue
        draw = random.Random(0)
        for n in range(4):
            configs = [draw.choice(known) for known in found.space.configs]
            strategy = make_strategy(
                f"random {n}", found.graph, configs, found.space.devices.axis_sizes
            )
            plans.append(with_strategy(found, strategy))
        have = jax.jit(lambda *given: [plan(*given) for plan in plans])(*given)
        agree = [all(layer.agrees for layer in check_layers(plan)) for plan in plans]
    for plan, outputs, agrees in zip(plans, have, agree, strict=True):
        assert not plan.trains and agrees, plan.strategy.name
        for name, value in want.items():
            np.testing.assert_allclose(outputs[name], value, rtol=1e-9, atol=1e-9)
        assert plan.cost.sync_s == 0
        assert not any(collective.backward for collective in plan.collectives)


@pytest.mark.parametrize("sizes", [(4,), (2, 2)], ids=str)
def test_outputs_are_whole_where_that_is_asked_for(sizes: tuple[int, ...]) -> None:
    params, x = arguments()
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, (params, x))
        want = network(*given)
        options: Any = {"mesh": mesh_of(*sizes), "rates": RATES, "measure": False, "train": False}
        whole = jaxlwp.parallelize(
            network, *given, strategy="spatial", outputs="replicated", **options
        )
        split = jaxlwp.parallelize(network, *given, strategy="spatial", **options)
        have = jax.jit(whole)(*given)
        assert not jax.jit(split)(*given)["image"].sharding.is_fully_replicated
        agree = all(layer.agrees for layer in check_layers(whole))
        smaller = whole.rebind(given[1][:1])
        assert jax.jit(smaller)(given[0], given[1][:1])["image"].sharding.is_fully_replicated
        assert agree and whole.cost.transfer_s > split.cost.transfer_s
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, rtol=1e-9, atol=1e-9)
        assert have[name].sharding.is_fully_replicated


def test_outputs_go_where_they_are_wanted() -> None:
    """PartitionSpecs for some outputs, axes in another order than the mesh's; None for others."""
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(2, 8))
    wanted = {"image": PartitionSpec(None, ("b", "a")), "score": None}
    options: Any = {"mesh": mesh_of(2, 2), "rates": RATES, "measure": False, "train": False}
    plan = jaxlwp.parallelize(network, *given, outputs=wanted, **options)
    assert jaxlwp.parallelize(network, *given, **options).cost.total_s <= plan.cost.total_s
    smaller = plan.rebind(given[1][:1])
    plans = (plan, with_strategy(plan, plan.space.baseline("model")), smaller)
    for each in plans:
        assert each.lowered.output_layouts()[0] == ((), ("b", "a"), (), ())
        assert all(layer.agrees for layer in check_layers(each))
    have = jax.jit(plans[1])(*given)
    assert have["image"].sharding.is_equivalent_to(
        NamedSharding(plan.mesh, wanted["image"]), have["image"].ndim
    )
    np.testing.assert_allclose(have["image"], network(*given)["image"], rtol=1e-4, atol=1e-5)
    moved = [layer for layer in check_layers(plans[1]) if layer.name == "output_0"]
    assert moved[0].predicted  # from channels to rows


def test_one_place_for_all_outputs() -> None:
    whole = planned(strategy="spatial", outputs=PartitionSpec())
    assert whole.cost == planned(strategy="spatial", outputs="replicated").cost
    sides = planned(strategy="spatial", outputs=PartitionSpec(("device0", "device1")))
    assert {layout[0] for layout in sides.lowered.output_layouts()} == {("device0", "device1")}


def moved_parameters(program: Any) -> list[str]:
    """Collectives of a compiled program that read parameters, and nothing of the batch."""
    module = parse(program.as_text())
    instructions = {i.name: i for i in module.instructions(module.entry)}
    collectives = [i for i in instructions.values() if kind_of(i) is not None]
    assert len(collectives) == len(compiled_collectives(program.as_text()))  # none elsewhere

    @functools.cache
    def arguments_of(name: str) -> frozenset[str]:
        instruction = instructions.get(name)
        if instruction is None:  # a number, of a constant
            return frozenset()
        if instruction.opcode == "parameter":
            return frozenset(re.findall(r'op_name="(\w+)', instruction.attributes))
        return frozenset().union(*map(arguments_of, instruction.operands))

    return [i.name for i in collectives if arguments_of(i.name) == {"params"}]


@pytest.mark.parametrize("strategy", ["model", pytest.param("owt", marks=pytest.mark.slow)])
def test_parameters_stay_where_training_has_them(strategy: str) -> None:
    """No collective of the compiled evaluation moves a parameter; without the option some do."""
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(4, 8))

    def loss(params: Any, x: Any) -> Any:
        out = network(params, x)
        return (out["image"] ** 2).mean() + out["score"].mean()

    trained = jaxlwp.parallelize(
        loss, params, x, mesh=mesh_of(2, 2), rates=RATES, measure=False, strategy=strategy
    )
    one = x[:1]
    plan = jaxlwp.parallelize(network, params, one, train=False, params_as=trained)
    assert plan.mesh == trained.mesh and plan.param_shardings == trained.param_shardings
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(plan.param_shardings))
    free = jaxlwp.parallelize(
        network, params, one, mesh=trained.mesh, rates=RATES, measure=False, train=False
    )
    assert plan.elsewhere_s == free.cost.total_s <= plan.cost.total_s
    assert "parameters stay as the plan given stores them" in str(plan)
    shardings = (trained.param_shardings, plan.batch_shardings[0])

    def compiled(step: Any) -> Any:
        jitted = jax.jit(lambda params, x: step(params, x), in_shardings=shardings)
        return jitted.lower(params, one).compile()

    program = compiled(plan)
    assert not moved_parameters(program)
    have = program(trained.place(params), jax.device_put(one, plan.batch_shardings[0]))
    np.testing.assert_allclose(have["image"], network(params, one)["image"], rtol=1e-4, atol=1e-5)
    whole = with_strategy(
        free, free.space.strategy("whole", [len(c) - 1 for c in free.space.configs])
    )
    assert moved_parameters(compiled(whole))


@pytest.mark.parametrize(("centred", "count"), [(False, 1), (True, 2)], ids=["square", "variance"])
def test_small_sums_that_are_ready_together_are_one(centred: bool, count: int) -> None:
    """A mean and a mean square are one all-reduce; a variance, which waits for it, is another."""

    def normalized(kernel: Any, x: Any) -> Any:
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, DIMS)
        mean = x.mean((1, 2), keepdims=True)
        spread = ((x - mean) ** 2 if centred else x**2).mean((1, 2), keepdims=True)
        return (x - mean) * lax.rsqrt(spread + 1.0)

    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(2, 8))
    plan = jaxlwp.parallelize(
        normalized, params["k1"], x, devices=2, strategy="spatial", rates=RATES, train=False
    )
    sums = [each for each in plan.collectives if each.kind == "all-reduce"]
    assert len(sums) == count
    assert sum(each.num_bytes for each in sums) == 2 * 2 * 8 * 4
    assert all(layer.agrees for layer in check_layers(plan))
    want = normalized(params["k1"], x)
    np.testing.assert_allclose(plan(params["k1"], x), want, rtol=1e-4, atol=1e-5)


def shapes(batch: int = 8, size: int = 64) -> Any:
    given = arguments(batch, size)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), given)


def planned(**options: Any) -> jaxlwp.Plan:
    return jaxlwp.parallelize(network, *shapes(), devices="h100:4", train=False, **options)


def test_it_costs_less_than_training() -> None:
    def loss(params: Any, x: Any) -> Any:
        out = network(params, x)
        return (out["image"] ** 2).mean() + out["score"].mean()

    evaluated = planned(strategy="data")
    trained = jaxlwp.parallelize(loss, *shapes(), devices="h100:4", strategy="data")
    assert evaluated.cost.total_s < 0.6 * trained.cost.total_s
    memory = evaluated.memory
    assert memory.optimizer_bytes == memory.gradient_bytes == memory.kept_bytes == 0
    assert memory.peak_bytes < trained.memory.peak_bytes
    out = 8 * 64 * 64 * 4 * 4 // 4  # a device's share of the image
    assert out <= memory.temporary_bytes


def test_memory_limits_and_reports() -> None:
    fast = planned()
    limited = planned(memory_bytes=1.16 * fast.memory.peak_bytes)
    assert limited.cost.total_s == fast.cost.total_s
    with pytest.raises(jaxlwp.MemoryLimitError):
        planned(memory_bytes=1e4)
    assert "momentum" not in str(fast) and "backward" not in str(fast)
    assert str(jaxlwp.explain(fast.space)) and str(jaxlwp.pareto(fast.space))


def test_parameters_are_not_fed_with_every_call() -> None:
    """What the way of the batch to the devices takes is not counted for parameters."""
    devices = preset("h100:2").device_graph()
    slow = dataclasses.replace(devices, input_byte_s=1.0)
    for train in (False, True):
        function: Any = network if not train else (lambda p, x: network(p, x)["image"].sum())
        graph = jaxlwp.trace(function, *shapes(), differentiated=train)
        one = jaxlwp.price(graph, devices)
        other = jaxlwp.price(graph, slow)
        strategy = one.baseline("data")
        more_s = other.evaluate(strategy).overhead_s - one.evaluate(strategy).overhead_s
        np.testing.assert_allclose(more_s, 8 * 64 * 64 * 3 * 4 / 2)


def test_a_sampler_scans_over_a_plan() -> None:
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(2, 8))

    def denoise(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, params["k1"], (1, 1), "SAME", None, None, DIMS)
        y = jnp.tanh(y) * t
        return x - 0.1 * lax.conv_general_dilated(
            y, jnp.swapaxes(params["k1"], 2, 3), (1, 1), "SAME", None, None, DIMS
        )

    times = jnp.linspace(1.0, 0.0, 20)
    plan = jaxlwp.parallelize(
        denoise, params, x, times[0], devices=8, strategy="spatial", rates=RATES, train=False
    )

    def sampled(step: Any) -> Any:
        def sample(params: Any, x: jax.Array) -> Any:
            return lax.scan(lambda x, t: (step(params, x, t), None), x, times)[0]

        return jax.jit(sample, donate_argnums=1)

    want = sampled(denoise)(params, x.copy())
    # The step is in the loop's program once, whatever the number of steps.
    step = jax.jit(plan).lower(params, x, times[0])
    loop = sampled(plan).lower(params, x)
    lines = [len(lowered.as_text().splitlines()) for lowered in (step, loop)]
    assert lines[1] <= 1.5 * lines[0]
    noise = plan.place_batch(x.copy())
    have = sampled(plan)(plan.place(params), noise)
    assert noise.is_deleted()  # donated
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    looped = jax.jit(
        lambda params, x: lax.fori_loop(0, 20, lambda i, x: plan(params, x, times[i]), x)
    )(plan.place(params), x)
    np.testing.assert_allclose(looped, want, rtol=1e-5, atol=1e-5)

    def ended(carry: Any) -> Any:
        return carry[1] < 20

    def turn(carry: Any) -> Any:
        return plan(params, carry[0], times[carry[1]]), carry[1] + 1

    whiled = jax.jit(lambda x: lax.while_loop(ended, turn, (x, 0))[0])(x)
    np.testing.assert_allclose(whiled, want, rtol=1e-5, atol=1e-5)
    mapped = jax.jit(lambda xs: lax.map(lambda x: plan(params, x, times[0]), xs))(x[None])
    np.testing.assert_allclose(mapped[0], denoise(params, x, times[0]), rtol=1e-5, atol=1e-5)


def test_a_plan_is_lowered_compiled_and_exported() -> None:
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(2, 8))
    plan = jaxlwp.parallelize(
        network, params, x, devices=4, strategy="spatial", rates=RATES, train=False
    )
    placed = plan.place(params), plan.place_batch(x)
    want = network(params, x)
    step = jax.jit(plan, in_shardings=plan.shardings)
    exported = export.export(step)(params, x)
    assert exported.nr_devices == 4
    for run in (step.lower(params, x).compile(), jax.jit(exported.call)):
        have = run(*placed)
        for name, value in want.items():
            np.testing.assert_allclose(have[name], value, rtol=1e-4, atol=1e-5)


def test_checked_compared_and_verified(quick_measurements: None) -> None:
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments(8))
    plan = jaxlwp.parallelize(network, *given, devices=2, train=False, check="measure")
    assert plan.checked
    want = network(*given)
    have = plan(*given)
    np.testing.assert_allclose(have["image"], want["image"], rtol=1e-4, atol=1e-5)
    comparison = jaxlwp.compare(network, *given, devices=2, rounds=1, train=False)
    assert {result.strategy for result in comparison.results} == {"search", *jaxlwp.BASELINES}
    found = jaxlwp.verify(plan, *given)
    assert found.measured_s is not None and all(layer.agrees for layer in found.layers)
    assert plan.rebind(given[1][:4]).graph.gradients == frozenset()


def test_what_cannot_be_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="train=False, which evaluates only"):
        planned(optimizer=optax.sgd(1e-3))
    with pytest.raises(ValueError, match="outputs: 'left' is unknown"):
        planned(outputs="left")
    with pytest.raises(ValueError, match="over mesh axis 'rows'; there are device0"):
        planned(outputs={"image": PartitionSpec("rows"), "score": None})
    with pytest.raises(ValueError, match="dimension 1 of size 5 .* which do not divide it"):
        planned(outputs={"image": None, "score": PartitionSpec(None, "device0")})
    with pytest.raises(ValueError, match="3 entries, and the output 2 dimensions"):
        planned(outputs={"image": None, "score": PartitionSpec("device0", None, "device1")})
    with pytest.raises(ValueError, match="does not have the form of the function's output"):
        planned(outputs=[None])
    beside = planned(strategy="spatial")
    with pytest.raises(ValueError, match="params_as: given for a plan that trains"):
        jaxlwp.parallelize(network, *shapes(), params_as=beside)
    with pytest.raises(ValueError, match="the plan's mesh is taken"):
        jaxlwp.parallelize(network, *shapes(), devices="h100:2", train=False, params_as=beside)
    with pytest.raises(ValueError, match=r"params_as: params\['left'\] is of shape \[3\]"):
        left = {"left": jax.ShapeDtypeStruct((3,), jnp.float32)}
        jaxlwp.parallelize(
            lambda p, x: x + p["left"], left, shapes()[1], train=False, params_as=beside
        )
    with pytest.raises(ValueError, match="or give train=False"):
        jaxlwp.parallelize(network, *shapes(), devices="h100:4")
