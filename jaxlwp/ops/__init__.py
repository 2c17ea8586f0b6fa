"""Operator rules: one file per family of operators, and the only code that knows an operator."""

from jaxlwp.ops import _arrange, _conv, _dense, _elementwise, _pool, _reduce, _resize, _shape
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
    "spatial_names",
]
