"""Operators that change shapes: reshape (flatten), transpose, squeeze, broadcast, iota, random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxlwp.mesh import vary
from jaxlwp.ops._rule import Labels, Local, Rule, Signature, anonymous, bind_lowering
from jaxlwp.program import Equation


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions (sizes above 1) of equal product, left to right.

    Args:
      old: a shape.
      new: one of as many elements, at least one.

    Returns:
      Positions in the old shape, and in the new one.
    """
    left = [d for d, size in enumerate(old) if size != 1]
    right = [d for d, size in enumerate(new) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := math.prod(old[d] for d in a)) != (y := math.prod(new[d] for d in b)):
            (a.append(left.pop(0)) if x < y else b.append(right.pop(0)))
        groups.append((a, b))
    return groups


def _reshape_signature(eqn: Equation) -> Signature | None:
    """A dimension that only gains or loses neighbours of size 1 keeps its name.

    Where dimensions merge or one is divided, the most significant one carries the split: its
    blocks stay contiguous as long as the split is even.
    """
    old, new = eqn.operand_values[0].shape, eqn.result_values[0].shape
    if eqn.params.get("dimensions") is not None or 0 in old:
        return None
    groups = reshape_groups(old, new)
    plain = all(len(a) == len(b) == 1 for a, b in groups)
    operand: list[str | None] = [None] * len(old)
    result: list[str | None] = [None] * len(new)
    even = {}
    for a, b in groups:
        name = f"#{a[0]}"
        operand[a[0]] = result[b[0]] = name
        if len(a) > 1 or len(b) > 1:
            even[name] = math.gcd(old[a[0]], new[b[0]])
    return Signature(
        role="follow" if plain else "anchor",
        operands=(tuple(operand),),
        results=(tuple(result),),
        even=even,
    )


def _lower_reshape(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    return eqn.bind(*operands, new_sizes=local.result_shapes[0])


def _transpose_signature(eqn: Equation) -> Signature | None:
    permutation = eqn.params["permutation"]
    operand = anonymous(len(permutation))
    return Signature(
        role="follow", operands=(operand,), results=(tuple(operand[p] for p in permutation),)
    )


def _squeeze_signature(eqn: Equation) -> Signature | None:
    gone = eqn.params["dimensions"]
    rank = len(eqn.operand_values[0].shape)
    operand: Labels = tuple(None if d in gone else f"#{d}" for d in range(rank))
    result = tuple(f"#{d}" for d in range(rank) if d not in gone)
    return Signature(role="follow", operands=(operand,), results=(result,))


def _broadcast_signature(eqn: Equation) -> Signature | None:
    """Follows its operand where only dimensions of size 1 are new, else waits for its use."""
    old, new = eqn.operand_values[0].shape, eqn.result_values[0].shape
    where = eqn.params["broadcast_dimensions"]
    result: list[str | None] = [f"#{d}" if size > 1 else None for d, size in enumerate(new)]
    operand = tuple(
        result[d] if size == new[d] else None for d, size in zip(where, old, strict=True)
    )
    grows = any(label not in operand for label in result if label is not None)
    return Signature(
        role="lazy" if grows else "follow", operands=(operand,), results=(tuple(result),)
    )


def _lower_broadcast(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    return eqn.bind(*operands, shape=local.result_shapes[0])


def _iota_signature(eqn: Equation) -> Signature | None:
    result = tuple(f"#{d}" for d in range(len(eqn.params["shape"])))
    return Signature(role="lazy", operands=(), results=(result,))


def _lower_iota(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    shape, dim = local.result_shapes[0], eqn.params["dimension"]
    iota = lax.broadcasted_iota(eqn.params["dtype"], shape, dim)
    # It has no operand from which it would become varying where its reader is active.
    iota = vary(iota, local.varying)
    start, _ = local.places()[0][dim]
    return (iota + start.astype(iota.dtype) if not isinstance(start, int) else iota,)


def _whole_signature(eqn: Equation) -> Signature | None:
    """Evaluated whole on every device, then sliced: the same random bits for every strategy."""
    return Signature(
        role="lazy",
        operands=tuple((None,) * len(v.shape) for v in eqn.operand_values),
        results=tuple((None,) * len(v.shape) for v in eqn.result_values),
    )


_WHOLE = Rule(kind="random", signature=_whole_signature, lower=bind_lowering)

RULES = {
    "reshape": Rule(kind="reshape", signature=_reshape_signature, lower=_lower_reshape),
    "transpose": Rule(kind="transpose", signature=_transpose_signature, lower=bind_lowering),
    "squeeze": Rule(kind="reshape", signature=_squeeze_signature, lower=bind_lowering),
    "broadcast_in_dim": Rule(
        kind="broadcast", signature=_broadcast_signature, lower=_lower_broadcast
    ),
    "iota": Rule(kind="iota", signature=_iota_signature, lower=_lower_iota),
} | {
    name: _WHOLE
    for name in (
        "random_bits random_fold_in random_seed random_split random_wrap random_unwrap "
        "random_clone threefry2x32 shuffle"
    ).split()
}
