"""Operator rules: one file per family of operators, and the only code that knows an operator."""

import functools

from jaxlwp._program import SCAN, Equation
from jaxlwp.ops import (
    _arrange,
    _conv,
    _custom,
    _dense,
    _elementwise,
    _pool,
    _reduce,
    _resize,
    _scan,
    _shape,
)
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


def rule_inside(eqn: Equation) -> tuple[Rule, Signature] | None:
    """As `rule_of`, for equations of a body: a scan that cannot be split is evaluated there too."""
    found = rule_of(eqn)
    if found is None and eqn.name == SCAN:
        signature = _scan.unsplit(rule_inside, eqn)
        return (RULES[SCAN], signature) if signature is not None else None
    return found


RULES.update(_custom.rules(rule_inside))
RULES.update(_scan.rules(rule_inside))

PARTS = {SCAN: functools.partial(_scan.parts, rule_inside)}
"""By the name of the primitive: `parts(equation, values that are read, new)` gives the equations to
put in an equation's place; `new` makes a value of the program."""

RECOGNISED = _resize.RECOGNISED
"""By the name of the primitive: `recognise(equation, known operands)` gives the equation as another
operator, or None. Called where some operands depend on no argument of the program."""

__all__ = [
    "PARTS",
    "RECOGNISED",
    "RULES",
    "Labels",
    "Local",
    "Reach",
    "Rule",
    "Signature",
    "Window",
    "default_names",
    "rule_of",
    "spatial_names",
]
