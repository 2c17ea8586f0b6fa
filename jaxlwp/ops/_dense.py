"""Dense layers and general contractions (`dot_general`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxlwp._program import Equation
from jaxlwp.ops._rule import Rule, Signature, anonymous, bind_lowering


def _signature(eqn: Equation) -> Signature | None:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    ranks = [len(value.shape) for value in eqn.operand_values]
    lhs: list[str | None] = [None] * ranks[0]
    rhs: list[str | None] = [None] * ranks[1]
    free_l = [d for d in range(ranks[0]) if d not in contract_l and d not in batch_l]
    free_r = [d for d in range(ranks[1]) if d not in contract_r and d not in batch_r]
    for i, (a, b) in enumerate(zip(contract_l, contract_r, strict=True)):
        lhs[a] = rhs[b] = "reduction" if i == 0 else f"reduction{i}"
    # The result's dimensions are: batch, free of the left, free of the right operand.
    left = anonymous(len(batch_l) + len(free_l))
    right = ["channel", *(f"channel{i}" for i in range(1, len(free_r)))][: len(free_r)]
    for i, (a, b) in enumerate(zip(batch_l, batch_r, strict=True)):
        lhs[a] = rhs[b] = left[i]
    for i, a in enumerate(free_l):
        lhs[a] = left[len(batch_l) + i]
    for i, b in enumerate(free_r):
        rhs[b] = right[i]
    return Signature(
        role="anchor",
        operands=(tuple(lhs), tuple(rhs)),
        results=((*left, *right),),
        fill="zero",
    )


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(results[0]) * float(math.prod(operands[0][d] for d in contract))


RULES = {"dot_general": Rule(kind="dense", signature=_signature, lower=bind_lowering, flops=_flops)}
