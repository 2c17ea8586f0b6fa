"""Padding at the end of uneven blocks: what it holds, and who may read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlwp.ops import RULES, Labels, rule_of
from jaxlwp.program import Equation, Program
from jaxlwp.space import Layout, degree


def elementwise(eqn: Equation) -> bool:
    """Whether padding stays padding: no element of a result reads another place of an operand."""
    rule = RULES.get(eqn.name)
    return rule is not None and rule.kind == "elementwise" and rule_of(eqn) is not None


def neutral(fill: str | None, dtype: Any) -> Any:
    """The number that padding holds so that it changes no result; 0 where any will do.

    Args:
      fill: of a signature.
      dtype: of the operand.
    """
    if fill in (None, "zero", "value"):
        return 0
    lowest = fill == "lowest"
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return int(info.min if lowest else info.max)
    return -np.inf if lowest else np.inf


def uneven_dimensions(
    labels: Labels, shape: Sequence[int], layout: Layout, axis_sizes: Mapping[str, int]
) -> frozenset[str | None]:
    """Names of the dimensions of a value that have padding on some device."""
    return frozenset(
        label
        for label, size, axes in zip(labels, shape, layout, strict=True)
        if size % degree(axes, axis_sizes)
    )


def broadcasts(
    program: Program, operand: int, labels: Labels, uneven: frozenset[str | None]
) -> bool:
    """Whether an operand that can have a cotangent is broadcast over a result's padding.

    Not that of the parameters alone: users take gradients of other arguments, too.

    Args:
      program: the function.
      operand: index of the value.
      labels: names of its dimensions.
      uneven: names of the result's dimensions that have padding.
    """
    if operand in program.constants or not program.values[operand].differentiable:
        return False
    return not uneven <= set(labels)
