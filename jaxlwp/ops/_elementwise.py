"""Elementwise operators: bias, activations, dropout's select, casts; custom-derivative activations.

They follow the layout of the layer they belong to and cost no communication. Dimensions of size 1
broadcast, as in JAX's own elementwise primitives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlwp._program import Equation, Program, flat_function, flatten
from jaxlwp.ops._rule import Labels, Local, Rule, Signature, bind_lowering

POINTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not "
    "or population_count pow real reduce_precision rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor"
).split()


def pointwise_labels(shape: Sequence[int], result: Sequence[int]) -> Labels | None:
    """Labels of an operand that broadcasts to the result by dimensions of size 1, or None."""
    if len(shape) == 0:
        return ()
    if len(shape) != len(result):
        return None
    labels: list[str | None] = []
    for i, (size, full) in enumerate(zip(shape, result, strict=True)):
        if size not in (1, full):
            return None
        labels.append(f"#{i}" if size == full and size > 1 else None)
    return tuple(labels)


def _signature(eqn: Equation) -> Signature | None:
    shape = eqn.result_values[0].shape
    if any(value.shape != shape for value in eqn.result_values):
        return None
    operands = tuple(pointwise_labels(value.shape, shape) for value in eqn.operand_values)
    if any(labels is None for labels in operands):
        return None
    result = pointwise_labels(shape, shape)
    assert result is not None
    return Signature(
        role="follow",
        operands=tuple(labels for labels in operands if labels is not None),
        results=(result,) * len(eqn.result_values),
    )


def _bitcast_signature(eqn: Equation) -> Signature | None:
    same = eqn.operand_values[0].itemsize == eqn.result_values[0].itemsize
    return _signature(eqn) if same else None


# --- custom_jvp and custom_vjp calls whose bodies are pointwise --------------------------------


def _call(eqn: Equation, *operands: Any) -> tuple[Any, ...]:
    return eqn.bind(*operands)


def _pointwise_program(program: Program, shape: Sequence[int]) -> bool:
    """Whether every equation maps arrays of the given shape (or scalars) element by element."""
    for eqn in program.equations:
        if eqn.name == "broadcast_in_dim":
            if math.prod(eqn.operand_values[0].shape) != 1:
                return False
        elif eqn.name == "custom_jvp_call":
            if _signature(eqn) is None:
                return False
        elif eqn.name not in POINTWISE or _signature(eqn) is None:
            return False
        if any(v.shape != tuple(shape) and math.prod(v.shape) != 1 for v in eqn.result_values):
            return False
    return True


def _run(program: Program, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """Evaluate a pointwise program on a block; broadcasts of scalars take the block's shape."""
    env: dict[int, Any] = {i: _varying(c, local) for i, c in program.constants.items()}
    env.update(zip(program.inputs, operands, strict=True))
    for eqn in program.equations:
        args = [env[i] for i in eqn.operands]
        if eqn.name == "broadcast_in_dim":
            full = eqn.result_values[0].shape
            single = math.prod(full) == 1
            results = eqn.bind(*args, shape=full if single else local.result_shapes[0])
        elif eqn.name == "custom_jvp_call":
            results = _lower_custom_jvp(eqn, args, local)
        else:
            results = eqn.bind(*args)
        env.update(zip(eqn.results, results, strict=True))
    return tuple(env[i] for i in program.outputs)


def _varying(constant: Any, local: Local) -> Any:
    """A constant, varying over the mesh axes over which the operands vary."""
    return lax.pcast(jnp.asarray(constant), local.varying, to="varying")


def _custom_signature(eqn: Equation) -> Signature | None:
    signature = _signature(eqn)
    if signature is None or not eqn.operand_values:
        return None
    shape = eqn.result_values[0].shape
    if any(value.shape != shape for value in eqn.operand_values):
        return None
    programs = (_primal(eqn), _tangent(eqn))
    return signature if all(_pointwise_program(p, shape) for p in programs) else None


def _primal(eqn: Equation) -> Program:
    body = eqn.params["call_jaxpr"]
    return flatten(body)


def _tangent(eqn: Equation) -> Program:
    """The derivative rule as a program of primals and tangents."""
    count = len(eqn.operands)

    def jvp(*values: Any) -> Any:
        return jax.jvp(functools.partial(_call, eqn), values[:count], values[count:])[1]

    return flat_function(jvp, *eqn.operand_values, *eqn.operand_values)


def _lower_custom_jvp(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """The call on blocks: its own body and its own derivative rule, both on blocks."""
    primal, tangent = _primal(eqn), _tangent(eqn)

    @jax.custom_jvp
    def call(*args: Any) -> Any:
        return _run(primal, args, local)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return call(*primals), _run(tangent, (*primals, *tangents), local)

    return tuple(call(*operands))


_RULE = Rule(kind="elementwise", signature=_signature, lower=bind_lowering)
RULES = {name: _RULE for name in POINTWISE} | {
    "bitcast_convert_type": Rule(
        kind="elementwise", signature=_bitcast_signature, lower=bind_lowering
    ),
    "custom_jvp_call": Rule(
        kind="elementwise", signature=_custom_signature, lower=_lower_custom_jvp
    ),
}
