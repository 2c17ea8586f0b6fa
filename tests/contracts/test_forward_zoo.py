"""Contracts 1 and 2 on the model zoo, evaluated only: found, baselines, random strategies.

In float64, so that rounding has no say: every output equals one device's to 1e-9. Each strategy's
program sends the bytes that were priced, layer by layer as it is given to the compiler, and in all
as it is compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.check import compiled_collectives
from jaxlwp.check._hlo import bytes_by_kind
from jaxlwp.check._verify import check_layers
from jaxlwp.plan import baselines, with_strategy
from jaxlwp.space import make_strategy

from .harness import draw_seed, drawn
from .zoo import RATES, ZOO, perturbed, random_inputs, relative_errors

SEED = draw_seed()
TOLERANCE = 1e-9
SHAPES = ((8,), (2, 4), (4, 2), (2, 3), (3, 2), (2, 1, 3))
RANDOM = 10
FAST = ("vae_decoder", "denoising_unet_class", "resnet18", "unet", "squeezenet")


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A network that is evaluated, and what it gives on one device."""

    apply: Callable[..., Any]
    arguments: tuple[Any, ...]
    want: Any


def case_of(name: str) -> Case:
    """The network in float64, running statistics other than zeros and ones."""
    entry = ZOO[name]
    keys = jax.random.split(jax.random.key(SEED), 2)
    inputs = random_inputs(entry, keys[0], jnp.float64)
    model = entry.model.clone(dtype=jnp.float64)
    init = jax.jit(model.init)
    variables = perturbed(init(keys[1], *inputs), SEED)
    if "batch_stats" in variables:  # variances are positive
        positive = jax.tree.map(lambda leaf: 0.1 + jnp.abs(leaf), variables["batch_stats"])
        variables = {**variables, "batch_stats": positive}
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    arguments = (variables, *inputs)
    want = jax.jit(model.apply)(*arguments)
    return Case(apply=model.apply, arguments=arguments, want=want)


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    devices = np.random.default_rng(SEED).permutation(np.array(jax.devices(), dtype=object))
    return Mesh(devices[: int(np.prod(shape))].reshape(shape), ("a", "b", "c")[: len(shape)])


def check(case: Case, plan: jaxlwp.Plan) -> None:
    """The plan's numbers, and bytes as priced."""
    assert not plan.trains and not plan.graph.unknown()
    step = jax.jit(plan, in_shardings=plan.shardings)
    program = step.lower(*plan.argument_shapes).compile()
    off = relative_errors(program(*jax.device_put(case.arguments, plan.shardings)), case.want)
    assert max(off.values()) <= TOLERANCE, f"{plan.strategy.name} {SEED=}: {off}"
    disagreeing = [layer for layer in check_layers(plan) if not layer.agrees]
    assert not disagreeing, f"{plan.strategy.name} {SEED=}: {disagreeing}"
    priced: collections.Counter[str] = collections.Counter()
    for collective in plan.collectives:
        priced[collective.kind] += collective.num_bytes
    compiled = bytes_by_kind(compiled_collectives(program.as_text()))
    total = sum(compiled.values())
    assert abs(sum(priced.values()) - total) <= 0.02 * total, (
        f"{plan.strategy.name} {SEED=}: priced {priced}, compiled {compiled}"
    )


def strategies(found: jaxlwp.Plan, named: bool, count: int) -> list[jaxlwp.Plan]:
    """The plan found, the baselines that apply if they are asked for, and random ones."""
    plans = [found, *(baselines(found).values() if named else ())]
    draw = random.Random(SEED)
    for n in range(count):
        configs = [draw.choice(known) for known in found.space.configs]
        sizes = found.space.devices.axis_sizes
        strategy = make_strategy(f"random {n}", found.graph, configs, sizes)
        plans.append(with_strategy(found, strategy))
    return plans


def check_all(name: str, shape: tuple[int, ...], named: bool, count: int) -> int:
    """Check strategies of a network on a mesh; how many."""
    case = case_of(name)
    found = jaxlwp.parallelize(
        case.apply, *case.arguments, mesh=mesh_of(shape), rates=RATES, measure=False, train=False
    )
    plans = strategies(found, named, count)
    for plan in plans:
        check(case, plan)
    return len(plans)


@pytest.mark.parametrize("name", drawn(FAST, 0.2))
def test_found_and_a_random_strategy(name: str) -> None:
    shape = random.Random(SEED).choice(SHAPES)
    assert check_all(name, shape, False, 1) == 2


@pytest.mark.slow  # hours: in `make test-all`
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_every_strategy(
    name: str, shape: tuple[int, ...], record_property: Callable[[str, object], None]
) -> None:
    record_property("strategies", check_all(name, shape, True, RANDOM))
