"""Outputs that are wanted whole on every device.

An operator of our own stands behind what makes such an output. It is split by nothing, so that what
it reads is brought to every device: a change of layout like any other, priced and lowered as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlwp.ops._rule import Local, Rule, Signature
from jaxlwp.program import Equation, Program, StandIn

OUTPUT = "output"

_GATHERED = StandIn(OUTPUT, lambda x: x)


def with_whole_outputs(program: Program, count: int) -> Program:
    """The program, its first outputs whole on every device.

    Args:
      program: the program.
      count: how many.
    """
    values, equations = list(program.values), list(program.equations)
    gathered: dict[int, int] = {}
    for output in program.outputs[:count]:
        if output in gathered or output in program.constants:
            continue
        gathered[output] = len(values)
        values.append(values[output])
        equations.append(
            Equation(
                primitive=_GATHERED,
                params={},
                operands=(output,),
                results=(gathered[output],),
                operand_values=(values[output],),
                result_values=(values[output],),
                scope="",
            )
        )
    outputs = [gathered.get(v, v) if n < count else v for n, v in enumerate(program.outputs)]
    return replace(
        program, values=tuple(values), equations=tuple(equations), outputs=tuple(outputs)
    )


def _signature(eqn: Equation) -> Signature:
    whole = (None,) * len(eqn.operand_values[0].shape)
    return Signature(role="anchor", operands=(whole,), results=(whole,))


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    return tuple(operands)


RULES = {
    OUTPUT: Rule(kind=OUTPUT, signature=_signature, lower=_lower, flops=lambda eqn, *shapes: 0.0)
}
