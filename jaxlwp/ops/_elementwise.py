"""Elementwise operators: bias, activations, dropout's select, casts.

They follow the layout of the layer they belong to and cost no communication. Dimensions of size 1
broadcast, as in JAX's own elementwise primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlwp.mesh import no_mesh, vary
from jaxlwp.ops._rule import Labels, Local, Rule, Signature, bind_lowering
from jaxlwp.program import Equation, flatten

POINTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv "
    "erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le "
    "le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi name ne neg nextafter not "
    "one_minus_square or polygamma polynomial population_count pow real reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
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


def _lower_error_function(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """With a derivative that is traced where no mesh is known.

    JAX 0.12 cannot trace it on one device's block: it makes constants that do not vary over the
    mesh.
    """
    (x,) = operands
    block = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def evaluate(x: Any) -> Any:
        return eqn.bind(x)[0]

    with no_mesh():
        traced = jax.make_jaxpr(lambda x: jax.jvp(evaluate, (x,), (jnp.ones_like(x),))[1])(block)
    slope = flatten(traced, derivatives=False)

    def push(primals: Any, tangents: Any) -> Any:
        constants = {i: vary(jnp.asarray(c), local.varying) for i, c in slope.constants.items()}
        (factor,) = replace(slope, constants=constants)(*primals)
        return function(*primals), tangents[0] * factor

    function = jax.custom_jvp(evaluate)
    function.defjvp(push)
    return (function(x),)


_RULE = Rule(kind="elementwise", signature=_signature, lower=bind_lowering)
RULES = {name: _RULE for name in POINTWISE} | {
    "bitcast_convert_type": Rule(
        kind="elementwise", signature=_bitcast_signature, lower=bind_lowering
    ),
    **dict.fromkeys(("erf", "erfc"), replace(_RULE, lower=_lower_error_function)),
}
