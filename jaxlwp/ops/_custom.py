"""Calls with a derivative of their own: `jax.custom_jvp` and `jax.custom_vjp`.

Body and derivative are programs like any other. A dimension along which both only map (no
reduction, window, index or constant touches it) can be split: each device then evaluates the body
on its block, with the derivative that the user gave. If there is none, the call runs whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlwp._program import Equation, Program, flatten
from jaxlwp.ops._blocks import Blocks, Classes, SignatureOf, dims_of, labels_of, relate
from jaxlwp.ops._rule import Local, Rule, Signature


def _programs(eqn: Equation) -> tuple[Program, Program]:
    """The body, and its derivative as a program of operands and (co)tangents."""
    if "programs" not in eqn.notes:
        count = len(eqn.operands)

        def jvp(*values: Any) -> Any:
            return jax.jvp(functools.partial(_call, eqn), values[:count], values[count:])[1]

        def vjp(*values: Any) -> Any:
            return jax.vjp(functools.partial(_call, eqn), *values[:count])[1](values[count:])

        forward = eqn.name == "custom_jvp_call"
        given = (*eqn.operand_values, *(eqn.operand_values if forward else eqn.result_values))
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in given]
        derivative = jax.make_jaxpr(jvp if forward else vjp)(*shapes)
        # Neither is differentiated again: a derivative may well call the function itself.
        eqn.notes["programs"] = (
            flatten(eqn.params["call_jaxpr"], derivatives=False, unroll=False),
            flatten(derivative, derivatives=False, unroll=False),
        )
    programs: tuple[Program, Program] = eqn.notes["programs"]
    return programs


def _call(eqn: Equation, *operands: Any) -> tuple[Any, ...]:
    return eqn.bind(*operands)


def _classes(rule_of: SignatureOf, eqn: Equation) -> Classes:
    """Which dimensions of body and derivative go together."""
    body, derivative = _programs(eqn)
    classes = Classes()
    for name, program in (("body", body), ("derivative", derivative)):
        relate(classes, name, program, rule_of, cuts=False)
    # Tangents are like the operands, and give those of the results; cotangents the other way.
    forward = eqn.name == "custom_jvp_call"
    given, made = (body.inputs, body.outputs) if forward else (body.outputs, body.inputs)
    same = zip(
        (*body.inputs, *given, *made), (*derivative.inputs, *derivative.outputs), strict=True
    )
    for a, b in same:
        for x, y in zip(
            dims_of("body", body, a), dims_of("derivative", derivative, b), strict=True
        ):
            classes.union(x, y)
    return classes


def _signature(rule_of: SignatureOf, eqn: Equation) -> Signature | None:
    values = (*eqn.operand_values, *eqn.result_values)
    if not eqn.operands or not all(value.differentiable for value in values):
        return None
    classes, (body, _) = _classes(rule_of, eqn), _programs(eqn)
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


def _lower(
    rule_of: SignatureOf, eqn: Equation, operands: Sequence[Any], local: Local
) -> tuple[Any, ...]:
    """The call on blocks: its own body and its own derivative, both on blocks."""
    body, derivative = _programs(eqn)
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

    def call(*args: Any) -> Any:
        return blocks.run("body", body, args)

    def derive(*args: Any) -> Any:
        return blocks.run("derivative", derivative, args)

    if eqn.name == "custom_jvp_call":
        forward = jax.custom_jvp(call)
        forward.defjvp(lambda primals, tangents: (forward(*primals), derive(*primals, *tangents)))
        return tuple(forward(*operands))
    backward = jax.custom_vjp(call)
    backward.defvjp(
        lambda *args: (call(*args), args), lambda args, cotangents: derive(*args, *cotangents)
    )
    return tuple(backward(*operands))


def rules(rule_of: SignatureOf) -> dict[str, Rule]:
    """The rules of the two calls.

    Args:
      rule_of: rule and signature of the equations in their bodies; None if there is no rule.
    """
    rule = Rule(
        kind="custom",
        signature=functools.partial(_signature, rule_of),
        lower=functools.partial(_lower, rule_of),
    )
    return {"custom_jvp_call": rule, "custom_vjp_call": rule}
