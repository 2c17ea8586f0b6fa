"""Elementwise operators: bias, activations, dropout's select, casts.

They follow the layout of the layer they belong to and cost no communication. Dimensions of size 1
broadcast, as in JAX's own elementwise primitives.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxlwp._program import Equation
from jaxlwp.ops._rule import Labels, Rule, Signature, bind_lowering

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


_RULE = Rule(kind="elementwise", signature=_signature, lower=bind_lowering)
RULES = {name: _RULE for name in POINTWISE} | {
    "bitcast_convert_type": Rule(
        kind="elementwise", signature=_bitcast_signature, lower=bind_lowering
    ),
}
