"""Operators that rearrange an array: concatenate, pad, slice, split, reverse, scan along, sort.

Dimensions along which elements change places are not split, except where the result's elements
come from a fixed distance (slice, pad): there the rows that a device lacks come by halo exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxlwp.ops._rule import Labels, Local, Rule, Signature, Window, anonymous, bind_lowering
from jaxlwp.program import Equation


def _except(names: Sequence[str], *dims: int) -> Labels:
    return tuple(None if dim in dims else name for dim, name in enumerate(names))


def _along(parameter: str) -> Callable[[Equation], Signature]:
    """All operands and results alike; the dimensions of a parameter stay whole."""

    def signature(eqn: Equation) -> Signature:
        given = eqn.params[parameter]
        dims = given if isinstance(given, (tuple, list)) else (given,)
        labels = _except(anonymous(len(eqn.operand_values[0].shape)), *dims)
        return Signature(
            role="anchor",
            operands=(labels,) * len(eqn.operands),
            results=(labels,) * len(eqn.results),
        )

    return signature


# --- pad and slice -------------------------------------------------------------------------------


def _pad_signature(eqn: Equation) -> Signature:
    config = eqn.params["padding_config"]
    names = anonymous(len(config))
    labels = _except(names, *(d for d, (_, _, interior) in enumerate(config) if interior))
    return Signature(
        role="anchor",
        operands=(labels, ()),
        results=(labels,),
        windows={
            name: Window(pad_low=low)
            for name, (low, high, interior) in zip(names, config, strict=True)
            if (low or high) and not interior
        },
        fill="value",
    )


def _lower_pad(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    config = tuple(
        (0, 0, 0) if name in local.haloed else widths
        for name, widths in zip(local.names, eqn.params["padding_config"], strict=True)
    )
    return eqn.bind(*operands, padding_config=config)


def _ranges(eqn: Equation) -> list[tuple[int, int, int]]:
    """Start, limit and stride of a slice, for each dimension."""
    params = eqn.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    return list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))


def _slice_signature(eqn: Equation) -> Signature:
    shape = eqn.operand_values[0].shape
    names = anonymous(len(shape))
    return Signature(
        role="anchor",
        operands=(names,),
        results=(names,),
        windows={
            name: Window(stride=stride, pad_low=-start)
            for name, size, (start, limit, stride) in zip(names, shape, _ranges(eqn), strict=True)
            if (start, limit, stride) != (0, size, 1)
        },
        fill="zero",
    )


def _lower_slice(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    ranges = []
    for name, size, block, (start, limit, stride) in zip(
        local.names,
        eqn.operand_values[0].shape,
        operands[0].shape,
        _ranges(eqn),
        strict=True,
    ):
        if name in local.haloed or (start, limit, stride) == (0, size, 1):
            start, limit = 0, block
        ranges.append((start, limit, stride))
    starts, limits, strides = zip(*ranges, strict=True)
    return eqn.bind(*operands, start_indices=starts, limit_indices=limits, strides=strides)


def _dynamic_signature(eqn: Equation) -> Signature:
    """Dynamic slice and update: dimensions that are taken whole can be split."""
    part = eqn.result_values[0] if eqn.name == "dynamic_slice" else eqn.operand_values[1]
    shape = eqn.operand_values[0].shape
    cut = [dim for dim, size in enumerate(shape) if part.shape[dim] != size]
    labels = _except(anonymous(len(shape)), *cut)
    return Signature(
        role="anchor",
        operands=tuple(labels if value.shape else () for value in eqn.operand_values),
        results=(labels,),
    )


def _clamped(starts: Sequence[Any], whole: Sequence[int], part: Sequence[int]) -> list[Any]:
    """Start indices in range, as JAX defines those that are not.

    XLA's algebraic simplifier forgets to clamp known ones that are out of range, where a device has
    a block of its own: their gradients were wrong.
    """
    limits = (size - taken for size, taken in zip(whole, part, strict=True))
    wide = [jnp.asarray(start, jnp.promote_types(jnp.int32, start.dtype)) for start in starts]
    return [jnp.clip(start, 0, limit) for start, limit in zip(wide, limits, strict=True)]


def _lower_dynamic_slice(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    sizes = local.result_shapes[0]
    starts = _clamped(operands[1:], operands[0].shape, sizes)
    return eqn.bind(operands[0], *starts, slice_sizes=sizes)


def _lower_dynamic_update(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    array, part, *starts = operands
    return eqn.bind(array, part, *_clamped(starts, array.shape, part.shape))


def _row_signature(eqn: Equation) -> Signature:
    """One row of a stack (of the parameters of many layers)."""
    labels = anonymous(len(eqn.operand_values[0].shape))
    return Signature(role="follow", operands=((None, *labels[1:]),), results=(labels[1:],))


def _stack_signature(eqn: Equation) -> Signature:
    """Stack and its inverse: the new dimension is not split, all others go through."""
    axis, stacked = eqn.params["axis"], (eqn.operand_values[0], eqn.result_values[0])
    rank = max(len(value.shape) for value in stacked)
    names = anonymous(rank - 1)
    whole: Labels = (*names[:axis], None, *names[axis:])
    one, many = (names, whole) if eqn.name == "stack" else (whole, names)
    return Signature(
        role="anchor", operands=(one,) * len(eqn.operands), results=(many,) * len(eqn.results)
    )


def _tile_signature(eqn: Equation) -> Signature:
    shape, tiled = eqn.operand_values[0].shape, eqn.result_values[0].shape
    repeated = [dim for dim, (a, b) in enumerate(zip(shape, tiled, strict=True)) if a != b]
    labels = _except(anonymous(len(shape)), *repeated)
    return Signature(role="anchor", operands=(labels,), results=(labels,))


def _top_k_signature(eqn: Equation) -> Signature:
    rank = len(eqn.operand_values[0].shape)
    labels = _except(anonymous(rank), eqn.params.get("axis", rank - 1) % rank)
    return Signature(role="anchor", operands=(labels,), results=(labels,) * len(eqn.results))


def _rule(kind: str, signature: Callable[[Equation], Signature | None], **kwargs: Any) -> Rule:
    return Rule(kind=kind, signature=signature, lower=kwargs.get("lower", bind_lowering))


RULES = {
    "concatenate": _rule("concat", _along("dimension")),
    "row": _rule("slice", _row_signature),
    "stack": _rule("concat", _stack_signature),
    "unstack": _rule("split", _stack_signature),
    "tile": _rule("concat", _tile_signature),
    "top_k": _rule("sort", _top_k_signature),
    "split": _rule("split", _along("axis")),
    "rev": _rule("reverse", _along("dimensions")),
    "sort": _rule("sort", _along("dimension")),
    "pad": _rule("pad", _pad_signature, lower=_lower_pad),
    "slice": _rule("slice", _slice_signature, lower=_lower_slice),
    "dynamic_slice": _rule("slice", _dynamic_signature, lower=_lower_dynamic_slice),
    "dynamic_update_slice": _rule("slice", _dynamic_signature, lower=_lower_dynamic_update),
} | {
    name: _rule("cumulative", _along("axis"))
    for name in "cumsum cumprod cummax cummin cumlogsumexp".split()
}
