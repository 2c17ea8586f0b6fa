"""The traced function as data: one flat list of equations, and what is known of its arguments.

Read `_program` first (values, equations, `jax.checkpoint` calls, scans), then `_flatten` (from a
jaxpr to such a list), `_border` (rows that stand beyond an array's ends), `_arguments` (positional
and keyword arguments in one form), `_structure` (where two pytrees differ) and `_text` (the same
text in every process).
"""

from jaxlwp.program._arguments import (
    Arguments,
    argument_name,
    arguments_difference,
    canonical,
    positional_names,
)
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
from jaxlwp.program._structure import first_difference
from jaxlwp.program._text import array_text, program_lines, text_of

__all__ = [
    "Arguments",
    "Border",
    "CUSTOM",
    "CUSTOM_JVP",
    "CUSTOM_VJP",
    "Checkpoint",
    "Equation",
    "MOVE",
    "Pieces",
    "Program",
    "SCAN",
    "Scan",
    "StandIn",
    "Value",
    "argument_name",
    "arguments_difference",
    "array_text",
    "canonical",
    "extend",
    "first_difference",
    "flatten",
    "inner_jaxprs",
    "join",
    "positional_names",
    "program_lines",
    "rows_of",
    "runs",
    "scan_of",
    "text_of",
    "without_dead_code",
]
