"""Gradients of filters that are taken as vectors.

cuDNN makes the gradient of a filter in an order of dimensions of its own. XLA for GPUs would add it
up in that order, update parameter and momentum in it, and copy both from it and back. A vector has
one order, so the gradient alone is turned, in the dtype in which it arises. That pays for filters
of 1x1, where they are added up, and for those of three spatial dimensions. For the others of two it
gains for some networks and loses for others.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import jax
from jax import lax

from jaxlwp.graph import ComputationGraph
from jaxlwp.program import Equation


class FilterKind(Enum):
    """What is done for the gradient of a filter to be a vector."""

    SUMMED = "it becomes varying as a vector, if it does, so its gradients are added up as one"
    TURNED = "its gradient is made a vector, after the sums"
    KEPT = "the same, and its cast is kept for the backward pass"


def filter_kinds(graph: ComputationGraph) -> dict[int, FilterKind]:
    """Values of a graph that are such filters; none in a function that is only evaluated."""
    found = {}
    for eqn in graph.program.equations if graph.gradients else ():
        kind = filter_kind(eqn)
        if kind is None or (kind is FilterKind.KEPT and eqn.operands[1] not in graph.casts):
            continue
        found[graph.casts.get(eqn.operands[1], eqn.operands[1])] = kind
    return found


def filter_kind(eqn: Equation) -> FilterKind | None:
    """How the gradient of a convolution's filter becomes a vector; None if it does not.

    Where rows are put between those of the input, XLA casts the filter once more for the backward
    pass, in one kernel with its update: the backward pass would wait for the sums.
    """
    if eqn.name != "conv_general_dilated":
        return None
    kernel = eqn.operand_values[1]
    if len(kernel.shape) > 4:
        if set(eqn.params["lhs_dilation"]) == {1}:
            return FilterKind.TURNED
        return FilterKind.KEPT if kernel.itemsize < 4 else None
    point = len(kernel.shape) > 2 and math.prod(kernel.shape[:-2]) == 1
    return FilterKind.SUMMED if point else None


def turned(x: Any, *, kept: bool) -> Any:
    """A filter's block, its gradient made a vector; `kept` as it is for the backward pass."""

    @jax.custom_vjp
    def read(x: Any) -> Any:
        return lax.optimization_barrier(x) if kept else x

    def back(_: None, gradient: Any) -> tuple[Any]:
        return (lax.optimization_barrier(gradient.reshape(-1)).reshape(gradient.shape),)

    read.defvjp(lambda x: (read(x), None), back)
    return read(x)
