"""What XLA for GPUs makes of a program: kernels, predicted from the program's equations.

Read `_differentiated` first (the program that the compiler is given; `_alike` traces what repeats
in it once), then `_node` and `_nodes` (its operators, library calls with their copies) and `_fuse`
(which of them have a kernel of their own).

Sources: the passes of XLA that are named, in openxla/xla under `xla/service`, `xla/hlo` and
`xla/service/gpu`; and the programs that JAX 0.10.2 compiles for H200s.
"""

from jaxlwp.kernels._differentiated import DifferentiatedProgram, differentiated
from jaxlwp.kernels._fuse import fuse, joins, library_call
from jaxlwp.kernels._node import LIBRARY, REDUCTIONS, SUMS, Node
from jaxlwp.kernels._nodes import Builder

__all__ = [
    "Builder",
    "DifferentiatedProgram",
    "LIBRARY",
    "Node",
    "REDUCTIONS",
    "SUMS",
    "differentiated",
    "fuse",
    "joins",
    "library_call",
]
