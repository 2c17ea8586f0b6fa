"""Nodes: what operators make, on the way to kernels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from jaxlwp.program import Equation, Value

ALIASES = (
    "reshape",
    "squeeze",
    "expand_dims",
    "pcast",
    "pvary",
    "copy",
    "name",
    "stop_gradient",
    "random_wrap",
    "random_unwrap",
    "optimization_barrier",
    "bitcast_convert_type",
)
"""Same bytes under another shape or name."""

GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
SCATTERS = ("reduce_scatter", "psum_scatter", "unreduced_reduce_scatter")
SUMS = ("psum", "psum_invariant", "pmax", "pmin", "unreduced_psum")
EXCHANGES = (*GATHERS, *SCATTERS, "all_to_all")
COLLECTIVES = (*SUMS, *EXCHANGES, "ppermute", "pbroadcast")

LIBRARY = ("conv_general_dilated", "dot_general")
REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "reduce_xor",
    "reduce",
    "argmax",
    "argmin",
    "reduce_window",
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "scatter",
    "scatter-add",
    "scatter_add",
)
"""They evaluate their operands on the fly; their results are in memory."""

ALONE = (
    "sort",
    "top_k",
    "approx_top_k",
    "while",
    "scan",
    "cond",
    "fft",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "cumlogsumexp",
    "custom_call",
    "ffi_call",
    "pure_callback",
    "triangular_solve",
    "cholesky",
)
"""Kernels of their own, whose operands are in memory too."""


@dataclass(eq=False)
class Node:
    """What one operator makes, or one step of it.

    Attributes:
      kind: the primitive's name, or that of the step.
      num_bytes: of its result.
      operands: what it reads.
      writes: its result is always in memory.
      wants: the operands (positions) that must be in memory.
      in_place: it may write over an operand of the same size that nobody reads later.
      argument: it is in memory before and after the program.
      origin: index of the value in the program, -1 for a step in between.
      combined: it is a step of a combined all-reduce.
      scope: name scope of the equation for which it is made; "" for the updates.
      eqn: the equation of a library call.
      info: shape and dtype of its value; None for a step in between.
      number: position in the order in which nodes are made, which is that of the program.
    """

    kind: str
    num_bytes: int
    operands: tuple[Node, ...] = ()
    writes: bool = False
    wants: frozenset[int] = frozenset()
    in_place: bool = False
    argument: bool = False
    origin: int = -1
    combined: bool = False
    scope: str = ""
    eqn: Equation | None = None
    info: Value | None = None
    number: int = field(default_factory=itertools.count().__next__)
