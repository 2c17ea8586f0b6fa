"""Contracts 1 and 2 on the model zoo: the found strategy, the baselines, random strategies.

Loss, outputs, running statistics and gradients equal one device's to 1e-4. As in `test_networks`,
each program gets several random inputs: a rounding that moves one activation across zero changes
gradients by far more, but not for every input. In bfloat16 a strategy is, over all inputs, no
further from float32 than one device is, times 1.5. Predicted bytes are within 2 % of compiled ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from .harness import draw_seed, drawn
from .zoo import (
    LARGE,
    SEARCHED,
    ZOO,
    Compiled,
    case,
    compile_step,
    one_device,
    plan_for,
    random_batch,
    relative_errors,
)

SEED = draw_seed()
DRAWS = 20  # each costs a second at most
TOLERANCE = 1e-4
RANDOM = 20
FAST_BFLOAT16 = ("resnet50", "mobilenet_v2", "convnext_t", "unet_bilinear")  # the rest: test-all


@pytest.fixture(autouse=True)
def forget_compiled_programs() -> Any:
    yield
    jax.clear_caches()


def check_numbers(name: str, strategy: Any, compiled: Compiled) -> None:
    """Same loss, outputs, statistics for every input, same gradients for one."""
    this, errors = case(name, SEED), []
    for draw in range(DRAWS):
        batch = random_batch(name, SEED + draw)
        values, gradients = compiled.step(this.params, this.stats, *batch)
        expected_values, expected = one_device(name, SEED)(this.params, this.stats, *batch)
        off = relative_errors(values, expected_values)
        assert max(off.values()) <= TOLERANCE, f"{name} {strategy} {SEED=} {draw=}: {off}"
        errors.append(max(relative_errors(gradients, expected).values()))
        if errors[-1] <= TOLERANCE:
            return
    pytest.fail(f"{name} {strategy} {SEED=}: relative errors of gradients {errors}")


def check_strategy(name: str, strategy: str | int) -> Compiled:
    this = case(name, SEED)
    compiled = compile_step(this, plan_for(this, strategy))
    check_numbers(name, strategy, compiled)
    return compiled


@pytest.mark.parametrize("name", drawn(ZOO, 0.2, slow=(*LARGE, "vae_decoder")))
def test_found_strategy_and_baselines(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """Same numbers, and predicted bytes within 2 % of the compiled ones."""
    assert not case(name, SEED).space.graph.unknown()
    rows = {}
    for strategy in SEARCHED:
        compiled = check_strategy(name, strategy)
        predicted, real = sum(compiled.predicted.values()), sum(compiled.compiled.values())
        rows[strategy] = compiled
        record_property(
            "bytes", f"{name:22}{strategy:10}{predicted:>12,}{real:>12,}{compiled.difference:>9.2%}"
        )
    for strategy, compiled in rows.items():
        assert compiled.difference <= 0.02, (
            f"{strategy}: predicted {compiled.predicted}, compiled {compiled.compiled}"
        )


@pytest.mark.slow  # in `make test-all`: each takes some seconds to compile
@pytest.mark.parametrize("strategy", range(RANDOM))
@pytest.mark.parametrize("name", ZOO)
def test_random_strategies(name: str, strategy: int) -> None:
    check_strategy(name, strategy)


def distance(actual: Any, expected: Any) -> float:
    """Euclidean distance of all leaves, relative to the length of the expected ones."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    off = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return float(np.sqrt(off / sum(float(np.sum(b**2)) for _, b in pairs)))


@pytest.mark.parametrize("name", drawn(ZOO, 0.25, slow=set(ZOO).difference(FAST_BFLOAT16)))
def test_bfloat16(name: str) -> None:
    """The found strategy in bfloat16: as near to float32 as one device in bfloat16, times 1.5.

    Of all inputs together: on a single one, both distances vary by a fifth by chance.
    """
    this = case(name, SEED, "bfloat16")
    compiled = compile_step(this, plan_for(this, "search"))
    exact, alone, split = [], [], []
    for draw in range(DRAWS):
        arguments = (this.params, this.stats, *random_batch(name, SEED + draw))
        exact.append(one_device(name, SEED)(*arguments))
        alone.append(one_device(name, SEED, "bfloat16")(*arguments))
        split.append(compiled.step(*arguments))
    for part in (0, 1):  # values, gradients
        expected, one, many = ([run[part] for run in runs] for runs in (exact, alone, split))
        assert distance(many, expected) <= 1.5 * distance(one, expected), f"{name} {SEED=}"
