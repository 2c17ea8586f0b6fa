"""Calls with a derivative of their own: `jax.custom_jvp` and `jax.custom_vjp`.

Body and derivative are programs like any other. A dimension along which both only map (no
reduction, window, index or constant touches it) can be split: each device then evaluates the body
on its block, with the derivative that the user gave. If there is none, the call runs whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlwp.mesh import no_mesh
from jaxlwp.ops._blocks import Blocks, Classes, SignatureOf, dims_of, labels_of, relate
from jaxlwp.ops._derivative import values_needed
from jaxlwp.ops._rule import Local, Rule, Signature
from jaxlwp.program import (
    CUSTOM_JVP,
    CUSTOM_VJP,
    Equation,
    Program,
    Value,
    flatten,
)


@dataclass(frozen=True, kw_only=True)
class _Programs:
    """A call as programs of its own, which know no mesh: JAX's call keeps what it was traced for.

    Attributes:
      body: of the operands.
      derivative: of the operands and then tangents of operands (`custom_jvp`), which gives tangents
        of results, or cotangents of results (`custom_vjp`), which gives those of operands; only of
        those that are differentiable.
      error: why there is no derivative; None if there is one.
      forward: it is a `custom_jvp`.
    """

    body: Program
    derivative: Program
    error: Exception | None
    forward: bool


def _programs(eqn: Equation) -> _Programs:
    """The body, and its derivative as a program of operands and (co)tangents."""
    if "programs" not in eqn.notes:
        forward = eqn.name in CUSTOM_JVP
        given = [*eqn.operand_values, *filter(_differentiable, _driving(eqn, forward))]
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in given]
        error: Exception | None = None
        # Neither is differentiated again: a derivative may well call the function itself.
        with no_mesh():
            body = flatten(eqn.params["call_jaxpr"], derivatives=False, unroll=False)
            try:
                traced = jax.make_jaxpr(functools.partial(_derivative, eqn, forward))(*shapes)
                derivative = flatten(traced, derivatives=False, unroll=False)
            except Exception as raised:  # whatever the user's rule raises; nobody may ask for it
                error, derivative = raised, body
        eqn.notes["programs"] = _Programs(
            body=body, derivative=derivative, error=error, forward=forward
        )
    programs: _Programs = eqn.notes["programs"]
    return programs


def _differentiable(value: Value) -> bool:
    return value.differentiable


def _driving(eqn: Equation, forward: bool) -> tuple[Value, ...]:
    """The values whose tangents or cotangents the derivative is given."""
    return eqn.operand_values if forward else eqn.result_values


def _derivative(eqn: Equation, forward: bool, *values: Any) -> list[Any]:
    """Tangents of the results, or cotangents of the operands."""
    count = len(eqn.operands)
    operands, rest = values[:count], iter(values[count:])
    driving = [
        next(rest) if value.differentiable else np.zeros(value.shape, jax.dtypes.float0)
        for value in _driving(eqn, forward)
    ]
    if forward:
        _, tangents = jax.jvp(functools.partial(_call, eqn), operands, tuple(driving))
        kept: Any = zip(eqn.result_values, tangents, strict=True)
        return [tangent for value, tangent in kept if value.differentiable]
    moved = [n for n, value in enumerate(eqn.operand_values) if value.differentiable]

    def of_moved(*changed: Any) -> tuple[Any, ...]:
        given = dict(zip(moved, changed, strict=True))
        return _call(eqn, *(given.get(n, x) for n, x in enumerate(operands)))

    _, back = jax.vjp(of_moved, *(operands[n] for n in moved))
    return list(back(tuple(driving)))


def _call(eqn: Equation, *operands: Any) -> tuple[Any, ...]:
    return eqn.bind(*operands)


def _classes(rule_of: SignatureOf, eqn: Equation) -> Classes:
    """Which dimensions of body and derivative go together, and which of them can be split."""
    if "classes" not in eqn.notes:
        eqn.notes["classes"] = _related(rule_of, eqn)
    classes: Classes = eqn.notes["classes"]
    return classes


def _related(rule_of: SignatureOf, eqn: Equation) -> Classes:
    programs = _programs(eqn)
    body, derivative = programs.body, programs.derivative
    classes = Classes()
    for name, program in (("body", body), ("derivative", derivative)):
        relate(classes, name, program, rule_of, cuts=False)
    # Tangents are like the operands, and give those of the results; cotangents the other way.
    ends = (body.inputs, body.outputs) if programs.forward else (body.outputs, body.inputs)
    given, made = ([i for i in end if body.values[i].differentiable] for end in ends)
    same = zip(
        (*body.inputs, *given, *made), (*derivative.inputs, *derivative.outputs), strict=True
    )
    for a, b in same:
        for x, y in zip(
            dims_of("body", body, a), dims_of("derivative", derivative, b), strict=True
        ):
            classes.union(x, y)
    if not programs.forward:
        _keep_cotangents_whole(classes, body, made, derivative)
    return classes


def _keep_cotangents_whole(
    classes: Classes, body: Program, operands: Sequence[int], derivative: Program
) -> None:
    """Block what an operand with a cotangent does not have.

    Each device would return a part of its cotangent, and the parts would be added up. A rule that
    is not linear in the cotangent of the result (one that clips it) may return anything.
    """
    every = {
        classes.find(dim) for i in (*body.inputs, *body.outputs) for dim in dims_of("body", body, i)
    }
    for operand, cotangent in zip(operands, derivative.outputs, strict=True):
        if not _is_zero(derivative, cotangent):
            own = {classes.find(dim) for dim in dims_of("body", body, operand)}
            for dim in every - own:
                classes.block(dim)


def _is_zero(program: Program, value: int) -> bool:
    """Whether a value is zeros, as JAX makes them where a rule says that there is no cotangent."""
    makers = {result: eqn for eqn in program.equations for result in eqn.results}
    while value in makers and makers[value].name == "broadcast_in_dim":
        value = makers[value].operands[0]
    constant = program.constants.get(value)
    return constant is not None and not np.any(np.asarray(constant))


def _signature(rule_of: SignatureOf, eqn: Equation) -> Signature | None:
    values = (*eqn.operand_values, *eqn.result_values)
    if not eqn.operands or _programs(eqn).error is not None:
        return None
    classes, body = _classes(rule_of, eqn), _programs(eqn).body
    labels = [
        labels_of(classes, dims_of("body", body, i), body.values[i].shape)
        for i in (*body.inputs, *body.outputs)
    ]
    found = {label for names in labels for label in names} - {None}
    order = {
        label: f"#{i}"
        for i, label in enumerate(
            dict.fromkeys(label for names in labels for label in names if label)
        )
    }
    labels = [tuple(order[x] if x else None for x in names) for names in labels]
    count = len(body.inputs)
    whole = any(
        x is None and n > 1
        for names, v in zip(labels, values, strict=True)
        for x, n in zip(names, v.shape, strict=True)
    )
    signature = Signature(
        role="anchor" if whole else "follow",
        operands=tuple(labels[:count]),
        results=tuple(labels[count:]),
        # The cotangent of a broadcast operand is a sum, which must not reach into padding.
        even={
            label: size
            for names, value in zip(labels[count:], eqn.result_values, strict=True)
            for label, size in zip(names, value.shape, strict=True)
            if label and not all(label in operand for operand in labels[:count])
        },
    )
    # A dimension that is in no result, or twice in a tensor, is not merely mapped.
    doubled = any(len(set(names) - {None}) < sum(x is not None for x in names) for names in labels)
    useless = not found and any(math.prod(value.shape) > 1 for value in values)
    return None if useless or doubled or signature.reduced or classes.closed else signature


def _unread(eqn: Equation) -> tuple[int, ...]:
    """Results of a `custom_vjp` whose cotangents its rule does not read."""
    programs = _programs(eqn)
    if programs.error is not None:
        return ()
    read = {i for each in programs.derivative.equations for i in each.operands}
    read.update(programs.derivative.outputs)
    cotangents = iter(programs.derivative.inputs[len(eqn.operands) :])
    return tuple(
        n
        for n, value in enumerate(eqn.result_values)
        if value.differentiable and next(cotangents) not in read
    )


def _needed(eqn: Equation, gradient: Sequence[bool]) -> tuple[int, ...]:
    """Positions of the operands whose values the derivative reads; see `Rule.needed`."""
    programs, count = _programs(eqn), len(eqn.operands)
    derivative = programs.derivative
    if programs.error is not None:
        return tuple(range(count))
    differentiable = [n for n, value in enumerate(eqn.operand_values) if value.differentiable]
    if programs.forward:
        tangents = zip(differentiable, derivative.inputs[count:], strict=True)
        read = _coefficients(derivative, {value for n, value in tangents if gradient[n]})
    else:
        cotangents = zip(differentiable, derivative.outputs, strict=True)
        read = {value for n, value in cotangents if gradient[n]}
    for each in reversed(derivative.equations):
        if not read.isdisjoint(each.results):
            read.update(each.operands)
    return tuple(n for n in range(count) if derivative.inputs[n] in read)


def _coefficients(derivative: Program, tangents: set[int]) -> set[int]:
    """What stands beside tangents in a program that is linear in them."""
    read: set[int] = set()
    for eqn in derivative.equations:
        moved = [value in tangents for value in eqn.operands]
        if any(moved):
            tangents.update(eqn.results)
            read.update(eqn.operands[n] for n in values_needed(eqn, moved))
    return read - tangents


def _lower(
    rule_of: SignatureOf, eqn: Equation, operands: Sequence[Any], local: Local
) -> tuple[Any, ...]:
    """The call on blocks: its own body and its own derivative, both on blocks."""
    body = _programs(eqn).body
    classes = _classes(rule_of, eqn)
    sizes = {
        classes.find(dim): size
        for value, block in zip(body.inputs, operands, strict=True)
        for dim, size in zip(dims_of("body", body, value), jnp.shape(block), strict=True)
        if classes.can_split(dim)
    }
    blocks = Blocks(
        rule_of=rule_of, classes=classes, sizes=sizes, offsets={}, varying=local.varying
    )
    return _evaluate(eqn, blocks.run, operands)


def _lower_whole(eqn: Equation, operands: Sequence[Any]) -> tuple[Any, ...]:
    """The call on whole arrays."""

    def run(name: str, program: Program, operands: Sequence[Any]) -> tuple[Any, ...]:
        return program(*operands)

    return _evaluate(eqn, run, operands)


def _evaluate(
    eqn: Equation,
    run: Callable[[str, Program, Sequence[Any]], tuple[Any, ...]],
    operands: Sequence[Any],
) -> tuple[Any, ...]:
    """Body and derivative, evaluated by `run`, as a call with a derivative of its own."""
    programs = _programs(eqn)

    def call(*args: Any) -> Any:
        return run("body", programs.body, args)

    def derive(*args: Any) -> tuple[Any, ...]:
        if programs.error is not None:
            raise programs.error
        return run("derivative", programs.derivative, args)

    def only(values: Sequence[Any], infos: Sequence[Value]) -> list[Any]:
        return [x for x, info in zip(values, infos, strict=True) if info.differentiable]

    def filled(values: Sequence[Any], infos: Sequence[Value], rest: Callable[[int], Any]) -> Any:
        given = iter(values)
        return tuple(next(given) if x.differentiable else rest(n) for n, x in enumerate(infos))

    if programs.forward:
        forward = jax.custom_jvp(call)

        def push(primals: Any, tangents: Any) -> Any:
            made = forward(*primals)
            moved = derive(*primals, *only(tangents, eqn.operand_values))
            zero = lambda n: np.zeros(made[n].shape, jax.dtypes.float0)  # noqa: E731
            return made, filled(moved, eqn.result_values, zero)

        forward.defjvp(push)
        return tuple(forward(*operands))
    backward = jax.custom_vjp(call)

    def pull(args: Any, cotangents: Any) -> Any:
        moved = derive(*args, *only(cotangents, eqn.result_values))
        return filled(moved, eqn.operand_values, lambda n: None)

    backward.defvjp(lambda *args: (call(*args), args), pull)
    return tuple(backward(*operands))


def rules(rule_of: SignatureOf) -> dict[str, Rule]:
    """The rules of the two calls.

    Args:
      rule_of: rule and signature of the equations in their bodies; None if there is no rule.
    """

    def rule(once: bool) -> Rule:
        return Rule(
            kind="custom",
            signature=functools.partial(_signature, rule_of),
            lower=functools.partial(_lower, rule_of),
            lower_whole=_lower_whole,
            once=once,
            unread=_unread if once else lambda eqn: (),
            needed=_needed,
        )

    return dict.fromkeys(CUSTOM_JVP, rule(once=False)) | dict.fromkeys(CUSTOM_VJP, rule(once=True))
