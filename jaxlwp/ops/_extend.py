"""Padding with an array's own rows: wrapping, reflecting, symmetric, of repeated edges; rolling.

JAX has no primitive for it. `jnp.pad` writes a concatenation of slices, of their reversals, or of
repeated rows, one side after the other; others index with wrapped or clipped positions. All of it
says which row of one array each row of the result is: a table of numbers. Where the table counts up
through the array, and what comes before and after is shorter than the array, the result is the
array with a border (`_border`), and one operator takes the equations' place. What a windowed
operator reads of such a result it reads of the array, with the border beyond its ends: blocks stay
those of the array, and what is exchanged is a halo like any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxlwp.ops import _elementwise
from jaxlwp.ops._rule import Rule, Signature, anonymous, bind_lowering
from jaxlwp.program import Border, Equation, Program, StandIn, Value

Table = NDArray[np.int64]
"""For each row of a result the row of an array."""

RuleOf = Callable[[Equation], tuple[Rule, Signature] | None]
"""Rule and signature of an equation."""

LONGEST = 4096
"""Rows of the longest border: they are written down one by one."""

MOST_STEPS = 64
"""Equations that are followed back from a concatenation: wide padding reflects several times."""

# --- the border that a table of rows describes ---------------------------------------------------


def border_of(table: Table, size: int) -> tuple[Border, int] | None:
    """The border of an array of `size` rows with which a table's rows follow each other.

    Returns:
      The border, and how many rows of the array with the border come before the table's first;
      None if the rows are others, or a border is as long as the array, or very long.
    """
    if table.size == 0:
        return None
    shifts, counts = np.unique(table - np.arange(table.size), return_counts=True)
    if 3 * counts.max() <= table.size:  # no border shorter than the array leaves so little of it
        return None
    position = np.arange(table.size) + shifts[np.argmax(counts)]
    inside = (position >= 0) & (position < size)
    before, after = table[position < 0], table[position >= size]
    if np.any(table[inside] != position[inside]):
        return None
    if max(before.size, after.size) >= min(size, LONGEST):
        return None
    border = Border(*(tuple(int(row) for row in rows) for rows in (before, after)))
    return border, max(0, int(position[0]))


class _Tables:
    """Of which arrays, and of which rows, a value is made along one dimension."""

    def __init__(self, program: Program) -> None:
        self.values = program.values
        self.sources = {i: eqn for eqn in program.equations for i in eqn.results}
        self.made: dict[tuple[int, int], dict[int, Table]] = {}

    def __call__(self, value: int, dim: int, steps: int = MOST_STEPS) -> dict[int, Table]:
        """Array -> table of its rows: first the value itself, then what it is made of."""
        if (value, dim) not in self.made:
            found = {value: np.arange(self.values[value].shape[dim])}
            eqn = self.sources.get(value)
            if eqn is not None and eqn.operands and steps:
                found |= self._read(eqn, dim, steps - 1)
            self.made[value, dim] = dict(list(found.items())[:MOST_STEPS])
        return self.made[value, dim]

    def _read(self, eqn: Equation, dim: int, steps: int) -> dict[int, Table]:
        """Tables of what an equation reads, if it takes whole rows of it."""
        if eqn.name == "concatenate":
            return self._joined(eqn, dim, steps)
        operand, rows = eqn.operands[0], _rows(eqn, dim)
        if rows is None and eqn.name == "reshape" and operand in self.sources:
            operand, rows = _repeated(self.sources[operand], eqn, dim)
        if rows is None:
            return {}
        return {root: table[rows] for root, table in self(operand, dim, steps).items()}

    def _joined(self, eqn: Equation, dim: int, steps: int) -> dict[int, Table]:
        sizes = [value.shape[dim] for value in eqn.operand_values]
        operands = [i for i, size in zip(eqn.operands, sizes, strict=True) if size]
        if eqn.params["dimension"] != dim or not operands:
            return {}
        pieces = [self(i, dim, steps) for i in operands]
        roots = [root for root in pieces[0] if all(root in piece for piece in pieces)]
        return {root: np.concatenate([piece[root] for piece in pieces]) for root in roots}


def _rows(eqn: Equation, dim: int) -> Table | None:
    """Rows of its operand that an equation takes along `dim`, whole and in this order."""
    shape, params = eqn.operand_values[0].shape, eqn.params
    others = [d for d in range(len(shape)) if d != dim]
    if eqn.name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
        whole = all(cuts[d] == (0, shape[d], 1) for d in others)
        return np.arange(*cuts[dim]) if whole else None
    if eqn.name == "rev":
        return np.arange(shape[dim])[::-1] if tuple(params["dimensions"]) == (dim,) else None
    if eqn.name == "broadcast_in_dim" and shape and len(shape) == len(params["shape"]):
        whole = all(params["shape"][d] == shape[d] for d in others)
        return np.zeros(params["shape"][dim], np.int64) if whole and shape[dim] == 1 else None
    if eqn.name == "resize" and params["table"].ndim == 1:
        return params["table"] if params["dim"] == params["out_dim"] == dim else None
    return None


def _repeated(broadcast: Equation, reshape: Equation, dim: int) -> tuple[int, Table | None]:
    """Operand and rows of a broadcast along a new dimension that a reshape merges with `dim`."""
    if broadcast.name != "broadcast_in_dim" or reshape.params.get("dimensions") is not None:
        return -1, None
    old, new = broadcast.operand_values[0].shape, broadcast.params["shape"]
    kept = tuple(broadcast.params["broadcast_dimensions"])
    if len(new) != len(old) + 1 or tuple(new[d] for d in kept) != old:
        return -1, None
    added = next(d for d in range(len(new)) if d not in kept)
    merged = (*old[:dim], old[dim] * new[added], *old[dim + 1 :])
    if added not in (dim, dim + 1) or merged != reshape.result_values[0].shape:
        return -1, None
    rows = np.arange(old[dim])
    repeat = np.tile if added == dim else np.repeat
    return broadcast.operands[0], repeat(rows, new[added])


# --- recognising it in a program -----------------------------------------------------------------


def with_borders(program: Program, rule_of: RuleOf) -> Program:
    """The program with an operator in place of the equations that pad an array with its own rows.

    What is left of those equations is dead code.

    Args:
      program: the program.
      rule_of: rule and signature of an equation.
    """
    tables, values = _Tables(program), list(program.values)
    same: dict[int, int] = {}
    equations: list[Equation] = []
    for eqn in program.equations:
        operands = tuple(same.get(i, i) for i in eqn.operands)
        found = _extension(eqn, tables) if eqn.name in ("concatenate", "resize") else None
        if found is None:
            equations.append(dataclasses.replace(eqn, operands=operands))
            continue
        array, dim, border, start = found
        array = same.get(array, array)
        extended = _extended(eqn, array, dim, border, start, values)
        if not extended:  # all rows in order
            same[eqn.results[0]] = array
        equations += extended
    outputs = tuple(same.get(i, i) for i in program.outputs)
    made = dataclasses.replace(
        program, values=tuple(values), equations=tuple(equations), outputs=outputs
    )
    return _absorbed(made, rule_of)


def _extension(eqn: Equation, tables: _Tables) -> tuple[int, int, Border, int] | None:
    """Array, dimension, border, and first row of what an equation makes, by its table."""
    dim = eqn.params["dim"] if eqn.name == "resize" else eqn.params["dimension"]
    (result,) = eqn.results
    for array, table in reversed(tables(result, dim).items()):
        found = border_of(table, tables.values[array].shape[dim]) if array != result else None
        if found is not None:
            return array, dim, *found
    return None


def _extended(
    eqn: Equation, array: int, dim: int, border: Border, start: int, values: list[Value]
) -> list[Equation]:
    """Equations that make an equation's result of an array: its border, and of that a part."""
    info, result = values[array], eqn.result_values[0]
    size = len(border.before) + info.shape[dim] + len(border.after)
    whole = Value((*info.shape[:dim], size, *info.shape[dim + 1 :]), info.dtype)
    part = result.shape != whole.shape
    made = []
    if border != Border():
        extended = _new(values, whole) if part else eqn.results[0]
        made.append(
            dataclasses.replace(
                eqn,
                primitive=EXTEND,
                params={},
                operands=(array,),
                results=(extended,),
                operand_values=(info,),
                result_values=(whole,),
                borders={dim: border},
                notes={},
            )
        )
        array = extended
    if part:
        starts = [start if d == dim else 0 for d in range(len(result.shape))]
        limits = [a + size for a, size in zip(starts, result.shape, strict=True)]
        made.append(
            dataclasses.replace(
                eqn,
                primitive=lax.slice_p,
                params={
                    "start_indices": tuple(starts),
                    "limit_indices": tuple(limits),
                    "strides": None,
                },
                operands=(array,),
                operand_values=(whole,),
                notes={},
            )
        )
    return made


def _new(values: list[Value], info: Value) -> int:
    values.append(info)
    return len(values) - 1


# --- borders become part of what reads them ------------------------------------------------------

Borders = Mapping[int, Border]
"""By dimension."""


def _absorbed(program: Program, rule_of: RuleOf) -> Program:
    """The program with windowed operators that read an array with its border beyond its ends.

    A border goes through operators that leave rows as they are: a change of type, a new dimension.
    """
    values = list(program.values)
    bare: dict[int, tuple[int, Borders]] = {}  # value -> array and borders that it is made of
    equations = []
    for eqn in program.equations:
        array, borders = bare.get((eqn.operands or (-1,))[0], (-1, {}))
        if eqn.borders:
            if not borders or eqn.borders.keys() & borders.keys():
                array, borders = eqn.operands[0], {}
            eqn = _reading(eqn, array, {**borders, **eqn.borders}, values)
            bare[eqn.results[0]] = array, eqn.borders
        elif borders and _windowed(eqn, borders, rule_of):
            eqn = _reading(eqn, array, borders, values)
        elif borders and (dims := _through(eqn, borders)):
            moved = {dims[dim]: border for dim, border in borders.items()}
            equations.append(_without(eqn, array, moved, values))
            bare[eqn.results[0]] = equations[-1].results[0], moved
        equations.append(eqn)
    return dataclasses.replace(program, values=tuple(values), equations=tuple(equations))


def _reading(eqn: Equation, array: int, borders: Borders, values: Sequence[Value]) -> Equation:
    """The equation with another first operand."""
    return dataclasses.replace(
        eqn,
        operands=(array, *eqn.operands[1:]),
        operand_values=(values[array], *eqn.operand_values[1:]),
        borders=borders,
        notes={},
    )


def _windowed(eqn: Equation, borders: Borders, rule_of: RuleOf) -> bool:
    """Whether the operator slides windows over its first operand, where that has borders."""
    found = rule_of(eqn)
    if found is None or not found[1].windows:
        return False
    signature = found[1]
    for dim in borders:
        name = signature.operands[0][dim]
        if name is None or any(name in labels for labels in signature.operands[1:]):
            return False
        if name not in signature.results[0]:
            return False
        out = eqn.result_values[0].shape[signature.results[0].index(name)]
        if name not in signature.windows and out != eqn.operand_values[0].shape[dim]:
            return False
    return True


def _through(eqn: Equation, borders: Borders) -> dict[int, int] | None:
    """Dimension of the operand -> of the result, where the operator leaves its rows as they are."""
    if len(eqn.operands) != 1:
        return None
    old, new = eqn.operand_values[0].shape, eqn.result_values[0].shape
    if eqn.name in _elementwise.RULES:
        return {dim: dim for dim in borders}
    if eqn.name == "transpose":
        return {dim: eqn.params["permutation"].index(dim) for dim in borders}
    if eqn.name == "broadcast_in_dim":
        dims = {dim: eqn.params["broadcast_dimensions"][dim] for dim in borders}
        return dims if all(old[a] == new[b] for a, b in dims.items()) else None
    if eqn.name == "squeeze" or (eqn.name == "reshape" and not eqn.params.get("dimensions")):
        dims = {a: b for a in borders for b in range(len(new)) if _same_rows(old, a, new, b)}
        return dims if dims.keys() == borders.keys() else None
    return None


def _same_rows(old: Sequence[int], a: int, new: Sequence[int], b: int) -> bool:
    """Whether reshaping makes a dimension another, with its rows in order."""
    return old[a] == new[b] and math.prod(old[:a]) == math.prod(new[:b])


def _without(eqn: Equation, array: int, borders: Borders, values: list[Value]) -> Equation:
    """The operator on the array alone; its result is that of the equation without the borders."""
    shape = list(eqn.result_values[0].shape)
    for dim, border in borders.items():
        shape[dim] -= len(border.before) + len(border.after)
    info = Value(tuple(shape), eqn.result_values[0].dtype)
    names = [name for name in ("shape", "new_sizes") if name in eqn.params]
    return dataclasses.replace(
        _reading(eqn, array, {}, values),
        params={**eqn.params, **dict.fromkeys(names, info.shape)},
        results=(_new(values, info),),
        result_values=(info,),
    )


# --- the operator --------------------------------------------------------------------------------


def _same(x: Any) -> Any:
    return x


EXTEND = StandIn("extend", _same)
"""An array with its border, which the equation names: beyond that there is nothing to do."""


def _signature(eqn: Equation) -> Signature:
    names = anonymous(len(eqn.result_values[0].shape))
    return Signature(role="anchor", operands=(names,), results=(names,), fill="zero")


RULES = {"extend": Rule(kind="pad", signature=_signature, lower=bind_lowering)}
