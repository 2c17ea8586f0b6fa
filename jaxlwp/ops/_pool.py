"""Max, min and sum (average) pooling: sample, spatial and channel splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from jaxlwp._program import Equation
from jaxlwp.ops._rule import Local, Rule, Signature, Window, default_names


def _windows(eqn: Equation) -> tuple[Window, ...]:
    params = eqn.params
    return tuple(
        Window(size=size, stride=stride, dilation=dilation, pad_low=low, pad_high=high)
        for size, stride, dilation, (low, high) in zip(
            params["window_dimensions"],
            params["window_strides"],
            params["window_dilation"],
            params["padding"],
            strict=True,
        )
    )


def _trivial(window: Window) -> bool:
    return window == Window(size=1, stride=1, dilation=1, pad_low=0, pad_high=0)


def _signature(fill: Literal["zero", "lowest", "highest"]) -> Any:
    def signature(eqn: Equation) -> Signature | None:
        windows = _windows(eqn)
        negative = any(w.pad_low < 0 or w.pad_high < 0 for w in windows)
        if negative or any(d != 1 for d in eqn.params["base_dilation"]):
            return None
        names = default_names(len(windows))
        return Signature(
            role="anchor",
            operands=(names,),
            results=(names,),
            windows={n: w for n, w in zip(names, windows, strict=True) if not _trivial(w)},
            fill=fill,
        )

    return signature


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    names = default_names(len(eqn.params["window_dimensions"]))
    padding = tuple(
        (0, 0) if name in local.haloed else pad
        for name, pad in zip(names, eqn.params["padding"], strict=True)
    )
    return eqn.bind(*operands, padding=padding)


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    return float(math.prod(results[0]) * math.prod(eqn.params["window_dimensions"]))


def _rule(kind: str, fill: Literal["zero", "lowest", "highest"]) -> Rule:
    return Rule(kind=kind, signature=_signature(fill), lower=_lower, flops=_flops)


RULES = {
    "reduce_window_max": _rule("max_pool", "lowest"),
    "reduce_window_min": _rule("min_pool", "highest"),
    "reduce_window_sum": _rule("avg_pool", "zero"),
}
