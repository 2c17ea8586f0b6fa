"""Operator rules: one file per family of operators, and the only code that knows an operator."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlwp.ops import (
    _arrange,
    _conv,
    _custom,
    _dense,
    _derivative,
    _elementwise,
    _extend,
    _output,
    _pool,
    _reduce,
    _resize,
    _scan,
    _shape,
)
from jaxlwp.ops._derivative import LINEAR, ZERO_DERIVATIVE
from jaxlwp.ops._output import OUTPUT, OutputLayout, with_placed_outputs
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
from jaxlwp.ops._shape import reshape_groups
from jaxlwp.program import SCAN, Equation, Program

RULES: dict[str, Rule] = {
    **_arrange.RULES,
    **_conv.RULES,
    **_dense.RULES,
    **_elementwise.RULES,
    **_extend.RULES,
    **_output.RULES,
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


def evaluate_whole(eqn: Equation, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Evaluate an operator that is not split, on whole arrays."""
    rule = RULES.get(eqn.name)
    return rule.lower_whole(eqn, operands) if rule and rule.lower_whole else eqn.bind(*operands)


def values_needed(eqn: Equation, gradient: Sequence[bool]) -> tuple[int, ...]:
    """Positions of the operands whose values the derivative needs.

    Args:
      eqn: the operator.
      gradient: for each operand, whether it has a cotangent.
    """
    rule = RULES.get(eqn.name)
    needed = rule.needed if rule and rule.needed else _derivative.values_needed
    return needed(eqn, gradient)


def unread_results(eqn: Equation) -> tuple[int, ...]:
    """Results (values) whose cotangents the equation's derivative does not read."""
    rule = RULES.get(eqn.name)
    return tuple(eqn.results[n] for n in rule.unread(eqn)) if rule else ()


def _behind_borders(eqn: Equation, signature: Signature) -> Signature:
    """The signature with windows over the first operand alone, in place of it with its borders."""
    windows = dict(signature.windows)
    for dim, border in eqn.borders.items():
        name = signature.operands[0][dim]
        if name is not None:
            windows[name] = windows.get(name, Window()).behind(border)
    return replace(signature, windows=windows) if eqn.borders else signature


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


def with_borders(program: Program) -> Program:
    """The program with operators in place of the equations that pad an array with its own rows."""
    return _extend.with_borders(program, rule_of)


RECOGNISED = _resize.RECOGNISED
"""By the name of the primitive: `recognise(equation, known operands)` gives the equation as another
operator, or None. Called where some operands depend on no argument of the program."""

__all__ = [
    "LINEAR",
    "OUTPUT",
    "PARTS",
    "RECOGNISED",
    "RULES",
    "ZERO_DERIVATIVE",
    "Labels",
    "Local",
    "OutputLayout",
    "Reach",
    "Rule",
    "Signature",
    "Window",
    "default_names",
    "evaluate_whole",
    "reshape_groups",
    "rule_of",
    "spatial_names",
    "unread_results",
    "values_needed",
    "with_borders",
    "with_placed_outputs",
]
