"""What the derivatives of operators need: which operands' values, and cotangents at all."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlwp.program import Equation

ZERO_DERIVATIVE = frozenset("stop_gradient sign floor ceil round nextafter is_finite".split())
"""Operators through which no cotangent flows."""

LINEAR = frozenset(
    "add add_any sub neg convert_element_type copy real imag reduce_sum reshape transpose squeeze "
    "expand_dims broadcast_in_dim slice pad concatenate rev reduce_window_sum stack unstack tile "
    "split cumsum row resize extend name reduce_precision".split()
)
"""Operators whose derivatives need no operand's value."""

BILINEAR = frozenset(("mul", "dot_general", "conv_general_dilated"))
"""Operators whose derivative by one operand needs the other."""

LINEAR_BUT = {
    "select_n": (0,),
    "gather": (1,),
    "dynamic_slice": (1, 2, 3, 4, 5, 6, 7),
    "dynamic_update_slice": (2, 3, 4, 5, 6, 7, 8),
}
"""Operators whose derivatives need some operands, by position: predicates and indices."""


def values_needed(eqn: Equation, gradient: Sequence[bool]) -> tuple[int, ...]:
    """Positions of the operands whose values the derivative needs.

    Args:
      eqn: the operator.
      gradient: for each operand, whether it has a cotangent.
    """
    every = range(len(eqn.operands))
    if eqn.name in LINEAR:
        return ()
    if eqn.name in LINEAR_BUT:
        return tuple(n for n in LINEAR_BUT[eqn.name] if n in every)
    if eqn.name in BILINEAR:
        return tuple(n for n in every if any(g for m, g in enumerate(gradient) if m != n))
    if eqn.name == "div":
        return (0, 1) if gradient[1] else (1,)
    return tuple(every)
