"""Convolution, grouped and transposed too: sample, spatial, channel and reduction splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlwp.ops._rule import Labels, Local, Rule, Signature, Window, spatial_names
from jaxlwp.ops._swapped import ConvDim, rows_to_add, with_rows
from jaxlwp.program import Equation


def _signature(eqn: Equation) -> Signature | None:
    params = eqn.params
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    names = spatial_names(len(params["window_strides"]))
    rhs_shape = eqn.operand_values[1].shape
    windows = {
        name: Window(
            size=rhs_shape[dim],
            stride=stride,
            dilation=dilation,
            pad_low=low,
            base_dilation=base_dilation,
        )
        for name, dim, stride, dilation, (low, _), base_dilation in zip(
            names,
            numbers.rhs_spec[2:],
            params["window_strides"],
            params["rhs_dilation"],
            params["padding"],
            params["lhs_dilation"],
            strict=True,
        )
    }
    # A group reads its own input channels only: whole groups are split, input and output alike.
    feature = "reduction" if groups == 1 else "channel"
    return Signature(
        role="anchor",
        operands=(
            _place(numbers.lhs_spec, ("sample", feature, *names)),
            _place(
                numbers.rhs_spec,
                ("channel", feature if groups == 1 else None, *(None for _ in names)),
            ),
        ),
        results=(_place(numbers.out_spec, ("sample", "channel", *names)),),
        windows=windows,
        even={"channel": groups} if groups > 1 else {},
        fill="zero",
    )


def _place(spec: Sequence[int], labels: Sequence[str | None]) -> Labels:
    """Labels in array order from labels in the order (batch, feature, space...) of a spec."""
    result: list[str | None] = [None] * len(spec)
    for dim, label in zip(spec, labels, strict=True):
        result[dim] = label
    return tuple(result)


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    params = eqn.params
    names = [local.names[dim] for dim in params["dimension_numbers"].lhs_spec[2:]]
    left_over = [
        local.haloed.get(name or "", (*pad, dilation))
        for name, pad, dilation in zip(
            names, params["padding"], params["lhs_dilation"], strict=True
        )
    ]
    x, left_over = _compiled_right(eqn, operands[0], operands[1], left_over)
    feature = params["dimension_numbers"].lhs_spec[1]
    whole = eqn.operand_values[0].shape[feature]
    groups = params["feature_group_count"]
    return eqn.bind(
        x,
        operands[1],
        padding=tuple((low, high) for low, high, _ in left_over),
        lhs_dilation=tuple(dilation for _, _, dilation in left_over),
        feature_group_count=groups * operands[0].shape[feature] // whole if groups > 1 else 1,
    )


Padding = tuple[int, int, int]
"""Low padding, high padding, base dilation."""


def _compiled_right(
    eqn: Equation, x: Any, kernel: Any, left_over: list[Padding]
) -> tuple[Any, list[Padding]]:
    """The operand and its padding, so that XLA compiles the convolution and its gradients.

    Where it would end the process, the operand gets rows of zeros, and the padding takes them away.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        return x, left_over  # operands of these are never swapped
    windows = [
        ConvDim(
            rows=x.shape[dim],
            kernel=kernel.shape[kernel_dim],
            low=low,
            high=high,
            base=base,
            dilation=dilation,
            stride=stride,
        )
        for dim, kernel_dim, (low, high, base), dilation, stride in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            left_over,
            eqn.params["rhs_dilation"],
            eqn.params["window_strides"],
            strict=True,
        )
    ]
    added = rows_to_add(windows)
    if not any(added):
        return x, left_over
    config = [(0, 0, 0)] * x.ndim
    for dim, rows in zip(numbers.lhs_spec[2:], added, strict=True):
        config[dim] = (0, rows, 0)
    # The barrier keeps the compiler from folding the rows into the padding again.
    x = lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), config))
    return x, [(w.low, w.high, w.base) for w in map(with_rows, windows, added)]


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    out_channels = int(operands[1][eqn.params["dimension_numbers"].rhs_spec[0]])
    # Two operations (multiply, add) per result element and kernel element of its channel. Of a
    # dilated array (transposed convolution) most elements are zeros that no kernel multiplies.
    per_element = math.prod(operands[1]) / max(out_channels, 1)
    dilation = float(math.prod(eqn.params["lhs_dilation"]))
    return 2.0 * math.prod(results[0]) * per_element / dilation


RULES = {
    "conv_general_dilated": Rule(kind="conv", signature=_signature, lower=_lower, flops=_flops)
}
