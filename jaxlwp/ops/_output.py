"""Outputs that are wanted in a given layout, such as whole on every device.

An operator of our own stands behind what makes such an output. It is split as the output is wanted
(`jaxlwp.space.outputs_kept`), so that what it reads is brought there: a change of layout like any
other, priced and lowered as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlwp.ops._rule import Local, Rule, Signature
from jaxlwp.program import Equation, Program, StandIn

OUTPUT = "output"
"""Kind of the layers that bring outputs where they are wanted."""

OutputLayout = tuple[tuple[str, ...], ...]
"""For each dimension of an output, the mesh axes that split it, major to minor."""

_PLACED = StandIn(OUTPUT, lambda x, **_: x)


def with_placed_outputs(program: Program, layouts: Sequence[OutputLayout | None]) -> Program:
    """The program, its first outputs in given layouts.

    Args:
      program: the program.
      layouts: of these outputs; None leaves one as the layer that makes it has it.
    """
    values, equations, outputs = list(program.values), list(program.equations), []
    placed: dict[tuple[int, OutputLayout], int] = {}
    for output, layout in zip(program.outputs, layouts, strict=False):
        if layout is None or (output in program.constants and not any(layout)):
            outputs.append(output)
            continue
        key = output, layout
        if key not in placed:
            placed[key] = len(values)
            values.append(values[output])
            equations.append(
                Equation(
                    primitive=_PLACED,
                    params={"layout": layout},
                    operands=(output,),
                    results=(placed[key],),
                    operand_values=(values[output],),
                    result_values=(values[output],),
                    scope="",
                )
            )
        outputs.append(placed[key])
    outputs += program.outputs[len(layouts) :]
    return replace(
        program, values=tuple(values), equations=tuple(equations), outputs=tuple(outputs)
    )


def _signature(eqn: Equation) -> Signature:
    labels = tuple(f"#{dim}" if axes else None for dim, axes in enumerate(eqn.params["layout"]))
    return Signature(role="anchor", operands=(labels,), results=(labels,))


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    return tuple(operands)


RULES = {
    OUTPUT: Rule(kind=OUTPUT, signature=_signature, lower=_lower, flops=lambda eqn, *shapes: 0.0)
}
