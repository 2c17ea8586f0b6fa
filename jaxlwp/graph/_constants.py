"""What depends on no argument: evaluated once, when the function is traced.

Windows and filters, position encodings, coordinate grids and masks are the same in every step. What
would start a layer to make them (a reduction, a concatenation, an operator without a rule) is
evaluated here, and what others read of it is a constant of the program: whole on every device, cut
into blocks without communication. What is generated from numbers alone (iota, broadcast, a mask of
them) is not: every reader makes its own block of it, in place of an array in the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxlwp.ops import rule_of
from jaxlwp.program import CUSTOM, Equation, Program, Value, flatten, without_dead_code

LARGEST_KNOWN = 1 << 24
"""Elements of the largest value that is evaluated at trace time."""

LARGEST_CONSTANT = 1 << 22
"""Elements of the largest constant that is put into the program: what makes a larger one stays."""


COSTLY = frozenset(CUSTOM) | frozenset(
    "bessel_i0e bessel_i1e digamma erf_inv igamma igammac lgamma polygamma "
    "regularized_incomplete_beta zeta".split()
)
"""Special functions, and calls, of which there are some: a reader had better not do them again."""


class KnownValues:
    """Values of a program that depend on none of its inputs, evaluated when asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[int, Any] = {}
        self.sources: dict[int, int] = {}
        self.known = {i for i, constant in program.constants.items() if _is_at_hand(constant)}
        for position, eqn in enumerate(program.equations):
            self.sources.update(dict.fromkeys(eqn.results, position))
            if self.known.issuperset(eqn.operands):
                self.known.update(i for i in eqn.results if _is_plain(program.values[i]))

    def __contains__(self, index: int) -> bool:
        """Whether a value is known: it depends on no input, random key or very large value."""
        return index in self.known

    def __call__(self, index: int) -> np.ndarray | None:
        """The value, or None if it is not known."""
        if index not in self.known:
            return None
        with jax.ensure_compile_time_eval():
            for position in self._missing(index):
                eqn = self.program.equations[position]
                results = _evaluate(eqn, [self._get(operand) for operand in eqn.operands])
                self.made.update(zip(eqn.results, results, strict=True))
            return np.asarray(self._get(index))

    def _get(self, index: int) -> Any:
        if index not in self.made:
            constant = np.asarray(self.program.constants[index], self.program.values[index].dtype)
            self.made[index] = jax.numpy.asarray(constant)
        return self.made[index]

    def _missing(self, index: int) -> list[int]:
        """Positions of the equations that are still to be evaluated for a value, in order."""
        found: set[int] = set()
        waiting = [index]
        while waiting:
            value = waiting.pop()
            position = self.sources.get(value)
            if position is not None and value not in self.made and position not in found:
                found.add(position)
                waiting.extend(self.program.equations[position].operands)
        return sorted(found)


def _evaluate(eqn: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    """Apply an equation; of a call with a derivative of its own the body alone."""
    if eqn.name not in CUSTOM:
        return eqn.bind(*operands)
    body = flatten(eqn.params["call_jaxpr"], derivatives=False)
    made: dict[int, Any] = {**body.constants, **dict(zip(body.inputs, operands, strict=True))}
    for inner in body.equations:
        results = _evaluate(inner, [made[operand] for operand in inner.operands])
        made.update(zip(inner.results, results, strict=True))
    return [made[output] for output in body.outputs]


def _is_plain(value: Value) -> bool:
    return isinstance(value.dtype, np.dtype) and math.prod(value.shape) <= LARGEST_KNOWN


def _is_at_hand(constant: Any) -> bool:
    """No random key, no value of a trace around this one, no array of other processes."""
    return (
        not isinstance(constant, jax.core.Tracer)
        and isinstance(getattr(constant, "dtype", np.dtype(float)), np.dtype)
        and math.prod(np.shape(constant)) <= LARGEST_KNOWN
        and getattr(constant, "is_fully_addressable", True)
    )


def with_constants(program: Program, known: KnownValues) -> Program:
    """The program with constants in place of what makes them.

    Args:
      program: the program.
      known: its values that depend on no argument.
    """
    worth = _worth_keeping(program, known)
    values, constants = list(program.values), dict(program.constants)
    same: dict[tuple[str, tuple[int, ...], bytes], np.ndarray] = {}
    wanted = set(program.outputs)
    equations: list[Equation] = []
    for eqn in reversed(program.equations):
        asked = [i for i in eqn.results if i in wanted]
        arrays = {i: _compact(known(i)) for i in asked if i in worth}
        if not arrays or max(array.size for array in arrays.values()) > LARGEST_CONSTANT:
            wanted.update(eqn.operands if asked else ())
            equations.append(eqn)
            continue
        for index, array in arrays.items():
            # One array, however often the copies of a loop's body make it.
            array = same.setdefault((str(array.dtype), array.shape, array.tobytes()), array)
            if array.shape == values[index].shape:
                constants[index] = array
            else:
                values.append(Value(array.shape, array.dtype))
                constants[len(values) - 1] = array
                equations.append(_broadcast(len(values) - 1, values[-1], index, values[index], eqn))
    return without_dead_code(
        replace(
            program,
            values=tuple(values),
            constants=constants,
            equations=tuple(reversed(equations)),
        )
    )


def _worth_keeping(program: Program, known: KnownValues) -> set[int]:
    """Known values that are better kept as constants than made again by every reader.

    They are the results of what would start a layer, or of special functions, and what other
    operators make of arrays that are kept, but for larger ones: a broadcast is better done by the
    reader.
    """
    worth: set[int] = set()
    arrays = {i for i in program.constants if program.values[i].shape}
    for eqn in program.equations:
        if all(i in known for i in eqn.results):
            read = (i for i in eqn.operands if i in arrays)
            most = max((math.prod(program.values[i].shape) for i in read), default=0)
            sizes = [math.prod(value.shape) for value in eqn.result_values]
            if _starts_layer(eqn) or max(sizes) <= most or eqn.name in COSTLY:
                worth.update(eqn.results)
                arrays.update(eqn.results)
    return worth


def _starts_layer(eqn: Equation) -> bool:
    found = rule_of(eqn)
    return found is None or found[1].role in ("anchor", "reduce")


def _compact(array: np.ndarray | None) -> np.ndarray:
    """The array with size 1 in dimensions along which it does not change."""
    assert array is not None
    for dim, size in enumerate(array.shape):
        if size > 1 and _is_repeated(array, first := array.take([0], dim)):
            array = first
    return array


def _is_repeated(array: np.ndarray, part: np.ndarray) -> bool:
    """Whether broadcasting a part gives the array, bit by bit: 0 is not -0, a NaN is itself."""
    bits = [np.ascontiguousarray(a)[..., None].view(np.uint8) for a in (array, part)]
    return bool(np.all(bits[0] == bits[1]))


def _broadcast(operand: int, info: Value, result: int, wanted: Value, maker: Equation) -> Equation:
    """The equation that makes an array larger where its size is 1, in place of `maker`."""
    shape = jax.ShapeDtypeStruct(info.shape, info.dtype)
    dims = tuple(range(len(info.shape)))
    traced = jax.make_jaxpr(lambda x: jax.lax.broadcast_in_dim(x, wanted.shape, dims))(shape)
    (eqn,) = traced.jaxpr.eqns
    return replace(
        maker,
        primitive=eqn.primitive,
        params=dict(eqn.params),
        operands=(operand,),
        results=(result,),
        operand_values=(info,),
        result_values=(wanted,),
        notes={},
    )
