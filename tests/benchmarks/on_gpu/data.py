"""Networks, arrays and times that the parts share."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.unet import UNet
from tests.benchmarks import gpu

SmallUNet = functools.partial(UNet, depth=2, width=8)
SMALL = {
    "LeNet-5": gpu.Network("models.lenet:LeNet5", 8),
    "ResNet-18": gpu.Network("models.resnet:ResNet18", 16, (32, 32, 3)),
    "small U-Net": gpu.Network("tests.benchmarks.on_gpu.data:SmallUNet", 2, (32, 32, 1)),
}
"""Networks that only the GPU check has, beside those of `make bench-gpu`."""

gpu.NETWORKS.update(SMALL)
RANDOM_VALUES = 1 << 16


def workload(network: str, dtype: str, batch: int | None = None) -> gpu.Workload:
    """Training of a network, in shapes and dtypes alone."""
    known = gpu.NETWORKS[network]
    batch = batch or known.batch
    if "U-Net" in network:
        return gpu.Row(network, dtype, batch, "h200:1").workload()
    name = f"tests.benchmarks.gpu:{network}_{dtype}"
    return gpu.load_workload(name, batch=batch, input_shape=known.input_shape, abstract=True)


def filled(tree: Any, *, weights: bool = False) -> Any:
    """Arrays on the host for shapes: random, and large ones repeat themselves.

    Args:
      tree: shapes and dtypes.
      weights: whether arrays of more than one dimension are scaled by what a neuron reads, and
        the others are ones, so that numbers stay of one size through a network.
    """

    def leaf(path: Any, shape: Any) -> Any:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), shape.shape) if shape.shape else _key()
        generator = np.random.default_rng(len(str(path)) + math.prod(shape.shape))
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return generator.integers(2, size=shape.shape).astype(shape.dtype)
        count = min(math.prod(shape.shape), RANDOM_VALUES)
        values = generator.standard_normal(count, np.float32)
        if weights and len(shape.shape) > 1:
            values *= math.sqrt(2 / math.prod(shape.shape[:-1]))
        elif weights:
            values = np.full(1, float("scale" in str(path)), np.float32)
        return np.resize(values.astype(shape.dtype), shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _key() -> Any:
    return jax.random.key(0)


def in_turns(
    runs: Sequence[Callable[[], Any]], *, left_s: Callable[[], float], long_s: float, rounds: int
) -> list[list[float]]:
    """Seconds of each of some programs, which take turns, in an order that rotates.

    Args:
      runs: each starts a program and returns what is to be waited for.
      left_s: no more rounds but three once this is negative.
      long_s: how long one of them runs before it is waited for; calls in between queue up.
      rounds: of all of them.
    """
    calls = []
    for run in runs:
        jax.block_until_ready(run())
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls.append(max(1, min(200, math.ceil(long_s / (time.perf_counter() - start)))))
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        if number >= 3 and left_s() < 0:
            break
        for offset in range(len(runs)):
            i = (number + offset) % len(runs)
            start = time.perf_counter()
            for _ in range(calls[i]):
                out = runs[i]()
            jax.block_until_ready(out)
            times[i].append((time.perf_counter() - start) / calls[i])
    return times


def median_ratio(ours: Sequence[float], plain: Sequence[float]) -> float:
    """Median over rounds of the ratio of two programs that took turns."""
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))
