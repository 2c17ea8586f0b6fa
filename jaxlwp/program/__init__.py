"""The traced function as data: one flat list of equations, and what is known of its arguments.

Read `_program` first (values, equations, `jax.checkpoint` calls, scans), then `_flatten` (from a
jaxpr to such a list), `_border` (rows that stand beyond an array's ends) and `_arguments`
(positional and keyword arguments in one form).
"""

from jaxlwp.program._arguments import Arguments, argument_name, canonical
from jaxlwp.program._border import Border, Pieces, extend, join, rows_of, runs
from jaxlwp.program._flatten import flatten, inner_jaxprs
from jaxlwp.program._program import (
    CUSTOM,
    CUSTOM_JVP,
    CUSTOM_VJP,
    MOVE,
    SCAN,
    Checkpoint,
    Equation,
    Program,
    Scan,
    StandIn,
    Value,
    scan_of,
    without_dead_code,
)

__all__ = [
    "Arguments",
    "Border",
    "CUSTOM",
    "CUSTOM_JVP",
    "CUSTOM_VJP",
    "MOVE",
    "Checkpoint",
    "Equation",
    "Pieces",
    "Program",
    "SCAN",
    "Scan",
    "StandIn",
    "Value",
    "argument_name",
    "canonical",
    "extend",
    "flatten",
    "inner_jaxprs",
    "join",
    "rows_of",
    "runs",
    "scan_of",
    "without_dead_code",
]
