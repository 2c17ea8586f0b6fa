"""A flat program: the traced function as one list of equations.

A scan is one equation, whose body is a program of its own (`Scan`). An equation remembers the calls
of `jax.checkpoint` around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlwp.program._border import Border
from jaxlwp.program._source import Source

CUSTOM_JVP = ("custom_jvp_call",)
CUSTOM_VJP = ("custom_vjp_call",)
CUSTOM = CUSTOM_JVP + CUSTOM_VJP
"""Primitives of calls with a derivative of their own; the body is under `call_jaxpr`."""

CHECKPOINTS = ("checkpoint", "remat2")
"""Names of the primitive of `jax.checkpoint`."""

SCAN = "scan"
"""Name of the primitive of `jax.lax.scan`."""


@dataclass(frozen=True)
class Value:
    """Shape and dtype of one value of a program."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def itemsize(self) -> int:
        """Bytes per element; extended types such as random keys count as 8."""
        return int(getattr(self.dtype, "itemsize", 8))

    @property
    def differentiable(self) -> bool:
        """Floating point or complex."""
        return bool(jax.numpy.issubdtype(self.dtype, np.inexact))


@dataclass(frozen=True)
class StandIn:
    """Takes the place of the primitive in an equation that JAX has no single primitive for.

    Attributes:
      name: what rules call the operator.
      function: evaluates it, called as `function(*operands, **params)`; returns one array.
    """

    name: str
    function: Callable[..., Any]
    multiple_results: bool = False

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters, as primitives give them."""
        return params

    def bind(self, *operands: Any, **params: Any) -> Any:
        """Evaluate."""
        return self.function(*operands, **params)


MOVE = StandIn("move", lambda *operands: operands)
"""Stands for what is not an operator of the function: sums, halo exchanges, changes of layout."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One call of `jax.checkpoint`: its equations are evaluated again in the backward pass.

    Attributes:
      policy: says which values are kept nevertheless.
      prevent_cse: keep the compiler from merging the second evaluation with the first.
      asked: names of the operators that JAX asks the policy about; None for all.
    """

    policy: Callable[..., Any] | None
    prevent_cse: bool
    asked: tuple[str, ...] | None = None

    def keeps(self, primitive: Any, operands: Sequence[Any], params: Mapping[str, Any]) -> bool:
        """Whether the policy keeps what an operator makes.

        Args:
          primitive: the operator; `MOVE` for a collective.
          operands: anything with their shapes and dtypes.
          params: of the operator.
        """
        if self.policy is None or not (self.asked is None or primitive.name in self.asked):
            return False
        shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
        answer = self.policy(primitive, *shapes, **params)
        # Policies may answer with JAX's objects for "keep", "keep on the host" and "recompute".
        return answer if isinstance(answer, bool) else type(answer).__name__ != "RecomputeType"


@dataclass(frozen=True, kw_only=True)
class Equation:
    """One primitive applied to values of the program.

    Attributes:
      primitive: the JAX primitive, or what stands in for one.
      params: its parameters, for global shapes.
      operands: indices of the values read.
      results: indices of the values written.
      operand_values: shapes and dtypes of the operands.
      result_values: shapes and dtypes of the results.
      scope: the name stack, such as "AlexNet/Conv_0" (Flax Linen; empty for Flax NNX).
      checkpoints: the calls of `jax.checkpoint` around it, outermost first.
      borders: dimension of the first operand -> its rows that stand beyond its ends. The primitive
        and its parameters are those of an operator on the operand with its borders.
      notes: what operator rules found out about this equation, made when asked for.
      source: where in the user's code it is from, for reports.
    """

    primitive: Any
    params: dict[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    operand_values: tuple[Value, ...]
    result_values: tuple[Value, ...]
    scope: str
    checkpoints: tuple[Checkpoint, ...] = ()
    borders: Mapping[int, Border] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    source: Source | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return str(self.primitive.name)

    @property
    def extended(self) -> Equation:
        """The equation on its first operand with its borders: what the primitive sees."""
        if not self.borders:
            return self
        if "extended" not in self.notes:
            shape = list(self.operand_values[0].shape)
            for dim, border in self.borders.items():
                shape[dim] += len(border.before) + len(border.after)
            first = Value(tuple(shape), self.operand_values[0].dtype)
            self.notes["extended"] = dataclasses.replace(
                self, operand_values=(first, *self.operand_values[1:]), borders={}, notes={}
            )
        return self.notes["extended"]  # type: ignore[no-any-return]

    def bind(self, *operands: Any, **changes: Any) -> tuple[Any, ...]:
        """Apply the primitive, with some parameters replaced; returns all results.

        The first operand has its borders already.
        """
        params = self.primitive.get_bind_params({**self.params, **changes})
        # Up to JAX 0.9 this is a pair (functions, parameters), later one mapping.
        functions, params = params if isinstance(params, tuple) else ((), params)
        out = self.primitive.bind(*functions, *operands, **params)
        return tuple(out) if self.primitive.multiple_results else (out,)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A traced function.

    Attributes:
      values: shape and dtype of every value.
      constants: arrays known at trace time, by value index.
      inputs: value indices of the flat arguments.
      equations: in the order of evaluation.
      outputs: value indices of the flat results.
    """

    values: tuple[Value, ...]
    constants: dict[int, Any]
    inputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[int, ...]

    def __call__(self, *operands: Any) -> tuple[Any, ...]:
        """Evaluate on whole arrays."""
        made: dict[int, Any] = {**self.constants, **dict(zip(self.inputs, operands, strict=True))}
        for eqn in self.equations:
            given = [made[i] for i in eqn.operands]
            scan = scan_of(eqn) if eqn.name == SCAN else None
            results = scan.run(scan.body, given) if scan else eqn.bind(*given)
            made.update(zip(eqn.results, results, strict=True))
        return tuple(jax.numpy.asarray(made[i]) for i in self.outputs)


# --- scans -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan's body, and what its operands are: constants, then carries, then stacked inputs.

    The body reads the constants, the carries, and one row of each stacked input; it makes the new
    carries, and one row of each stacked output.

    Attributes:
      body: the body.
      num_consts: how many operands are the same in every iteration.
      num_carry: how many are handed from one iteration to the next.
      length: iterations.
      reverse: from the last row to the first.
      unroll: iterations that the compiled loop does at a time.
    """

    body: Program
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int | bool

    def run(
        self,
        step: Callable[..., Sequence[Any]],
        operands: Sequence[Any],
        length: int | None = None,
    ) -> tuple[Any, ...]:
        """The results, with `step` in place of the body.

        Args:
          step: called with the constants, the carries and a row of each stacked input; returns the
            carries and a row of each stacked output.
          operands: those of the scan, or a device's blocks of them.
          length: iterations, if these are not all.
        """
        last = self.num_consts + self.num_carry
        consts = operands[: self.num_consts]

        def body(carry: Any, rows: Any) -> tuple[Any, Any]:
            made = tuple(step(*consts, *carry, *rows))
            return made[: self.num_carry], made[self.num_carry :]

        carry, stacked = jax.lax.scan(
            body,
            tuple(operands[self.num_consts : last]),
            tuple(operands[last:]),
            length=self.length if length is None else length,
            reverse=self.reverse,
            unroll=self.unroll,
        )
        return (*carry, *stacked)

    def only(self, results: Sequence[int]) -> tuple[Scan, tuple[int, ...], tuple[int, ...]]:
        """The scan without what some of its results need not.

        Args:
          results: positions of the results that are wanted.

        Returns:
          The scan, and the positions of the operands and results that it has: carries that are
          needed for the wanted results are among them.
        """
        first, last = self.num_consts, self.num_consts + self.num_carry
        kept: set[int] = set()
        more = set(results)
        while more - kept:
            kept |= more
            needed = set(self.body.outputs[n] for n in kept)
            for eqn in reversed(self.body.equations):
                if needed.intersection(eqn.results):
                    needed.update(eqn.operands)
            inputs = self.body.inputs[first:last]
            more = {n for n, value in enumerate(inputs) if value in needed}
        operands = tuple(
            n
            for n, value in enumerate(self.body.inputs)
            if (n - first in kept if first <= n < last else value in needed)
        )
        made = tuple(sorted(kept))
        body = dataclasses.replace(
            self.body,
            inputs=tuple(self.body.inputs[n] for n in operands),
            outputs=tuple(self.body.outputs[n] for n in made),
        )
        scan = dataclasses.replace(
            self,
            body=without_dead_code(body),
            num_consts=sum(n < first for n in operands),
            num_carry=sum(n < self.num_carry for n in made),
        )
        return scan, operands, made


def scan_of(eqn: Equation) -> Scan:
    """What an equation of the primitive `scan` does; `flatten` has noted it."""
    scan: Scan = eqn.notes[SCAN]
    return scan


def without_dead_code(program: Program) -> Program:
    """Drop equations none of whose results is used: they would count as layers."""
    used = set(program.outputs)
    kept = []
    for eqn in reversed(program.equations):
        if used & set(eqn.results):
            used.update(eqn.operands)
            kept.append(eqn)
    return dataclasses.replace(
        program,
        constants={i: c for i, c in program.constants.items() if i in used},
        equations=tuple(reversed(kept)),
    )
