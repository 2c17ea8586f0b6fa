"""Dense layers and general contractions (`dot_general`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from jaxlwp.ops._rule import Rule, Signature, bind_lowering
from jaxlwp.program import Equation


def _signature(eqn: Equation, weight: int = 1) -> Signature:
    """The contraction's dimensions, those of the weight's own named channels."""
    contracting, batch = eqn.params["dimension_numbers"]
    labels: list[list[str | None]] = [[None] * len(value.shape) for value in eqn.operand_values]
    for i, pair in enumerate(zip(*contracting, strict=True)):
        for side, dim in enumerate(pair):
            labels[side][dim] = "reduction" if i == 0 else f"reduction{i}"
    # The result's dimensions are: batch, free of the left, free of the right operand.
    result: list[str | None] = [f"#{i}" for i in range(len(batch[0]))]
    for i, pair in enumerate(zip(*batch, strict=True)):
        for side, dim in enumerate(pair):
            labels[side][dim] = result[i]
    for side in (0, 1):
        free = [dim for dim, label in enumerate(labels[side]) if label is None]
        for i, dim in enumerate(free):
            channel = "channel" if i == 0 else f"channel{i}"
            labels[side][dim] = channel if side == weight else f"#{len(result)}"
            result.append(labels[side][dim])
    return Signature(
        role="anchor",
        operands=(tuple(labels[0]), tuple(labels[1])),
        results=(tuple(result),),
        fill="zero",
    )


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(results[0]) * float(math.prod(operands[0][d] for d in contract))


RULES = {
    "dot_general": Rule(
        kind="dense",
        signature=_signature,
        lower=bind_lowering,
        flops=_flops,
        weight_first=functools.partial(_signature, weight=0),
    )
}
