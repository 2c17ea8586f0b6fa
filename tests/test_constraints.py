"""Constraints of the user's own, and explanations: obeyed, priced, refused in one clear error."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxlwp
from jaxlwp import Config, Constraints
from jaxlwp.cli._workload import load_workload
from jaxlwp.report._tables import alternatives_table, render

RATES = jaxlwp.Rates(
    flops_per_s=5e12, memory_bytes_per_s=5e11, latency_s=(1e-5,), link_bytes_per_s=(2e10,)
)
LENET = "models.lenet:LeNet5"
NAMES = ("conv1", "conv2", "fc3", "fc4", "fc5")


@pytest.fixture(scope="module")
def traced() -> tuple[jaxlwp.graph.ComputationGraph, jaxlwp.DeviceGraph]:
    workload = load_workload(LENET, batch=64, abstract=True)
    graph = jaxlwp.trace(workload.loss, workload.params, *workload.batch)
    mesh = jaxlwp.make_mesh(jax.devices()[:4])
    return graph, jaxlwp.device_graph(mesh, rates=RATES)


@pytest.fixture(scope="module")
def space(traced: Any) -> jaxlwp.cost.SearchSpace:
    return jaxlwp.price(*traced)


def degrees(space: jaxlwp.cost.SearchSpace, config: Config) -> dict[str, int]:
    sizes = space.devices.axis_sizes
    return {name: math.prod(sizes[a] for a in axes) for name, axes in config.splits}


# Constraints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [{}, {"channel": 4}, {"sample": 2, "reduction": 2}])
def test_a_pinned_layer_has_its_split(traced: Any, split: dict[str, int]) -> None:
    space = jaxlwp.price(*traced, constraints=Constraints(pin={"fc4": split}))
    found = jaxlwp.search(space)
    assert found.optimal
    assert degrees(space, found.strategy.configs["fc4"]) == split
    for name in jaxlwp.BASELINES:  # baselines keep to it too
        baseline = space.baseline(name)
        assert degrees(space, baseline.configs["fc4"]) == split
        assert space.evaluate(baseline).total_s >= found.cost.total_s


def test_a_pattern_pins_several_layers(traced: Any) -> None:
    space = jaxlwp.price(*traced, constraints=Constraints(pin={"conv*": {"height": 4}}))
    configs = jaxlwp.search(space).strategy.configs
    assert {name for name in configs if configs[name].axes("height")} >= {"conv1", "conv2"}


def test_no_layer_has_a_forbidden_dimension(traced: Any) -> None:
    free = jaxlwp.search(jaxlwp.price(*traced)).strategy
    used = {d for config in free.configs.values() for d, _ in config.splits}
    space = jaxlwp.price(*traced, constraints=Constraints(forbid=tuple(sorted(used))))
    found = jaxlwp.search(space).strategy
    assert not {d for config in found.configs.values() for d, _ in config.splits} & used
    one = jaxlwp.price(*traced, constraints=Constraints(forbid={"conv1": ("sample",)}))
    assert not any(config.axes("sample") for config in one.configs[0])
    assert any(config.axes("sample") for config in one.configs[1])


def test_axes_may_be_pinned_in_any_order(traced: Any) -> None:
    graph, devices = traced
    first, second = devices.axis_sizes
    config = Config.of({"sample": (second,), "channel": (first,)})
    assert config not in jaxlwp.price(graph, devices).configs[0]
    for split in (config, {"sample": second, "channel": (first,)}):
        space = jaxlwp.price(graph, devices, constraints=Constraints(pin={"conv1": split}))
        assert jaxlwp.search(space).strategy.configs["conv1"] == config


def test_a_replicated_parameter_is_whole_on_every_device_and_numbers_are_the_same() -> None:
    workload = load_workload(LENET, batch=16)
    kernel = next(
        name
        for name in jaxlwp.trace(workload.loss, workload.params, *workload.batch).argument_names
        if "fc3" in name and "kernel" in name
    )
    pinned = {"pin": {"fc4": {"channel": 4}}}
    expected = jax.jit(jax.value_and_grad(workload.loss))(workload.params, *workload.batch)
    for constraints in (
        Constraints(**pinned, replicated=(kernel,)),
        Constraints(**pinned, replicated=("*fc3*",)),
    ):
        plan = jaxlwp.parallelize(
            workload.loss,
            workload.params,
            *workload.batch,
            devices=4,
            rates=RATES,
            constraints=constraints,
            measure=False,
        )
        leaves = jax.tree_util.tree_flatten_with_path(plan.param_shardings)[0]
        specs = {jax.tree_util.keystr(path): sharding.spec for path, sharding in leaves}
        assert next(s for n, s in specs.items() if n in kernel) == PartitionSpec()
        assert any(s != PartitionSpec() for s in specs.values())
        assert "under the constraints given" in repr(plan)
        actual = jax.jit(jax.value_and_grad(plan))(workload.params, *workload.batch)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_mesh_of_the_users_own() -> None:
    mesh = jax.make_mesh((2, 2), ("hosts", "gpus"))
    workload = load_workload(LENET, batch=16, abstract=True)
    plan = jaxlwp.parallelize(
        workload.loss,
        workload.params,
        *workload.batch,
        mesh=mesh,
        rates=RATES,
        constraints=Constraints(pin={"conv1": {"sample": ("gpus",), "channel": "hosts"}}),
    )
    assert plan.strategy.configs["conv1"].splits == (
        ("sample", ("gpus",)),
        ("channel", ("hosts",)),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pin": {"conv9": {}}}, r"pin\['conv9'\] matches no layer; there are .*conv1"),
        ({"pin": {"conv1": {"sample": 3}}}, "leaves layer conv1 without a config"),
        ({"pin": {"conv1": {"sample": "gpus"}}}, "mesh axis 'gpus'; there are"),
        ({"pin": {"conv1": {"rows": 2}}}, "pin: 'rows' is no dimension"),
        ({"forbid": ("rows",)}, "forbid: 'rows' is no dimension"),
        ({"forbid": "height"}, "give a list of names"),
        ({"replicated": "*"}, "give a list of names"),
        ({"replicated": ("*fc9*",)}, "matches no parameter"),
        (
            {"pin": {"fc3": {"channel": 4}}, "replicated": ("*fc3*kernel*",)},
            "leaves layer fc3 without a config",
        ),
    ],
)
def test_constraints_that_nothing_keeps_to(traced: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxlwp.price(*traced, constraints=Constraints(**given))


# Explanations -----------------------------------------------------------------------------------


def test_every_config_is_priced_as_a_search_with_it_pinned(space: jaxlwp.cost.SearchSpace) -> None:
    explanation = jaxlwp.explain(space)
    optimum = jaxlwp.search(space)
    assert math.isclose(explanation.optimum_s, optimum.cost.total_s, rel_tol=1e-12)
    for layer in space.graph.layers:
        ranked = explanation.alternatives(layer.name)
        assert len(ranked) == len(space.configs[layer.index])
        assert ranked[0].extra_s <= 1e-12 * optimum.cost.total_s
        for alternative in ranked[:: max(1, len(ranked) // 4)]:
            found = explanation.best_with(layer.name, alternative.config)
            assert found.strategy.configs[layer.name] == alternative.config
            assert math.isclose(found.cost.total_s, alternative.best_s, rel_tol=1e-12)


def test_why_not_height_here(space: jaxlwp.cost.SearchSpace) -> None:
    explanation = jaxlwp.explain(space)
    answers = explanation.alternatives("conv2", containing=("height",))
    assert answers and all(a.config.axes("height") for a in answers)
    assert [a.best_s for a in answers] == sorted(a.best_s for a in answers)
    text = render(alternatives_table(explanation, "conv2", ("height",)))
    assert "height" in text and "transfer" in text
    assert all(name in str(explanation) for name in NAMES)
    with pytest.raises(ValueError, match="there is no layer 'conv9'; there are"):
        explanation.alternatives("conv9")


def test_price_of_a_constraint(traced: Any, space: jaxlwp.cost.SearchSpace) -> None:
    explanation = jaxlwp.explain(space)
    constraints = Constraints(pin={"fc3": {}}, forbid=("reduction",))
    under = jaxlwp.search(jaxlwp.price(*traced, constraints=constraints)).cost.total_s
    assert math.isclose(
        explanation.price(constraints), under - explanation.optimum_s, rel_tol=1e-9, abs_tol=1e-15
    )
    kept = jaxlwp.search(space).strategy.configs["conv1"]
    assert explanation.price(Constraints(pin={"conv1": kept})) <= 1e-12
    first, second = space.devices.axis_sizes
    outside = Config.of({"sample": (second,), "channel": (first,)})
    with pytest.raises(ValueError, match="not in the space; give the constraints to price"):
        explanation.price(Constraints(pin={"conv1": outside}))


def test_runners_up(space: jaxlwp.cost.SearchSpace) -> None:
    ranked = jaxlwp.optimize.runners_up(space, 4)
    costs = [r.cost.total_s for r in ranked]
    assert len(ranked) == 4 and costs == sorted(costs)
    assert len({tuple(r.strategy.configs.items()) for r in ranked}) == 4
    assert ranked[0].changed == () and all(r.changed for r in ranked[1:])
    assert math.isclose(costs[0], jaxlwp.search(space).cost.total_s, rel_tol=1e-12)
    # The second is the best of all strategies that differ in some layer: the least second choice.
    explanation = jaxlwp.explain(space)
    second = min(explanation.alternatives(n.name)[1].best_s for n in space.graph.layers)
    assert costs[1] <= second * (1 + 1e-12)
