"""What is a resizing, and what a dense layer whose weight happens to be known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlwp.graph._trace import trace

RNG = np.random.default_rng(0)


def kinds(apply: Any, *shape: int) -> list[str]:
    """Kinds of the layers of `apply(x)`, but for the sum of its result."""
    graph = trace(lambda x: jnp.sum(apply(x)), jnp.ones(shape))
    assert graph.layers[-1].kind == "reduce"
    return [layer.kind for layer in graph.layers[:-1]]


def weight(rows: int, columns: int) -> Any:
    return RNG.normal(size=(rows, columns)).astype(np.float32)


def block_means(rows: int, size: int) -> Any:
    return np.repeat(np.eye(rows // size, dtype=np.float32), size, 0) / size


def mel_filters(rows: int, columns: int) -> Any:
    """Triangles that overlap by half, each around a frequency of its own."""
    centre = np.linspace(0, rows - 1, columns + 2)
    at = np.arange(rows)[:, None]
    step = centre[1] - centre[0]
    return np.maximum(0, 1 - np.abs(at - centre[1:-1]) / step).astype(np.float32)


DENSE = {
    "square": weight(8, 8),
    "wider": weight(3, 16),
    "narrower": weight(8, 2),
    "large": weight(40, 30),
    "one row": weight(1, 5),
    "one column": weight(6, 1),
    "triangle": np.tril(np.ones((8, 8), np.float32)),
    "other triangle": np.triu(np.ones((6, 6), np.float32)),
    "a few zeros": np.where(np.eye(5) > 0, 0, weight(5, 5)),
    "colours": np.float32([[1, 1, 1], [0, -0.39, 2.03], [1.14, -0.58, 0]]),
    "reversed rows": np.eye(7, dtype=np.float32)[::-1],
    "cosines": np.cos(np.outer(np.arange(8) + 0.5, np.arange(8)) * np.pi / 8).astype(np.float32),
    "nothing": np.zeros((4, 4), np.float32),
}
BANDS = {
    "means": block_means(8, 2),
    "differences": (np.eye(7) - np.eye(7, k=1)).astype(np.float32),
    "mel": mel_filters(40, 8),
    "zero columns": np.pad(block_means(8, 2), ((0, 0), (2, 3))),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("equation", ["bi,io->bo", "bti,io->bto", "bi,io->ob"])
def test_a_known_weight_is_that_of_a_dense_layer(name: str, equation: str) -> None:
    matrix = DENSE[name]
    shape = (4, 3, len(matrix)) if "t" in equation else (4, len(matrix))
    assert kinds(lambda x: jnp.einsum(equation, x, matrix), *shape) == ["dense"]
    assert kinds(lambda x: jnp.einsum(equation, x, 2 * jnp.asarray(matrix)), *shape) == ["dense"]


@pytest.mark.parametrize("name", BANDS)
def test_a_band_that_moves_is_a_resizing(name: str) -> None:
    matrix = BANDS[name]
    assert kinds(lambda x: jnp.einsum("bti,io->bto", x, matrix), 4, 3, len(matrix)) == ["resize"]
    assert kinds(lambda x: jnp.einsum("oi,ib->ob", matrix.T, x), len(matrix), 4) == ["resize"]


@pytest.mark.parametrize("method", ["linear", "cubic", "lanczos3", "lanczos5"])
@pytest.mark.parametrize(("rows", "resized"), [(24, 72), (24, 48), (27, 55), (32, 24), (64, 33)])
def test_images(method: str, rows: int, resized: int) -> None:
    """Cubic and Lanczos kernels are zero at some rows inside of the band."""

    def apply(x: Any) -> Any:
        return jax.image.resize(x, (2, resized, 5, 3), method)

    assert kinds(apply, 2, rows, 5, 3) == ["resize"]


@pytest.mark.parametrize(("rows", "resized"), [(2, 3), (2, 8), (3, 2), (4, 3), (5, 13), (8, 4)])
def test_small_images(rows: int, resized: int) -> None:
    def apply(x: Any) -> Any:
        return jax.image.resize(x, (2, resized, 3), "linear")

    assert kinds(apply, 2, rows, 3) == ["resize"]


@pytest.mark.parametrize(("rows", "resized", "method"), [(2, 8, "cubic"), (64, 2, "linear")])
def test_a_kernel_over_the_whole_image_is_dense(rows: int, resized: int, method: str) -> None:
    """Every row of the result reads all rows, or half of very many: there is no band."""

    def apply(x: Any) -> Any:
        return jax.image.resize(x, (2, resized, 3), method)

    assert kinds(apply, 2, rows, 3) == ["dense"]


def test_zoom() -> None:
    """Rows beside the image are zero, and the scale is not that of the shapes."""

    def apply(x: Any) -> Any:
        scale, shift = jnp.float32([2.5, 0.5]), jnp.float32([3.0, -1.0])
        return jax.image.scale_and_translate(x, (2, 20, 16), (1, 2), scale, shift, "cubic")

    assert kinds(apply, 2, 12, 16) == ["resize", "resize"]
