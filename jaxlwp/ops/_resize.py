"""Resizing: rows of the result are combinations of a few neighbouring rows of the operand.

`jax.image.resize` arrives as a gather with known indices (nearest) or as a contraction with a known
matrix that is zero but for a narrow band (linear, cubic, Lanczos). Here both become one operator,
of which a device needs its neighbours' rows only; contracting by the matrix would sum over all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlwp.ops._extend import border_of
from jaxlwp.ops._rule import Labels, Local, Rows, Rule, Signature, anonymous
from jaxlwp.program import Equation, StandIn

NARROW = 8
"""A band of at most so many rows, or of half of the matrix's, is narrow."""


def _apply(x: Any, *, table: Any, dim: int, out_dim: int, options: dict[str, Any]) -> Any:
    """Rows by index (a table of rank 1), or combined by a matrix [rows, rows of the result]."""
    table = jnp.asarray(table)
    if table.ndim == 1:
        return jnp.take(x, table, axis=dim, mode="clip")
    y = lax.dot_general(x, table, (((dim,), (0,)), ((), ())), **options)
    return jnp.moveaxis(y, -1, out_dim)


def recognise(eqn: Equation, known: Sequence[np.ndarray | None]) -> Equation | None:
    """The equation as a resizing, if it is one.

    Args:
      eqn: a gather or a dot_general.
      known: the values of its operands that depend on no argument of the program.
    """
    made = _from_gather(eqn, known) if eqn.name == "gather" else _from_dot(eqn, known)
    if made is None:
        return None
    position, table, dim, out_dim, options = made
    return dataclasses.replace(
        eqn,
        primitive=StandIn("resize", _apply),
        params={"table": table, "dim": dim, "out_dim": out_dim, "options": options},
        operands=(eqn.operands[position],),
        operand_values=(eqn.operand_values[position],),
        notes={},
    )


_Made = tuple[int, np.ndarray, int, int, dict[str, Any]]


def _from_gather(eqn: Equation, known: Sequence[np.ndarray | None]) -> _Made | None:
    """Whole rows of one dimension, by known indices."""
    numbers, indices = eqn.params["dimension_numbers"], known[1]
    shape, sizes = eqn.operand_values[0].shape, eqn.params["slice_sizes"]
    if indices is None or known[0] is not None or indices.ndim != 2 or indices.shape[1] != 1:
        return None
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    dim = numbers.start_index_map[0]
    others = tuple(d for d in range(len(shape)) if d != dim)
    rows = indices[:, 0]
    plain = (
        numbers.collapsed_slice_dims == (dim,)
        and numbers.offset_dims == others
        and all(sizes[d] == shape[d] for d in others)
    )
    inside = rows.size > 0 and rows.min() >= 0 and rows.max() < shape[dim]
    if not plain or not inside:
        return None
    # What wraps or reflects is recognised by its table as well (`_extend`).
    near = np.all(np.diff(rows) >= 0) or border_of(rows, shape[dim]) is not None
    return (0, rows, dim, dim, {}) if near else None


def _from_dot(eqn: Equation, known: Sequence[np.ndarray | None]) -> _Made | None:
    """Contraction of one dimension with a known band matrix."""
    contracting, batch = eqn.params["dimension_numbers"]
    side = next((i for i in (0, 1) if known[i] is not None and known[1 - i] is None), None)
    if side is None or any(batch) or len(contracting[0]) != 1:
        return None
    matrix = np.asarray(known[side])
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        return None
    matrix = matrix if contracting[side][0] == 0 else matrix.T
    if not _is_resizing(matrix):
        return None
    rank = len(eqn.operand_values[1 - side].shape)
    precision = eqn.params["precision"]
    options = {
        # Given for (left, right); here the array is on the left.
        "precision": precision[::-1] if isinstance(precision, tuple) and side == 0 else precision,
        "preferred_element_type": eqn.params["preferred_element_type"],
    }
    out_dim = 0 if side == 0 else rank - 1
    return 1 - side, matrix, contracting[1 - side][0], out_dim, options


def _is_resizing(matrix: np.ndarray) -> bool:
    """Whether a matrix is zero outside of a narrow band that moves down from column to column.

    Else it is the weight of a dense layer. Begin and end of the band both move, which those of a
    small matrix without zeros, or of a triangle, do not; single columns may have further zeros.
    """
    columns = [rows for column in matrix.T if (rows := np.flatnonzero(column)).size]
    if not columns:
        return False
    begin = np.minimum.accumulate([rows[0] for rows in reversed(columns)])[::-1]
    end = np.maximum.accumulate([rows[-1] for rows in columns])
    narrow = max(end - begin) < max(NARROW, matrix.shape[0] // 2)
    return bool(narrow and begin[0] < begin[-1] and end[0] < end[-1])


def _band(matrix: np.ndarray) -> Rows:
    """For each column the range of rows that are not zero."""
    first: list[int] = []
    stop: list[int] = []
    for column in matrix.T:
        rows = np.flatnonzero(column)
        first.append(int(rows[0]) if rows.size else (first[-1] if first else 0))
        stop.append(int(rows[-1]) + 1 if rows.size else first[-1] + 1)
    return Rows(tuple(first), tuple(stop))


def _reach(eqn: Equation) -> Rows:
    table = eqn.params["table"]
    if table.ndim == 2:
        return _band(table)
    return Rows(tuple(int(i) for i in table), tuple(int(i) + 1 for i in table))


def _signature(eqn: Equation) -> Signature:
    dim, out_dim = eqn.params["dim"], eqn.params["out_dim"]
    operand = anonymous(len(eqn.operand_values[0].shape))
    result: list[str | None] = [name for d, name in enumerate(operand) if d != dim]
    result.insert(out_dim, operand[dim])
    labels: Labels = tuple(result)
    return Signature(
        role="anchor",
        operands=(operand,),
        results=(labels,),
        windows={operand[dim]: _reach(eqn)},
        fill="zero",
    )


def _lower(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    params = eqn.params
    if local.names[params["dim"]] not in local.haloed:
        return eqn.bind(*operands)
    block = local.result_shapes[0][params["out_dim"]]
    tables = _blocks(params["table"], _reach(eqn), operands[0].shape[params["dim"]], block)
    start, _ = local.places()[0][params["out_dim"]]
    index = start // block
    return eqn.bind(*operands, table=jnp.asarray(tables)[index])


def _blocks(table: np.ndarray, reads: Rows, rows: int, block: int) -> np.ndarray:
    """Each device's part of the table, its rows counted from the first that the device holds."""
    total = len(reads.first)
    parts = []
    for start in range(0, total, block):
        stop = min(start + block, total)
        first, _ = reads.reads(start, stop)
        if table.ndim == 1:
            part = np.zeros(block, table.dtype)
            part[: stop - start] = table[start:stop] - first
        else:
            part = np.zeros((rows, block), table.dtype)
            held = table[first : first + rows, start:stop]
            part[: held.shape[0], : held.shape[1]] = held
        parts.append(part)
    return np.stack(parts)


def _flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    reads = _reach(eqn)
    width = max(stop - first for first, stop in zip(reads.first, reads.stop, strict=True))
    return float(2 * math.prod(results[0]) * width)


RECOGNISED = dict.fromkeys(("gather", "dot_general"), recognise)
"""Primitives that become another operator where some operands are known at trace time."""

RULES = {"resize": Rule(kind="resize", signature=_signature, lower=_lower, flops=_flops)}
