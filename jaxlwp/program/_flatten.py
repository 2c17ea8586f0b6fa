"""From a jaxpr to a flat program.

Nested `jit` calls are inlined, so that every layer is visible. So are `jax.checkpoint` calls, whose
equations remember the call, and scans over a stack of layers (`is_stack_of_layers`), which become
as many copies as there are layers. Other scans stay whole. `custom_jvp` and `custom_vjp` calls stay
whole, because their derivative rules are part of the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core as jex_core

from jaxlwp.program._program import (
    CHECKPOINTS,
    CUSTOM,
    CUSTOM_VJP,
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
from jaxlwp.program._source import Source

INLINED = ("jit", "pjit", "closed_call", "core_call")
"""Primitives whose body is inlined; the body is under the parameter `jaxpr` or `call_jaxpr`."""

ASKED_BY_REMAT3 = ("dot_general", "conv_general_dilated", "name")
"""The operators whose results a policy can keep under JAX's coming `jax_remat3`."""

LONGEST_UNROLLED = 64
"""Layers of the longest stack that is unrolled."""


def _scan(eqn: Equation, *, derivatives: bool) -> Scan:
    body = flatten(eqn.params["jaxpr"], derivatives=derivatives, unroll=False)
    num_stacked = _count_different(eqn.operand_values, [body.values[i] for i in body.inputs])
    num_made = _count_different(eqn.result_values, [body.values[i] for i in body.outputs])
    num_carry = len(eqn.result_values) - num_made
    return Scan(
        body=body,
        num_consts=len(eqn.operands) - num_carry - num_stacked,
        num_carry=num_carry,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )


def _count_different(outside: Sequence[Value], inside: Sequence[Value]) -> int:
    """How many values of a scan are stacked: the body sees one row of them.

    The parameters that say so are private from JAX 0.11 on.
    """
    return sum(a.shape != b.shape for a, b in zip(outside, inside, strict=True))


def is_stack_of_layers(scan: Scan) -> bool:
    """Whether a scan is a stack of layers, to be unrolled, or one layer that runs as a scan.

    It is a stack if something is handed on (carries) and the body has
    - a convolution, or
    - a dense layer whose weight is stacked along the scanned dimension: a matrix product, without
      batch dimensions, of what is handed on and of what is made of stacked inputs alone, which
      leaves the first dimension of what is handed on, the samples, as it is.

    Each layer of a stack may be split its own way, so up to `LONGEST_UNROLLED` of them are
    unrolled. Everything else is one layer: recurrences, whose weights are the same in every
    iteration and whose stacked inputs are data (LSTM, CTC loss); maps (`jax.lax.map`), whose
    iterations have nothing to do with each other; weights that only scale or shift. So are longer
    stacks: a copy of the body for each layer would take minutes to compile.
    """
    if not scan.num_carry:
        return False
    count = len(scan.body.inputs)
    last = scan.num_consts + scan.num_carry
    origins = [_CONST] * scan.num_consts + [_CARRY] * scan.num_carry + [_ROW] * (count - last)
    return _has_layer(scan.body, origins)


_CONST = frozenset[str]()

_CARRY = frozenset({"carry"})

_ROW = frozenset({"row"})
"""Origins of a value in a scan's body: which of its operands it is made of."""


def _has_layer(program: Program, origins: Sequence[frozenset[str]]) -> bool:
    """See `is_stack_of_layers`; `origins` are those of the program's inputs."""
    origin = dict(zip(program.inputs, origins, strict=True))
    for eqn in program.equations:
        read = [origin.get(i, _CONST) for i in eqn.operands]
        inner = _bodies(eqn)
        if eqn.name == "conv_general_dilated" or any(
            _has_layer(body, read if len(read) == len(body.inputs) else [_CONST] * len(body.inputs))
            for body in inner
        ):
            return True
        if eqn.name == "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            for given, weight, dims in zip(read, reversed(read), contracted, strict=True):
                dense = "carry" in given and weight == _ROW and 0 not in dims
                if dense and not any(batch):
                    return True
        origin.update(dict.fromkeys(eqn.results, _CONST.union(*read)))
    return False


def _bodies(eqn: Equation) -> list[Program]:
    """The programs that an equation evaluates: the body of a loop, the branches of a condition."""
    if eqn.name == SCAN:
        return [scan_of(eqn).body]
    return [flatten(jaxpr, unroll=False) for jaxpr in inner_jaxprs(eqn)]


def inner_jaxprs(eqn: Equation) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    parameters = [
        item
        for value in eqn.params.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [item for item in parameters if hasattr(item, "eqns")]


@dataclass
class _Builder:
    values: list[Value] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    equations: list[Equation] = dataclasses.field(default_factory=list)
    checkpoints: tuple[Checkpoint, ...] = ()
    derivatives: bool = True
    unrolls: bool = True
    call: Source | None = None

    @property
    def inlined(self) -> tuple[str, ...]:
        """Names of the primitives whose bodies are inlined."""
        return INLINED if self.derivatives else INLINED + CUSTOM

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
            primitive, params, read_by_body = _plain(eqn)
            if primitive.name in self.inlined:
                body, consts = _opened(params.get("jaxpr") or params["call_jaxpr"])
                given = [operands[n] for n in read_by_body]
                outer = self.call
                self.call = Source(eqn.source_info, outer, str(params.get("name", "")))
                results = self.inline(body, consts, given, where)
                self.call = outer
            elif primitive.name in ("sharding_constraint", "device_put"):
                results = list(operands)  # where tensors are is for the strategy to say
            elif primitive.name in CHECKPOINTS:
                results = self.checkpoint(params, operands, where)
            else:
                results = self.append(eqn, primitive, params, operands, where)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def checkpoint(
        self, params: dict[str, Any], operands: tuple[int, ...], scope: str
    ) -> list[int]:
        """Inline the body of a `jax.checkpoint`; its equations remember the call."""
        outer = self.checkpoints
        call = Checkpoint(
            policy=params["policy"], prevent_cse=params["prevent_cse"], asked=params.get("asked")
        )
        self.checkpoints = (*outer, call)
        body, consts = _opened(params["jaxpr"])
        results = self.inline(body, consts, operands, scope)
        self.checkpoints = outer
        return results

    def unroll(self, eqn: Equation, scan: Scan) -> list[int]:
        """Inline a scan, once per iteration."""
        body, consts = _opened(eqn.params["jaxpr"])
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        carry, stacked = list(eqn.operands[first:last]), eqn.operands[last:]
        outputs: list[list[int]] = [[] for _ in eqn.result_values[scan.num_carry :]]
        order = range(scan.length)
        for i in reversed(order) if scan.reverse else order:
            rows = [self.row(value, i, eqn.scope) for value in stacked]
            arguments = [*eqn.operands[:first], *carry, *rows]
            where = "/".join(p for p in (eqn.scope, f"scan{i}") if p)
            results = self.inline(body, consts, arguments, where)
            carry, made = results[: scan.num_carry], results[scan.num_carry :]
            for values, value in zip(outputs, made, strict=True):
                values.insert(0 if scan.reverse else len(values), value)
        return carry + [self.stack(values, eqn.scope) for values in outputs]

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
        self,
        eqn: Any,
        primitive: Any,
        params: dict[str, Any],
        operands: tuple[int, ...],
        scope: str,
    ) -> list[int]:
        """Append an equation, a stack of layers unrolled; returns the indices of its results."""
        if any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects):
            raise ValueError(
                f"trace: {primitive.name} at {scope or 'the top level'} has the side effects "
                f"{set(map(str, eqn.effects))}; a sharded step must be pure: remove debug prints "
                "and callbacks from the function"
            )
        made = Equation(
            primitive=primitive,
            params=params,
            operands=operands,
            results=(),
            operand_values=tuple(self.values[i] for i in operands),
            result_values=tuple(Value(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars),
            scope=scope,
            checkpoints=self.checkpoints,
            source=Source(eqn.source_info, self.call),
        )
        if made.name == SCAN:
            made.notes[SCAN] = scan = _scan(made, derivatives=self.derivatives)
            if self.unrolls and scan.length <= LONGEST_UNROLLED and is_stack_of_layers(scan):
                return self.unroll(made, scan)
        results = [self.new(var.aval) for var in eqn.outvars]
        self.equations.append(dataclasses.replace(made, results=tuple(results)))
        return results


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants; bodies of loops are closed up to JAX 0.10, open from 0.11 on."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _plain(eqn: Any) -> tuple[Any, dict[str, Any], Sequence[int]]:
    """Primitive and parameters of an equation, and which operands its body reads.

    JAX's coming `jax_remat3` and `jax_custom_vjp3` make one primitive of all such calls, whose only
    parameter says which it is: in place of it are the primitive and parameters known till now.
    """
    everything = range(len(eqn.invars))
    call: Any = eqn.params.get("_prim") if eqn.primitive.name == "call_hi_primitive" else None
    kind = type(call).__name__

    def bind(*operands: Any, **params: Any) -> Any:
        return eqn.primitive.bind(*operands, **eqn.params)

    if kind == "RematTraced":
        # `everything_saveable` alone is known to it as what keeps all.
        keeps_all = call.params["policy"] is jax.checkpoint_policies.everything_saveable
        params = {**call.params, "asked": None if keeps_all else ASKED_BY_REMAT3}
        return StandIn(CHECKPOINTS[0], bind, multiple_results=True), params, everything
    if kind == "CheckpointName":
        return StandIn("name", bind, multiple_results=True), dict(call.params), everything
    if kind != "CustomVJPTraced":
        return eqn.primitive, dict(eqn.params), everything

    # The derivative alone reads what comes after the constants that the body closes over.
    consts, derivative = (len(jax.tree.leaves(avals)) for avals in call.in_avals[:2])
    primitive = StandIn(CUSTOM_VJP[0], bind, multiple_results=True)
    body = [*everything[:consts], *everything[consts + derivative :]]
    return primitive, {"call_jaxpr": call.params["traced"].jaxpr}, body


def _row(x: Any, *, index: int) -> Any:
    return jax.lax.index_in_dim(x, index, 0, keepdims=False)


ROW = StandIn("row", _row)


def flatten(closed_jaxpr: Any, *, derivatives: bool = True, unroll: bool = True) -> Program:
    """Flatten a closed jaxpr into a `Program`.

    Args:
      closed_jaxpr: from `jax.make_jaxpr`; the body of a scan may be open.
      derivatives: the program will be differentiated, so calls with a derivative of their own stay
        whole; False inlines them too.
      unroll: stacks of layers are unrolled; False keeps every scan, for programs that no layers are
        made of. The backward pass of a recurrence would look like a stack.

    Raises:
      ValueError: an equation has side effects.
    """
    builder = _Builder(derivatives=derivatives, unrolls=unroll)
    jaxpr, consts = (
        getattr(closed_jaxpr, "jaxpr", closed_jaxpr),
        getattr(closed_jaxpr, "consts", ()),
    )
    inputs = [builder.new(var.aval) for var in jaxpr.invars]
    outputs = builder.inline(jaxpr, consts, inputs, "")
    return without_dead_code(
        Program(
            values=tuple(builder.values),
            constants=builder.constants,
            inputs=tuple(inputs),
            equations=tuple(builder.equations),
            outputs=tuple(outputs),
        )
    )
