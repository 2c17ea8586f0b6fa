"""Runs a function under every config of its layers and compares with one device.

A case is one operator. Its function is traced, bound to configs and differentiated exactly as a
user's training function would be, and loss, output and every gradient are compared, on every
device, with plain `jax.value_and_grad` on one device.

What a case sweeps: every config of every layer of its graph. The operator's own layer stands
between an identity layer that makes its input and the loss; all three go through their configs in
independent random orders, so input and output change layout in ever new ways from run to run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.graph._graph import ComputationGraph, Layer
from jaxlwp.graph._trace import trace
from jaxlwp.lower._lower import Lowered
from jaxlwp.mesh._meshes import partition_spec, placed
from jaxlwp.space._config import Config, enumerate_configs
from tests.xla_flags import AS_USERS_COMPILE

TOLERANCE = 1e-5
"""Largest allowed max|a - b| / max|b| in float32."""

BATCH = 12
"""Configs per compiled program. Measured, wall seconds per config on two cores for a 3x3
convolution between two other layers: 1: 0.15, 4: 0.115, 12: 0.09, 36: 0.095."""

SEED_VARIABLE = "JAXLWP_SWEEP_SEED"

Shape = tuple[int, ...]


def draw_seed() -> int:
    """The seed of this run: JAXLWP_SWEEP_SEED, which `tests/conftest.py` draws if it is not set."""
    return int(os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(2**31))))


def drawn(cases: Iterable[Any], share: float, slow: Iterable[Any] = ()) -> list[Any]:
    """Parameters of a test: a share of the cases, drawn anew each run; the rest is slow.

    `make test-all` runs all of them.

    Args:
      cases: the cases, or their names.
      share: of them, that `make test` runs.
      slow: those of the cases that it never runs.
    """
    cases, left_out = list(cases), list(slow)
    fast = [case for case in cases if case not in left_out]
    rng = random.Random(f"{draw_seed()}/{[_label(case) for case in cases]}")
    chosen = rng.sample(fast, math.ceil(share * len(fast)))
    return [
        pytest.param(case, id=_label(case), marks=() if case in chosen else pytest.mark.slow)
        for case in cases
    ]


def _label(case: Any) -> str:
    return str(getattr(case, "name", case))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operator with its sizes.

    Attributes:
      name: unique; the id of the test.
      apply: `apply(params, *args)` gives the operator's output, or a tree of which the loss reads
        the first array.
      params: shapes of what is differentiated: the input "x" and the weights.
      kind: kind of the layer that must be in the graph.
      dimensions: its parallelizable dimensions, so that an operator that silently lost its rule,
        or a dimension of it, does not pass as a sweep of nothing.
      args: makes the other arguments (labels, random keys).
      whole_numbers: draw small integers instead of normal numbers. Arithmetic is then exact, so no
        rounding can carry a value across the kink of a relu, and maxima have ties.
      front: put an identity layer with a config of its own before the operator. Without it the
        operator reads its input from the arguments, stored as it wants it.
      slow: swept by `make test-all` only; a case that is harder on the same rule is not.
    """

    name: str
    apply: Callable[..., Any]
    params: dict[str, Shape]
    kind: str
    dimensions: frozenset[str]
    args: Callable[[np.random.Generator], tuple[Any, ...]] = lambda rng: ()
    whole_numbers: bool = False
    front: bool = True
    slow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong:
    """A choice of configs whose numbers differ from one device's."""

    configs: tuple[Config, ...]
    errors: dict[str, float]
    text: str

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a sweep found.

    Attributes:
      graph: the traced function.
      layer: index of the case's layer.
      checked: every choice of one config per layer that was run.
      wrong: those whose numbers differ.
      worst: largest relative error of all.
      seed: repeats the sweep.
    """

    graph: ComputationGraph
    layer: int
    checked: tuple[tuple[Config, ...], ...]
    wrong: tuple[Wrong, ...]
    worst: float
    seed: int

    def __str__(self) -> str:
        lines = [f"{len(self.wrong)} of {len(self.checked)} choices of configs are wrong"]
        lines += [f"  {wrong}" for wrong in self.wrong[:12]]
        return "\n".join([*lines, f"repeat with {SEED_VARIABLE}={self.seed}"])


def identity_layer(x: Any) -> Any:
    """A pooling of window 1: a layer of its own that can be split in every dimension."""
    ones = (1,) * x.ndim
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, ones, ones, "VALID")


def convolve_grouped(x: Any, kernel: Any, *, groups: int) -> Any:
    """A 3x3 convolution of channels-last images in groups of channels."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def loss_of(case: Case) -> Callable[..., Any]:
    """`loss(params, weights, *args)`, with the output as auxiliary result."""

    def loss(params: dict[str, Any], weights: Any, *args: Any) -> tuple[Any, Any]:
        if case.front:
            params = {**params, "x": identity_layer(params["x"])}
        y = case.apply(params, *args)
        return jnp.sum(jax.tree.leaves(y)[0] * weights), y

    return loss


def draw(case: Case, seed: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Random parameters and arguments of a case's loss."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])

    def array(shape: Shape) -> Any:
        drawn = rng.integers(-3, 4, shape) if case.whole_numbers else rng.standard_normal(shape)
        return jnp.asarray(drawn, jnp.float32)

    params = {name: array(shape) for name, shape in case.params.items()}
    args = case.args(rng)
    y = jax.tree.leaves(jax.jit(case.apply)(params, *args))[0]
    # Weights with the output's signs: the loss is a sum of positive numbers. Its relative error
    # would mean nothing if large terms cancelled.
    low, high = (1, 4) if case.whole_numbers else (0.5, 1.5)
    size = (
        rng.integers(low, high, y.shape) if case.whole_numbers else rng.uniform(low, high, y.shape)
    )
    return params, (jnp.asarray(np.where(y < 0, -size, size), y.dtype), *args)


def every_config(
    graph: ComputationGraph,
    axis_sizes: dict[str, int],
    rng: random.Random,
    orders: Sequence[Sequence[str]] = (),
) -> tuple[tuple[Config, ...], ...]:
    """Choices of one config per layer in which every config of every layer appears.

    Args:
      graph: the traced function.
      axis_sizes: devices along each mesh axis.
      rng: shuffles.
      orders: of the axes in which configs name several; that of the mesh by default.
    """

    def configs(layer: Layer) -> list[Config]:
        found = [
            config
            for order in orders or [tuple(axis_sizes)]
            for config in enumerate_configs(
                sizes=layer.dimensions,
                even=layer.even,
                axis_groups=[[axis for axis in order if axis_sizes[axis] > 1]],
                axis_sizes=axis_sizes,
                interchangeable=False,
            )
        ]
        return list(dict.fromkeys(found))

    spaces = list(map(configs, graph.layers))
    count = max(map(len, spaces))
    for space in spaces:
        rng.shuffle(space)
    return tuple(tuple(space[i % len(space)] for space in spaces) for i in range(count))


def reorders(configs: Sequence[Config], names: Sequence[str]) -> bool:
    """Whether any config splits a dimension over axes in another order than that of the mesh."""
    named = (axes for config in configs for _, axes in config.splits)
    return any(list(axes) != sorted(axes, key=names.index) for axes in named)


def first_choices(
    choices: tuple[tuple[Config, ...], ...], names: Sequence[str], most: int | None
) -> tuple[tuple[Config, ...], ...]:
    """At most `most` choices; half of them reorder the axes of the mesh, where so many do.

    A short sweep has to hold both kinds whatever its seed is: a draw by chance alone held no choice
    that reorders axes once in some hundred runs.
    """
    if most is None or len(choices) <= most:
        return choices
    other, same = [], []
    for choice in choices:
        (other if reorders(choice, names) else same).append(choice)
    count = max(min(most // 2, len(other)), most - len(same))
    return (*other[:count], *same[: most - count])


def bind(
    graph: ComputationGraph, configs: Sequence[Config], mesh: Mesh, example: Any
) -> Callable[..., Any]:
    """The traced function under the given configs, with the signature of the original.

    Args:
      graph: the traced function.
      configs: one config per layer.
      mesh: the mesh.
      example: a pytree like the function's result.
    """
    lowered = Lowered(graph=graph, configs=tuple(configs), axis_sizes=dict(mesh.shape))
    specs = tuple(map(partition_spec, lowered.input_layouts()))
    sharded = jax.shard_map(
        lowered,
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(map(partition_spec, lowered.output_layouts())),
    )
    tree, shardings = jax.tree.structure(example), [NamedSharding(mesh, spec) for spec in specs]
    return lambda *args: jax.tree.unflatten(
        tree, sharded(*map(placed, jax.tree.leaves(args), shardings))
    )


def relative_error(actual: jax.Array, expected: Any) -> float:
    """max|a - b| / max|b| over all devices' copies; NaN where either holds one."""
    expected = np.asarray(expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    scale = np.max(np.abs(expected))
    blocks = ((np.asarray(s.data), expected[s.index]) for s in actual.addressable_shards)
    worst = np.max([np.max(np.abs(a - b)) for a, b in blocks])
    return float(worst / scale)


def compare(actual: Any, expected: Any) -> dict[str, float]:
    """Relative error of every array of a result."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    pairs = zip(names, jax.tree.leaves(actual), leaves, strict=True)
    return {name: relative_error(a, b) for name, a, (_, b) in pairs}


def acceptable(errors: dict[str, float]) -> bool:
    """Whether every error is within the tolerance; NaN is not."""
    return all(error <= TOLERANCE for error in errors.values())


def sweep(
    case: Case,
    mesh: Mesh,
    seed: int,
    *,
    fast_compile: bool = True,
    orders: Sequence[Sequence[str]] = (),
    most: int | None = None,
) -> Report:
    """Run a case under every config of its layers.

    Args:
      case: the operator.
      mesh: where it runs.
      seed: of the inputs and of the order of configs.
      fast_compile: False compiles with XLA's own settings.
      orders: see `every_config`.
      most: choices of configs that are run at most; all by default. See `first_choices`.
    """
    params, args = draw(case, seed)
    loss = loss_of(case)
    graph = trace(loss, params, *args)
    layer = _operator_layer(case, graph)
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *args)
    _check_reference(case, expected)
    choices = every_config(graph, dict(mesh.shape), random.Random(seed), orders)
    choices = first_choices(choices, mesh.axis_names, most)
    wrong, worst = [], 0.0
    for start in range(0, len(choices), BATCH):
        batch = choices[start : start + BATCH]
        functions = [bind(graph, configs, mesh, expected[0]) for configs in batch]
        results = _run(functions, params, args, mesh, fast_compile)
        for configs, actual in zip(batch, results, strict=True):
            errors = compare(actual, expected)
            worst = max(worst, *errors.values())
            if not acceptable(errors):
                wrong.append(_wrong(graph, configs, errors))
    return Report(
        graph=graph, layer=layer, checked=choices, wrong=tuple(wrong), worst=worst, seed=seed
    )


def _run(
    functions: Sequence[Callable[..., Any]],
    params: Any,
    args: tuple[Any, ...],
    mesh: Mesh,
    fast_compile: bool,
) -> list[Any]:
    """Values and gradients of all functions, from one compiled program."""

    def together(params: Any, args: tuple[Any, ...]) -> list[Any]:
        return [jax.value_and_grad(fn, has_aux=True)(params, *args) for fn in functions]

    step = jax.jit(
        together,
        in_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=None if fast_compile else AS_USERS_COMPILE,
    )
    return step(params, args)


def _operator_layer(case: Case, graph: ComputationGraph) -> int:
    """Index of the case's layer: of its kind, split in the expected dimensions."""
    candidates = [layer for layer in graph.layers if layer.kind == case.kind]
    for layer in candidates:
        if frozenset(layer.dimensions) == case.dimensions:
            return layer.index
    found = [(layer.kind, sorted(layer.dimensions)) for layer in graph.layers]
    raise AssertionError(f"no {case.kind} layer with {sorted(case.dimensions)} among {found}")


def _check_reference(case: Case, expected: Any) -> None:
    """Every array must hold something to compare: no NaN, not all zero."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        size = float(jnp.max(jnp.abs(leaf)))
        if not (0 < size < float("inf")):
            name = jax.tree_util.keystr(path)
            raise AssertionError(f"{case.name}: the reference {name} has the maximum {size}")


def _wrong(graph: ComputationGraph, configs: tuple[Config, ...], errors: dict[str, float]) -> Wrong:
    pairs = zip(graph.layers, configs, strict=True)
    chosen = "; ".join(f"{layer.name} [{_splits(config)}]" for layer, config in pairs)
    off = ", ".join(f"{k} {e:.1e}" for k, e in errors.items() if not e <= TOLERANCE)
    return Wrong(configs=configs, errors=errors, text=f"{chosen}: {off}")


def _splits(config: Config) -> str:
    return " ".join(f"{name}={'+'.join(axes)}" for name, axes in config.splits)
