"""Faults planted into the package, which the fuzzer must find.

They are planted into what the package calls of JAX, not into its own functions, so that they stay
planted when it changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_counts: dict[str, int] = {}


def _reached(name: str) -> None:
    _counts[name] = _counts.get(name, 0) + 1


def swap_axes() -> None:
    """Permutes over several axes read their pairs with the first two axes swapped."""
    right = lax.ppermute

    def wrong(x: Any, axes: Any, pairs: Any) -> Any:
        if isinstance(axes, str) or len(axes) < 2:
            return right(x, axes, pairs)
        _reached("swap")
        sizes = [lax.axis_size(axis) for axis in axes]

        def swapped(index: int) -> int:
            places = []
            for size in reversed(sizes):
                index, place = divmod(index, size)
                places.insert(0, place)
            a, b, *rest = places
            result = 0
            for size, place in zip([sizes[1], sizes[0], *sizes[2:]], [b, a, *rest], strict=True):
                result = result * size + place
            return result

        return right(x, axes, sorted((swapped(a), swapped(b)) for a, b in pairs))

    lax.ppermute = wrong  # type: ignore[assignment]


def drop_row() -> None:
    """One device does not receive its halo."""
    right = lax.ppermute

    def wrong(x: Any, axes: Any, pairs: Any) -> Any:
        parts = 1
        for axis in (axes,) if isinstance(axes, str) else axes:
            parts *= lax.axis_size(axis)
        if len(pairs) == parts:  # no halo: every device sends
            return right(x, axes, pairs)
        _reached("row")
        return right(x, axes, list(pairs)[1:])

    lax.ppermute = wrong  # type: ignore[assignment]


def _wrong_gradient(name: str, summed: Callable[[Any, Any], Any]) -> None:
    """Every third value that is made varying has another sum of its gradient."""
    right = lax.pcast
    seen = 0

    def wrong(x: Any, axes: Any, to: str) -> Any:
        nonlocal seen
        if to != "varying" or not axes or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return right(x, axes, to=to)
        seen += 1
        if seen % 3:
            return right(x, axes, to=to)
        _reached(name)

        @jax.custom_vjp
        def cast(x: Any) -> Any:
            return right(x, axes, to=to)

        cast.defvjp(lambda x: (cast(x), None), lambda _, g: (summed(g, axes),))
        return cast(x)

    lax.pcast = wrong  # type: ignore[assignment]


def skip_sum() -> None:
    """One device's part of a gradient stands for the sum of all."""

    def first(g: Any, axes: Any) -> Any:
        return lax.psum(jnp.where(lax.axis_index(axes) == 0, g, 0), axes)

    _wrong_gradient("skip", first)


def double_sum() -> None:
    """The sum of a gradient is added up twice."""
    _wrong_gradient("double", lambda g, axes: 2 * lax.psum(g, axes))


PLANTS = {
    "swap two axes in a permute": swap_axes,
    "drop a halo row": drop_row,
    "skip one gradient sum": skip_sum,
    "double a gradient sum": double_sum,
}


@contextlib.contextmanager
def plant(name: str) -> Iterator[Callable[[], int]]:
    """Plant a fault for a while; gives a function that says how often it was reached."""
    before, kept = (lax.ppermute, lax.pcast), dict(_counts)
    PLANTS[name]()
    try:
        yield lambda: sum(_counts.values()) - sum(kept.values())
    finally:
        lax.ppermute, lax.pcast = before
