"""Operator rules: one file per family of operators, and the only code that knows an operator."""

from dataclasses import replace

from jaxlwp._program import Equation, Program
from jaxlwp.ops import (
    _arrange,
    _conv,
    _custom,
    _dense,
    _elementwise,
    _extend,
    _pool,
    _reduce,
    _resize,
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
    **_extend.RULES,
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
        signature = rule.signature(eqn.extended) if rule else None
        eqn.notes["signature"] = _behind_borders(eqn, signature) if signature is not None else None
    signature = eqn.notes["signature"]
    return (RULES[eqn.name], signature) if signature is not None else None


def _behind_borders(eqn: Equation, signature: Signature) -> Signature:
    """The signature with windows over the first operand alone, in place of it with its borders."""
    windows = dict(signature.windows)
    for dim, border in eqn.borders.items():
        name = signature.operands[0][dim]
        if name is not None:
            windows[name] = windows.get(name, Window()).behind(border)
    return replace(signature, windows=windows) if eqn.borders else signature


RULES.update(_custom.rules(rule_of))


def with_borders(program: Program) -> Program:
    """The program with operators in place of the equations that pad an array with its own rows."""
    return _extend.with_borders(program, rule_of)


RECOGNISED = _resize.RECOGNISED
"""By the name of the primitive: `recognise(equation, known operands)` gives the equation as another
operator, or None. Called where some operands depend on no argument of the program."""

__all__ = [
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
    "with_borders",
]
