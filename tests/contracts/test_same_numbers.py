"""Contract 1: under every config, loss, outputs and gradients equal one device's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.graph._graph import Layer
from jaxlwp.lower import _lower
from jaxlwp.space._config import Config

from .cases import CASES, EIGHT_PARTS, EIGHT_PARTS_SLOW, SIX_PARTS
from .harness import (
    SEED_VARIABLE,
    TOLERANCE,
    Case,
    Report,
    acceptable,
    draw_seed,
    drawn,
    relative_error,
    sweep,
)

SEED = draw_seed()


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Thousands of compiled programs would otherwise stay in memory."""
    yield
    jax.clear_caches()


def name_of(case: Case) -> str:
    return case.name


def every_assignment(layer: Layer, axis_sizes: dict[str, int]) -> set[Config]:
    """The space by its definition: each mesh axis goes to one dimension or to none."""
    configs = set()
    for chosen in itertools.product([None, *layer.dimensions], repeat=len(axis_sizes)):
        pairs = list(zip(axis_sizes, chosen, strict=True))
        splits = {name: [axis for axis, dim in pairs if dim == name] for name in layer.dimensions}
        degrees = {name: math.prod(axis_sizes[a] for a in axes) for name, axes in splits.items()}
        if all(
            degree <= min(layer.dimensions[name]) and layer.even.get(name, 0) % degree == 0
            for name, degree in degrees.items()
        ):
            configs.add(Config.of(splits))
    return configs


def check(case: Case, mesh: Mesh, **options: Any) -> None:
    """Sweep; everything must have been run, and nothing may be wrong."""
    print(f"repeat with {SEED_VARIABLE}={SEED}")
    report = sweep(case, mesh, SEED, **options)
    for layer in report.graph.layers:
        run = {choice[layer.index] for choice in report.checked}
        assert run == every_assignment(layer, dict(mesh.shape))
    assert not report.wrong, str(report)


@pytest.mark.parametrize("case", drawn(EIGHT_PARTS, 0.05))
def test_eight_devices(case: Case, mesh222: Mesh) -> None:
    check(case, mesh222)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT_PARTS_SLOW, ids=name_of)
def test_eight_devices_slow(case: Case, mesh222: Mesh) -> None:
    check(case, mesh222)


@pytest.mark.parametrize("case", drawn(CASES, 0.04, slow=[case for case in CASES if case.slow]))
def test_four_devices(case: Case, mesh22: Mesh) -> None:
    check(case, mesh22)


@pytest.mark.parametrize("case", SIX_PARTS, ids=name_of)
def test_axes_of_different_size(case: Case) -> None:
    if len(jax.devices()) < 6:
        pytest.skip("needs 6 devices")
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("a", "b"))
    check(case, mesh)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_default_compiler_options(mesh22: Mesh) -> None:
    check(case_named("conv-1d-27"), mesh22, fast_compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_four_devices_default_compiler_options(case: Case, mesh22: Mesh) -> None:
    check(case, mesh22, fast_compile=False)


# --- the sweep can fail ------------------------------------------------------------------------

SPLIT_SPACE = "conv-3x3/1"


def splits_space(config: Config) -> bool:
    return bool(config.axes("height") or config.axes("width"))


def wrong_configs(report: Report) -> set[Config]:
    return {wrong.configs[report.layer] for wrong in report.wrong}


def test_sees_missing_halo(mesh22: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = _lower.receive
    monkeypatch.setattr(_lower, "receive", lambda *args: 0 * receive(*args))
    report = sweep(case_named(SPLIT_SPACE), mesh22, SEED)
    spatial = {
        choice[report.layer] for choice in report.checked if splits_space(choice[report.layer])
    }
    assert wrong_configs(report) == spatial
    assert "repeat with" in str(report)


def test_sees_missing_halo_gradient(mesh22: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = _lower.receive
    monkeypatch.setattr(_lower, "receive", lambda *args: lax.stop_gradient(receive(*args)))
    report = sweep(case_named(SPLIT_SPACE), mesh22, SEED)
    spatial = {
        choice[report.layer] for choice in report.checked if splits_space(choice[report.layer])
    }
    assert wrong_configs(report) == spatial
    for wrong in report.wrong:
        off = {name for name, error in wrong.errors.items() if not error <= TOLERANCE}
        assert off == {"[1]['x']"}, "no other gradient passes back through the halo"


def test_sees_missing_sum(mesh22: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def own_part(x: Any, axes: Any) -> Any:
        """The first device's part for all, which is as replicated as the sum."""
        return lax.psum(jnp.where(lax.axis_index(axes) == 0, x, 0), axes)

    monkeypatch.setattr(_lower, "all_reduce", own_part)
    report = sweep(case_named(SPLIT_SPACE), mesh22, SEED)
    loss = len(report.graph.layers) - 1
    assert report.graph.layers[loss].kind == "reduce"
    summed = [
        choice
        for choice in report.checked
        if choice[report.layer].axes("reduction") or choice[loss].used_axes
    ]
    assert [wrong.configs for wrong in report.wrong] == summed
    assert summed


def test_sees_nan() -> None:
    expected = np.ones(8, np.float32)
    assert acceptable({"": relative_error(jnp.asarray(expected), expected)})
    spoilt = jnp.asarray(expected).at[3].set(jnp.nan)
    assert not acceptable({"": relative_error(spoilt, expected)})


def test_sees_one_wrong_copy(mesh22: Mesh) -> None:
    """A replicated result that differs on one device, where reading the array would not show it."""
    expected = np.ones(8, np.float32)
    devices = list(mesh22.devices.flat)
    copies = [jax.device_put(expected * (1 + (d == devices[-1])), d) for d in devices]
    everywhere = NamedSharding(mesh22, PartitionSpec())
    array = jax.make_array_from_single_device_arrays(expected.shape, everywhere, copies)
    assert relative_error(array, expected) == 1


def test_sees_wrong_shape_and_type() -> None:
    expected = np.ones(8, np.float32)
    assert not acceptable({"": relative_error(jnp.ones((8, 1)), expected)})
    assert not acceptable({"": relative_error(jnp.ones(8, jnp.int32), expected)})
