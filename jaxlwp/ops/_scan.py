"""Scans that are one layer: recurrences in time, maps, losses (`jax.lax.scan`).

The body is a program like any other. A dimension that it merely maps, from the first iteration to
the last, can be split: each device runs all iterations on its block, and JAX differentiates that.
What the body reads whole (a recurrence's weights) is the same in every iteration; its gradient is
summed by JAX over the iterations, and over devices once, after the scan. The scanned dimension can
be split too if nothing is handed from one iteration to the next.

Padding holds copies of a real element while the scan runs, so it computes nothing that a real
element would not: neither NaN nor infinity, which a gradient of zero would turn into NaN in the sum
for a weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlwp.ops._blocks import (
    Blocks,
    Classes,
    Dim,
    SignatureOf,
    dims_of,
    relate,
)
from jaxlwp.ops._rule import Labels, Local, Rule, Signature, default_names, elementwise_flops
from jaxlwp.program import (
    CUSTOM_VJP,
    SCAN,
    Equation,
    Program,
    Scan,
    StandIn,
    Value,
    scan_of,
)

BODY = "body"
SCANNED: Dim = ("scanned", 0, 0)
"""The dimension of stacked inputs and outputs along which a scan runs."""

READ = "read"
"""Note of a scan: positions of the results that something reads."""

APART = "apart"
"""Note of a scan that makes what is the same on every device: there is nothing to split."""

SMALL = 0.25
"""Share of a scan's operations that may be done once more, apart: two devices still gain."""


def _classes(rule_of: SignatureOf, eqn: Equation) -> Classes:
    """Which dimensions of a scan's body go together."""
    if "classes" not in eqn.notes:
        scan = scan_of(eqn)
        eqn.notes["classes"] = classes = Classes()
        body, first = scan.body, scan.num_consts
        relate(classes, BODY, body, rule_of, cuts=True)
        carries = zip(body.inputs[first : first + scan.num_carry], body.outputs, strict=False)
        for before, after in carries:
            for a, b in zip(dims_of(BODY, body, before), dims_of(BODY, body, after), strict=True):
                classes.union(a, b)
        for value, info in enumerate(body.values):
            if not isinstance(info.dtype, np.dtype):  # random keys
                for dim in dims_of(BODY, body, value):
                    classes.block(dim)
        if scan.num_carry:
            classes.block(SCANNED)
    found: Classes = eqn.notes["classes"]
    return found


def _tensors(eqn: Equation) -> list[list[tuple[Dim, int]]]:
    """The dimensions of each operand and result, and their sizes."""
    scan, body = scan_of(eqn), scan_of(eqn).body
    last = scan.num_consts + scan.num_carry
    inside = [
        *((value, n >= last) for n, value in enumerate(body.inputs)),
        *((value, n >= scan.num_carry) for n, value in enumerate(body.outputs)),
    ]
    return [
        list(zip([SCANNED] * stacked + dims_of(BODY, body, inner), value.shape, strict=True))
        for (inner, stacked), value in zip(
            inside, (*eqn.operand_values, *eqn.result_values), strict=True
        )
    ]


# --- what can be split ---------------------------------------------------------------------------


def _signature(rule_of: SignatureOf, eqn: Equation) -> Signature | None:
    signature, names = unsplit(rule_of, eqn), _names(rule_of, eqn)
    if signature is None or not names:
        return signature if APART in eqn.notes else None
    scan, classes = scan_of(eqn), _classes(rule_of, eqn)
    labels = [
        tuple(names.get(classes.find(dim)) if n > 1 else None for dim, n in each)
        for each in _tensors(eqn)
    ]
    count = len(eqn.operands)
    # Rows of padding have gradients of zero. A backward pass of the user's own need not give zero
    # for them, and random keys cannot be filled in.
    whole_rows = _has_own_gradient(scan.body) or _has_keys(eqn)
    return Signature(
        role="anchor",
        operands=tuple(labels[:count]),
        results=tuple(labels[count:]),
        even={names[SCANNED]: scan.length} if whole_rows and SCANNED in names else {},
        fill="zero",
        likely=_likely(eqn),
    )


def unsplit(rule_of: SignatureOf, eqn: Equation) -> Signature | None:
    """A signature that names no dimension; None if the body cannot be evaluated on blocks."""
    if _classes(rule_of, eqn).closed:
        return None
    return Signature(
        role="anchor",
        operands=tuple((None,) * len(v.shape) for v in eqn.operand_values),
        results=tuple((None,) * len(v.shape) for v in eqn.result_values),
    )


def _names(rule_of: SignatureOf, eqn: Equation) -> dict[Dim, str]:
    """The classes of dimensions by which the scan can be split, and names for them.

    All blocks vary over all mesh axes that split something; a result that is the same on all
    devices cannot say so. So what is split is in every result that is read, but in a body.
    """
    found = _mapped(rule_of, eqn)
    read = eqn.notes.get(READ)
    if read is not None:
        results = _tensors(eqn)[len(eqn.operands) :]
        classes = _classes(rule_of, eqn)
        each = [{classes.find(dim) for dim, _ in results[n]} for n in read]
        found = [dim for dim in found if all(dim in dims for dims in each)]
    return {dim: f"#{n}" for n, dim in enumerate(found)}


def _mapped(rule_of: SignatureOf, eqn: Equation) -> list[Dim]:
    """The classes of dimensions of results that the scan merely maps."""
    classes, body = _classes(rule_of, eqn), scan_of(eqn).body
    found = dict.fromkeys(
        classes.find(dim)
        for tensor in _tensors(eqn)[len(eqn.operands) :]
        for dim, n in tensor
        if n > 1 and classes.can_split(dim)
    )
    for value in range(len(body.values)):  # a matrix of samples and samples
        dims = [classes.find(dim) for dim in dims_of(BODY, body, value)]
        for dim in dims:
            if dims.count(dim) > 1:
                found.pop(dim, None)
    allowed = _summed_gradients(classes, body)
    return [dim for dim in found if dim == SCANNED or allowed is None or dim in allowed]


def _summed_gradients(classes: Classes, body: Program) -> set[Dim] | None:
    """The dimensions over which backward passes of the user's own get whole cotangents; None: all.

    Where a device has a part of the samples, the cotangent of what has no samples is its part of a
    sum. A backward pass that is not linear (it clips) must not see it.
    """
    allowed: set[Dim] | None = None
    for eqn in body.equations:
        if eqn.name in CUSTOM_VJP:
            read = [
                {classes.find(dim) for dim in dims_of(BODY, body, i)}
                for i, value in zip(eqn.operands, eqn.operand_values, strict=True)
                if value.differentiable
            ]
            here = set.intersection(*read) if read else None
        elif eqn.name == SCAN and _has_own_gradient(scan_of(eqn).body):
            # What it can be split by has been looked at inside.
            here = {classes.find(dim) for i in eqn.results for dim in dims_of(BODY, body, i)}
        else:
            here = None
        if here is not None:
            allowed = here if allowed is None else allowed & here
    return allowed


def _has_own_gradient(body: Program) -> bool:
    return any(
        eqn.name in CUSTOM_VJP or (eqn.name == SCAN and _has_own_gradient(scan_of(eqn).body))
        for eqn in body.equations
    )


def _has_keys(eqn: Equation) -> bool:
    return not all(isinstance(value.dtype, np.dtype) for value in eqn.operand_values)


def _likely(eqn: Equation) -> tuple[Labels, ...]:
    """Names by position, as of activations: rows without the scanned dimension, unless it maps."""
    scan = scan_of(eqn)

    def names(number: int, value: Value, first: int, last: int) -> Labels:
        rank = len(value.shape)
        if number < first:  # the same in every iteration: its first dimension is no sample
            return (None,) * rank
        scanned = number >= last and scan.num_carry
        return (None, *default_names(rank - 1)) if scanned else default_names(rank)

    last = scan.num_consts + scan.num_carry
    return (
        *(names(n, v, scan.num_consts, last) for n, v in enumerate(eqn.operand_values)),
        *(names(n, v, 0, scan.num_carry) for n, v in enumerate(eqn.result_values)),
    )


# --- parts of a scan -----------------------------------------------------------------------------


def parts(
    rule_of: SignatureOf, eqn: Equation, read: Collection[int], new: Callable[[Value], int]
) -> list[Equation]:
    """A scan of a program without what nothing reads, and what it makes whole apart.

    A counter, a random key, what is made of weights alone are the same on every device. A scan of
    their own makes them, if that is little work, so that the rest can be split.

    Args:
      rule_of: rule and signature of the equations in the body.
      eqn: the scan.
      read: the values that something reads.
      new: makes a value of the program, for results that nothing reads.
    """
    wanted = [n for n, value in enumerate(eqn.results) if value in read]
    if _classes(rule_of, eqn).closed:
        return [eqn] if wanted else []
    found, classes = set(_mapped(rule_of, eqn)), _classes(rule_of, eqn)
    results = _tensors(eqn)[len(eqn.operands) :]
    split = [n for n in wanted if any(classes.find(dim) in found for dim, _ in results[n])]
    whole = [n for n in wanted if n not in split]
    if split and whole:
        apart = [_part(rule_of, eqn, some, new) for some in (whole, split)]
        work = [_flops_of(rule_of, each) for each in (apart[0], eqn)]
        if work[0] <= SMALL * work[1]:
            apart[0].notes[APART] = True
            return apart
    return [_part(rule_of, eqn, wanted, new)] if wanted else []


def _part(
    rule_of: SignatureOf, eqn: Equation, wanted: Sequence[int], new: Callable[[Value], int]
) -> Equation:
    """The scan with the wanted results alone, and the carries that they need."""
    scan, operands, results = scan_of(eqn).only(wanted)
    values = tuple(eqn.result_values[n] for n in results)
    return dataclasses.replace(
        eqn,
        primitive=StandIn(SCAN, functools.partial(_whole, rule_of, scan), multiple_results=True),
        params={**eqn.params, "results": results},
        operands=tuple(eqn.operands[n] for n in operands),
        results=tuple(
            eqn.results[n] if n in wanted else new(value)
            for n, value in zip(results, values, strict=True)
        ),
        operand_values=tuple(eqn.operand_values[n] for n in operands),
        result_values=values,
        notes={SCAN: scan, READ: tuple(results.index(n) for n in wanted)},
    )


def _whole(rule_of: SignatureOf, scan: Scan, *operands: Any, **params: Any) -> tuple[Any, ...]:
    """Evaluate a scan that is not split."""
    blocks = Blocks(rule_of=rule_of, classes=Classes(), sizes={}, offsets={}, varying=())
    return scan.run(lambda *given: blocks.run(BODY, scan.body, given), operands)


def _flops_of(rule_of: SignatureOf, eqn: Equation) -> float:
    shapes = [v.shape for v in eqn.operand_values], [v.shape for v in eqn.result_values]
    return _flops(rule_of, eqn, *shapes)


# --- evaluation ----------------------------------------------------------------------------------


def _lower(
    rule_of: SignatureOf, eqn: Equation, operands: Sequence[Any], local: Local
) -> tuple[Any, ...]:
    """The scan on blocks."""
    scan, classes = scan_of(eqn), _classes(rule_of, eqn)
    dims = [[classes.find(dim) for dim, _ in tensor] for tensor in _tensors(eqn)]
    count = len(eqn.operands)
    made = [
        (dim, size, *place)
        for each, shape, places in zip(
            dims[count:], local.result_shapes, local.places(), strict=True
        )
        for dim, size, place in zip(each, shape, places, strict=True)
        if classes.can_split(dim)
    ]
    blocks = Blocks(
        rule_of=rule_of,
        classes=classes,
        sizes={dim: size for dim, size, _, _ in made},
        offsets={dim: offset for dim, _, offset, _ in made},
        varying=local.varying,
    )
    real = {dim: number for dim, _, _, number in made if number is not None}
    return scan.run(
        lambda *given: blocks.run(BODY, scan.body, given),
        [_filled(x, each, real) for x, each in zip(operands, dims[:count], strict=True)],
        length=blocks.sizes.get(SCANNED, scan.length),
    )


def _filled(x: Any, dims: Sequence[Dim], real: Mapping[Dim, Any]) -> Any:
    """An operand with copies of its last real element for padding; no gradient comes from there.

    Args:
      x: the operand's block.
      dims: its classes of dimensions.
      real: class -> elements of a block that are no padding, where there is padding.
    """
    for position, dim in enumerate(dims):
        if dim in real:
            last = jnp.maximum(real[dim] - 1, 0)
            copy = lax.dynamic_index_in_dim(x, last, position)
            number = lax.broadcasted_iota(jnp.int32, x.shape, position)
            x = jnp.where(number < real[dim], x, lax.stop_gradient(copy))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        for dim, number in real.items():
            if dim not in dims:  # a device that has nothing but padding adds nothing to it
                x = jnp.where(number > 0, x, lax.stop_gradient(x))
    return x


def _flops(
    rule_of: SignatureOf,
    eqn: Equation,
    operands: Sequence[Sequence[int]],
    results: Sequence[Sequence[int]],
) -> float:
    """Those of the body, times the iterations."""
    scan, classes = scan_of(eqn), _classes(rule_of, eqn)
    sizes = {
        classes.find(dim): size
        for tensor, shape in zip(_tensors(eqn), (*operands, *results), strict=True)
        for (dim, _), size in zip(tensor, shape, strict=True)
        if classes.can_split(dim)
    }

    def shape(value: int) -> tuple[int, ...]:
        whole = scan.body.values[value].shape
        dims = map(classes.find, dims_of(BODY, scan.body, value))
        return tuple(sizes.get(dim, size) for dim, size in zip(dims, whole, strict=True))

    total = 0.0
    for inner in scan.body.equations:
        found = rule_of(inner)
        count = found[0].flops if found else elementwise_flops
        total += count(inner, [shape(i) for i in inner.operands], [shape(i) for i in inner.results])
    return sizes.get(SCANNED, scan.length) * total


def rules(rule_of: SignatureOf) -> dict[str, Rule]:
    """The rule of scans.

    Args:
      rule_of: rule and signature of the equations in their bodies; None if there is no rule.
    """
    return {
        SCAN: Rule(
            kind="scan",
            signature=functools.partial(_signature, rule_of),
            lower=functools.partial(_lower, rule_of),
            flops=functools.partial(_flops, rule_of),
        )
    }
