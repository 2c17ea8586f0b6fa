"""A flat program: the traced function as one list of equations.

Nested `jit` calls are inlined, so that every layer is visible. So are `jax.checkpoint` calls, whose
equations remember the call, and loops (`scan`) of few iterations, which become that many copies.
`custom_jvp` and `custom_vjp` calls stay whole, because their derivative rules are part of the
function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core

INLINED = ("jit", "pjit", "closed_call", "core_call")
"""Primitives whose body is inlined; the body is under the parameter `jaxpr` or `call_jaxpr`."""

CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Primitives of calls with a derivative of their own; the body is under `call_jaxpr`."""

CHECKPOINTS = ("checkpoint", "remat2")
"""Names of the primitive of `jax.checkpoint`."""

LONGEST_UNROLLED = 64
"""Iterations of the longest scan that is unrolled: a stack of layers, not a recurrence in time."""


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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One call of `jax.checkpoint`: its equations are evaluated again in the backward pass.

    Attributes:
      policy: says which values are kept nevertheless.
      prevent_cse: keep the compiler from merging the second evaluation with the first.
    """

    policy: Callable[..., bool] | None
    prevent_cse: bool


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
      notes: what operator rules found out about this equation, made when asked for.
    """

    primitive: Any
    params: dict[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    operand_values: tuple[Value, ...]
    result_values: tuple[Value, ...]
    scope: str
    checkpoints: tuple[Checkpoint, ...] = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return str(self.primitive.name)

    def bind(self, *operands: Any, **changes: Any) -> tuple[Any, ...]:
        """Apply the primitive, with some parameters replaced; returns all results."""
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


@dataclass
class _Builder:
    values: list[Value] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    equations: list[Equation] = dataclasses.field(default_factory=list)
    checkpoints: tuple[Checkpoint, ...] = ()
    inlined: tuple[str, ...] = INLINED

    def new(self, aval: Any) -> int:
        self.values.append(Value(tuple(aval.shape), aval.dtype))
        return len(self.values) - 1

    def constant(self, value: Any, aval: Any) -> int:
        index = self.new(aval)
        self.constants[index] = value
        return index

    def inline(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[int], scope: str
    ) -> list[int]:
        """Append the equations of a jaxpr; returns the value indices of its results."""
        env: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(const, var.aval)

        def read(atom: Any) -> int:
            if isinstance(atom, jex_core.Literal):
                return self.constant(atom.val, atom.aval)
            return env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(atom) for atom in eqn.invars)
            where = "/".join(p for p in (scope, str(eqn.source_info.name_stack)) if p)
            if eqn.primitive.name in self.inlined:
                body = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                results = self.inline(body.jaxpr, body.consts, operands, where)
            elif eqn.primitive.name == "sharding_constraint":
                results = list(operands)  # where tensors are split is for the strategy to say
            elif eqn.primitive.name in CHECKPOINTS:
                results = self.checkpoint(eqn, operands, where)
            elif eqn.primitive.name == "scan" and eqn.params["length"] <= LONGEST_UNROLLED:
                results = self.unroll(eqn, operands, where)
            else:
                results = [self.new(var.aval) for var in eqn.outvars]
                self.append(eqn, operands, tuple(results), where)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def checkpoint(self, eqn: Any, operands: tuple[int, ...], scope: str) -> list[int]:
        """Inline the body of a `jax.checkpoint`; its equations remember the call."""
        outer = self.checkpoints
        call = Checkpoint(policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
        self.checkpoints = (*outer, call)
        results = self.inline(eqn.params["jaxpr"], (), operands, scope)
        self.checkpoints = outer
        return results

    def unroll(self, eqn: Any, operands: tuple[int, ...], scope: str) -> list[int]:
        """Inline a scan, once per iteration."""
        length = eqn.params["length"]
        # Closed up to JAX 0.10, open from 0.11 on, where the counts below are private as well.
        body = eqn.params["jaxpr"]
        consts, body = getattr(body, "consts", ()), getattr(body, "jaxpr", body)
        last = len(eqn.invars) - _count_different(eqn.invars, body.invars)
        num_carry = len(eqn.outvars) - _count_different(eqn.outvars, body.outvars)
        first = last - num_carry
        carry, stacked = list(operands[first:last]), operands[last:]
        outputs: list[list[int]] = [[] for _ in eqn.outvars[last - first :]]
        order = range(length)
        for i in reversed(order) if eqn.params["reverse"] else order:
            rows = [self.row(value, i, scope) for value in stacked]
            arguments = [*operands[:first], *carry, *rows]
            where = "/".join(p for p in (scope, f"scan{i}") if p)
            results = self.inline(body, consts, arguments, where)
            carry, made = results[: last - first], results[last - first :]
            for values, value in zip(outputs, made, strict=True):
                values.insert(0 if eqn.params["reverse"] else len(values), value)
        return carry + [self.stack(values, scope) for values in outputs]

    def row(self, value: int, index: int, scope: str) -> int:
        """Append the equation of one row of a stacked array."""
        info = self.values[value]
        result = self.new(Value(info.shape[1:], info.dtype))
        self.equations.append(
            Equation(
                primitive=ROW,
                params={"index": index},
                operands=(value,),
                results=(result,),
                operand_values=(info,),
                result_values=(self.values[result],),
                scope=scope,
                checkpoints=self.checkpoints,
            )
        )
        return result

    def stack(self, rows: Sequence[int], scope: str) -> int:
        """Append the equations that stack rows to an array."""
        avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (self.values[i] for i in rows)]
        stacking = jax.make_jaxpr(lambda *rows: jax.numpy.stack(rows))(*avals)
        return self.inline(stacking.jaxpr, stacking.consts, rows, scope)[0]

    def append(
        self, eqn: Any, operands: tuple[int, ...], results: tuple[int, ...], scope: str
    ) -> None:
        if any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects):
            raise ValueError(
                f"trace: {eqn.primitive.name} at {scope or 'the top level'} has the side effects "
                f"{set(map(str, eqn.effects))}; a sharded step must be pure: remove debug prints "
                "and callbacks from the function"
            )
        self.equations.append(
            Equation(
                primitive=eqn.primitive,
                params=dict(eqn.params),
                operands=operands,
                results=results,
                operand_values=tuple(self.values[i] for i in operands),
                result_values=tuple(self.values[i] for i in results),
                scope=scope,
                checkpoints=self.checkpoints,
            )
        )


def _count_different(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values of a scan are stacked: the body sees one row of them."""
    return sum(a.aval.shape != b.aval.shape for a, b in zip(outside, inside, strict=True))


def _row(x: Any, *, index: int) -> Any:
    return jax.lax.index_in_dim(x, index, 0, keepdims=False)


ROW = StandIn("row", _row)


def flatten(closed_jaxpr: Any, *, derivatives: bool = True) -> Program:
    """Flatten a closed jaxpr into a `Program`.

    Args:
      closed_jaxpr: from `jax.make_jaxpr`.
      derivatives: the program will be differentiated, so calls with a derivative of their own stay
        whole; False inlines them too.

    Raises:
      ValueError: an equation has side effects.
    """
    builder = _Builder(inlined=INLINED if derivatives else INLINED + CUSTOM)
    inputs = [builder.new(var.aval) for var in closed_jaxpr.jaxpr.invars]
    outputs = builder.inline(closed_jaxpr.jaxpr, closed_jaxpr.consts, inputs, "")
    return without_dead_code(
        Program(
            values=tuple(builder.values),
            constants=builder.constants,
            inputs=tuple(inputs),
            equations=tuple(builder.equations),
            outputs=tuple(outputs),
        )
    )


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
