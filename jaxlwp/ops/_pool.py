"""Max, min and sum (average) pooling: sample, spatial and channel splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxlwp.ops._rule import Fill, Local, Rule, Signature, Window, anonymous
from jaxlwp.program import Equation


def _windows(eqn: Equation) -> tuple[Window, ...]:
    params = eqn.params
    return tuple(
        Window(size=size, stride=stride, dilation=dilation, pad_low=low)
        for size, stride, dilation, (low, _) in zip(
            params["window_dimensions"],
            params["window_strides"],
            params["window_dilation"],
            params["padding"],
            strict=True,
        )
    )


def _signature(fill: Fill) -> Any:
    def signature(eqn: Equation) -> Signature | None:
        if any(d != 1 for d in eqn.params["base_dilation"]):
            return None
        windows, padding = _windows(eqn), eqn.params["padding"]
        names = anonymous(len(windows))
        return Signature(
            role="anchor",
            operands=(names,),
            results=(names,),
            windows={
                name: window
                for name, window, pad in zip(names, windows, padding, strict=True)
                if window != Window() or any(pad)
            },
            fill=fill,
        )

    return signature


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    padding = tuple(
        (0, 0) if name in local.haloed else pad
        for name, pad in zip(local.names, eqn.params["padding"], strict=True)
    )
    return eqn.bind(*operands, padding=padding)


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    return float(math.prod(results[0]) * math.prod(eqn.params["window_dimensions"]))


def _rule(kind: str, fill: Fill) -> Rule:
    return Rule(kind=kind, signature=_signature(fill), lower=_lower, flops=_flops)


RULES = {
    "reduce_window_max": _rule("max_pool", "lowest"),
    "reduce_window_min": _rule("min_pool", "highest"),
    "reduce_window_sum": _rule("avg_pool", "zero"),
}
