"""Operator rules: one file per family of operators, and the only code that knows an operator."""

from collections.abc import Sequence
from typing import Any

from jaxlwp._program import Equation
from jaxlwp.ops import (
    _arrange,
    _conv,
    _custom,
    _dense,
    _elementwise,
    _pool,
    _reduce,
    _resize,
    _shape,
)
from jaxlwp.ops._derivative import LINEAR, ZERO_DERIVATIVE, values_needed
from jaxlwp.ops._rule import (
    Labels,
    Local,
    Reach,
    Rule,
    Signature,
    Window,
    default_names,
    spatial_names,
)

RULES: dict[str, Rule] = {
    **_arrange.RULES,
    **_conv.RULES,
    **_dense.RULES,
    **_elementwise.RULES,
    **_pool.RULES,
    **_reduce.RULES,
    **_resize.RULES,
    **_shape.RULES,
}
"""Operator rule by the name of the JAX primitive."""


def rule_of(eqn: Equation) -> tuple[Rule, Signature] | None:
    """Rule of an equation, and its signature; None if there is no rule for this use of it."""
    if "signature" not in eqn.notes:
        rule = RULES.get(eqn.name)
        eqn.notes["signature"] = rule.signature(eqn) if rule else None
    signature = eqn.notes["signature"]
    return (RULES[eqn.name], signature) if signature is not None else None


def evaluate_whole(eqn: Equation, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Evaluate an operator that is not split, on whole arrays."""
    rule = RULES.get(eqn.name)
    return rule.lower_whole(eqn, operands) if rule and rule.lower_whole else eqn.bind(*operands)


def unread_results(eqn: Equation) -> tuple[int, ...]:
    """Results (values) whose cotangents the equation's derivative does not read."""
    rule = RULES.get(eqn.name)
    return tuple(eqn.results[n] for n in rule.unread(eqn)) if rule else ()


RULES.update(_custom.rules(rule_of))

RECOGNISED = _resize.RECOGNISED
"""By the name of the primitive: `recognise(equation, known operands)` gives the equation as another
operator, or None. Called where some operands depend on no argument of the program."""

__all__ = [
    "LINEAR",
    "RECOGNISED",
    "RULES",
    "ZERO_DERIVATIVE",
    "Labels",
    "Local",
    "Reach",
    "Rule",
    "Signature",
    "Window",
    "default_names",
    "evaluate_whole",
    "rule_of",
    "spatial_names",
    "unread_results",
    "values_needed",
]
