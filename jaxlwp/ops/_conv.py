"""Convolution: sample, spatial, channel and reduction (input channel) splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxlwp._program import Equation
from jaxlwp.ops._rule import Labels, Local, Rule, Signature, Window, spatial_names


def _signature(eqn: Equation) -> Signature | None:
    params = eqn.params
    numbers = params["dimension_numbers"]
    plain = params["feature_group_count"] == 1 and params["batch_group_count"] == 1
    if not plain or any(d != 1 for d in params["lhs_dilation"]):
        return None
    names = spatial_names(len(params["window_strides"]))
    rhs_shape = eqn.operand_values[1].shape
    windows = {
        name: Window(
            size=rhs_shape[dim], stride=stride, dilation=dilation, pad_low=low, pad_high=high
        )
        for name, dim, stride, dilation, (low, high) in zip(
            names,
            numbers.rhs_spec[2:],
            params["window_strides"],
            params["rhs_dilation"],
            params["padding"],
            strict=True,
        )
    }
    if any(w.pad_low < 0 or w.pad_high < 0 for w in windows.values()):
        return None
    return Signature(
        role="anchor",
        operands=(
            _place(numbers.lhs_spec, ("sample", "reduction", *names)),
            _place(numbers.rhs_spec, ("channel", "reduction", *(None for _ in names))),
        ),
        results=(_place(numbers.out_spec, ("sample", "channel", *names)),),
        windows=windows,
        fill="zero",
    )


def _place(spec: Sequence[int], labels: Sequence[str | None]) -> Labels:
    """Labels in array order from labels in the order (batch, feature, space...) of a spec."""
    result: list[str | None] = [None] * len(spec)
    for dim, label in zip(spec, labels, strict=True):
        result[dim] = label
    return tuple(result)


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    names = spatial_names(len(eqn.params["window_strides"]))
    padding = tuple(
        (0, 0) if name in local.haloed else pad
        for name, pad in zip(names, eqn.params["padding"], strict=True)
    )
    return eqn.bind(*operands, padding=padding)


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    out_channels = int(operands[1][eqn.params["dimension_numbers"].rhs_spec[0]])
    # Two operations (multiply, add) per result element and kernel element of its channel.
    return 2.0 * math.prod(results[0]) * math.prod(operands[1]) / max(out_channels, 1)


RULES = {
    "conv_general_dilated": Rule(kind="conv", signature=_signature, lower=_lower, flops=_flops)
}
