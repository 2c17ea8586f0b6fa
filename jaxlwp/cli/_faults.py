"""Known faults of JAX, tried on the spot.

Each program here gets wrong numbers from some version of JAX, without an error, and each is small.
They were found while jaxlwp was made; the first two are why its plans split a network inside
`jax.shard_map`, with halo exchanges of its own, in place of constraints for the partitioner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NUM_DEVICES = 4
"""Devices that the programs run on."""

TOLERANCE = 1e-4
"""Relative difference, of the largest value, from which on numbers are wrong."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What came of one program.

    Attributes:
      name: what the program does.
      concerns: whose numbers are wrong if it is there.
      error: largest difference from the right numbers, relative to the largest of these.
    """

    name: str
    concerns: str
    error: float

    @property
    def present(self) -> bool:
        """Whether this JAX has the fault; NaN is one."""
        return not self.error <= TOLERANCE


CONSTRAINED = "code that constrains arrays split by height or width (with_sharding_constraint)"
EVERYBODY = "programs on one device too, of jaxlwp as of anybody"


def known_faults(devices: Sequence[Any]) -> tuple[Fault, ...]:
    """Try every program.

    Args:
      devices: `NUM_DEVICES` devices, simulated ones for instance.
    """
    mesh = Mesh(np.array(devices[:NUM_DEVICES], dtype=object).reshape(2, 2), ("a", "b"))
    right = gradients(spatial_loss, spatial_arguments())

    def constrained(array: Any) -> Any:
        return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(None, "a")))

    wrong = gradients(functools.partial(spatial_loss, placed=constrained), spatial_arguments())
    names = (
        "gradient of a convolution's weights, rows split by a constraint",
        "gradient of a max pool with windows that overlap, rows split by a constraint",
    )
    split = [
        Fault(name=name, concerns=CONSTRAINED, error=difference(a, b))
        for name, a, b in zip(names, wrong, right, strict=True)
    ]
    return (*split, _update_in_place())


def spatial_arguments() -> tuple[Any, ...]:
    """What `spatial_loss` is called with."""
    draw = np.random.default_rng(0).standard_normal
    shapes = (3, 3, 2, 4), (2, 8, 8, 2), (2, 8, 8, 2), (2, 8, 8, 4)
    return tuple(draw(shape).astype(np.float32) for shape in shapes)


def spatial_loss(
    w: Any, x: Any, z: Any, scale: Any, placed: Callable[[Any], Any] = lambda y: y
) -> Any:
    """A scalar of a convolution and a max pool, whose results may be placed on devices.

    Args:
      w: weights, shape (3, 3, 2, 4).
      x: images of the convolution, shape (2, 8, 8, 2).
      z: images of the max pool, likewise.
      scale: of each result, shape (2, 8, 8, 4).
      placed: what is done to both results.
    """
    layout = ("NHWC", "HWIO", "NHWC")
    y = placed(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout))
    p = placed(lax.reduce_window(z, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"))
    return jnp.sum(y * scale) + jnp.sum(p * scale[..., :2])


def gradients(loss: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Gradients of a loss of `spatial_arguments`, of the weights and of the pool's images.

    The loss is computed too: what is split forward decides what the partitioner does backward.
    """
    with jax.default_matmul_precision("highest"):
        _, found = jax.jit(jax.value_and_grad(loss, (0, 2)))(*arguments)
    return found[0], found[1]


def difference(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def _update_in_place() -> Fault:
    """A value that XLA for processors overwrites while it is still read."""
    draw = np.random.default_rng(2).standard_normal
    x, w = draw((13, 11, 11, 3)).astype(np.float32), draw(3).astype(np.float32)

    def program(x: Any, w: Any) -> Any:
        scaled = x * w
        shifted = scaled.at[:, 1:].set(2 * scaled[:, :10])[:, None]
        return jnp.sum(shifted * jnp.arange(11)[:, None, None], (0, 1, 3))

    scaled = x.astype(np.float64) * w
    shifted = scaled.copy()
    shifted[:, 1:] = 2 * scaled[:, :10]
    right = np.sum(shifted[:, None] * np.arange(11)[:, None, None], (0, 1, 3))
    return Fault(
        name="rows written from the rows before them (.at[:, 1:].set(2 * x[:, :-1]))",
        concerns=EVERYBODY,
        error=difference(jax.jit(program)(x, w), right),
    )
