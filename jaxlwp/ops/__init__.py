"""Operator rules: one file per family of operators, and the only code that knows an operator."""

from jaxlwp.ops import _conv, _dense, _elementwise, _pool, _reduce, _shape
from jaxlwp.ops._rule import (
    Labels,
    Local,
    Rule,
    Signature,
    Window,
    default_names,
    spatial_names,
)

RULES: dict[str, Rule] = {
    **_conv.RULES,
    **_dense.RULES,
    **_elementwise.RULES,
    **_pool.RULES,
    **_reduce.RULES,
    **_shape.RULES,
}
"""Operator rule by the name of the JAX primitive."""

__all__ = [
    "RULES",
    "Labels",
    "Local",
    "Rule",
    "Signature",
    "Window",
    "default_names",
    "spatial_names",
]
