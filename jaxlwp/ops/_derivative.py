"""What the derivatives of operators need: which operands' values, and cotangents at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxlwp.mesh import no_mesh
from jaxlwp.program import Equation, Value, flatten

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
    params = sorted((name, str(value)) for name, value in eqn.params.items())
    key = eqn.name, str(params), eqn.operand_values, tuple(gradient)
    if key not in _READ:
        _READ[key] = _read(eqn, tuple(gradient))
    return _READ[key]


_READ: dict[object, tuple[int, ...]] = {}
"""What `_read` has found: networks have many operators that are alike."""


def _read(eqn: Equation, gradient: tuple[bool, ...]) -> tuple[int, ...]:
    """Positions of the operands that the derivative reads, found by tracing it."""
    moved = [n for n, flows in enumerate(gradient) if flows]
    results = [n for n, value in enumerate(eqn.result_values) if value.differentiable]

    def backward(operands: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def forward(*moving: Any) -> list[Any]:
            given = dict(enumerate(operands)) | dict(zip(moved, moving, strict=True))
            every = eqn.bind(*(given[n] for n in range(len(operands))))
            return [every[n] for n in results]

        return jax.vjp(forward, *(operands[n] for n in moved))[1](list(cotangents))

    def shapes(values: Sequence[Value]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]

    kept = [eqn.result_values[n] for n in results]
    with no_mesh():
        traced = jax.make_jaxpr(backward)(shapes(eqn.operand_values), shapes(kept))
    program = flatten(traced, derivatives=False, unroll=False)
    read = set(program.outputs).union(*(each.operands for each in program.equations))
    return tuple(n for n in range(len(gradient)) if program.inputs[n] in read)
