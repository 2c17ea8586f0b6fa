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

from jaxlwp._program import Equation, Program, flatten
from jaxlwp._spmd import vary
from jaxlwp.ops._rule import Labels, Local, Rule, Signature

Dim = tuple[str, int, int]
"""A dimension of a value of a program: program, value, position."""

SignatureOf = Callable[[Equation], tuple[Rule, Signature] | None]


class _Classes:
    """Dimensions that must be split together, and whether they can be."""

    def __init__(self) -> None:
        self.parent: dict[Dim, Dim] = {}
        self.blocked: set[Dim] = set()

    def find(self, dim: Dim) -> Dim:
        while self.parent.setdefault(dim, dim) != dim:
            dim = self.parent[dim]
        return dim

    def union(self, a: Dim, b: Dim) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a
            if b in self.blocked:
                self.blocked.add(a)

    def block(self, dim: Dim) -> None:
        self.blocked.add(self.find(dim))

    def can_split(self, dim: Dim) -> bool:
        return self.find(dim) not in self.blocked


def _dims(name: str, program: Program, value: int) -> list[Dim]:
    return [(name, value, d) for d in range(len(program.values[value].shape))]


def _relate(classes: _Classes, name: str, program: Program, rule_of: SignatureOf) -> None:
    """Unite the dimensions that a program's equations map to each other; block all others."""
    for constant in program.constants:
        for dim, size in zip(
            _dims(name, program, constant), program.values[constant].shape, strict=True
        ):
            if size > 1:
                classes.block(dim)
    for eqn in program.equations:
        found = rule_of(eqn)
        tensors = [_dims(name, program, i) for i in (*eqn.operands, *eqn.results)]
        if found is None or eqn.name == "iota":
            for dim in (d for dims in tensors for d in dims):
                classes.block(dim)
            continue
        _, signature = found
        mixed = {*signature.windows, *signature.even, *signature.reduced}
        first: dict[str, Dim] = {}
        labels = (*signature.operands, *signature.results)
        sizes = (*eqn.operand_values, *eqn.result_values)
        for dims, names, value in zip(tensors, labels, sizes, strict=True):
            for dim, letter, size in zip(dims, names, value.shape, strict=True):
                if letter is not None:
                    classes.union(first.setdefault(letter, dim), dim)
                if letter in mixed or (letter is None and size > 1):
                    classes.block(dim)


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
            flatten(eqn.params["call_jaxpr"], derivatives=False),
            flatten(derivative, derivatives=False),
        )
    programs: tuple[Program, Program] = eqn.notes["programs"]
    return programs


def _call(eqn: Equation, *operands: Any) -> tuple[Any, ...]:
    return eqn.bind(*operands)


def _classes(rule_of: SignatureOf, eqn: Equation) -> _Classes:
    """Which dimensions of body and derivative go together."""
    body, derivative = _programs(eqn)
    classes = _Classes()
    for name, program in (("body", body), ("derivative", derivative)):
        _relate(classes, name, program, rule_of)
    # Tangents are like the operands, and give those of the results; cotangents the other way.
    forward = eqn.name == "custom_jvp_call"
    given, made = (body.inputs, body.outputs) if forward else (body.outputs, body.inputs)
    same = zip(
        (*body.inputs, *given, *made), (*derivative.inputs, *derivative.outputs), strict=True
    )
    for a, b in same:
        for x, y in zip(_dims("body", body, a), _dims("derivative", derivative, b), strict=True):
            classes.union(x, y)
    return classes


def _signature(rule_of: SignatureOf, eqn: Equation) -> Signature | None:
    values = (*eqn.operand_values, *eqn.result_values)
    if not eqn.operands or not all(value.differentiable for value in values):
        return None
    classes, (body, _) = _classes(rule_of, eqn), _programs(eqn)
    labels = [
        _labels(classes, _dims("body", body, i), body.values[i].shape)
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
    return None if useless or doubled or signature.reduced else signature


def _labels(classes: _Classes, dims: Sequence[Dim], shape: Sequence[int]) -> Labels:
    return tuple(
        "#" + "/".join(map(str, classes.find(dim))) if size > 1 and classes.can_split(dim) else None
        for dim, size in zip(dims, shape, strict=True)
    )


# --- evaluation on blocks ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How body and derivative are evaluated on blocks.

    Attributes:
      rule_of: rule and signature of an equation.
      classes: which dimensions go together.
      sizes: class of dimensions -> size of the block.
      varying: mesh axes over which the blocks vary.
    """

    rule_of: SignatureOf
    classes: _Classes
    sizes: dict[Dim, int]
    varying: tuple[str, ...]

    def run(self, name: str, program: Program, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Evaluate a program, its operands blocks."""
        env: dict[int, Any] = {i: self.vary(c) for i, c in program.constants.items()}
        env.update(zip(program.inputs, operands, strict=True))
        for eqn in program.equations:
            args = [env[i] for i in eqn.operands]
            found = self.rule_of(eqn)
            results = (
                found[0].lower(eqn, args, self.local(name, program, eqn))
                if found
                else eqn.bind(*args)
            )
            env.update(zip(eqn.results, results, strict=True))
        return tuple(env[i] for i in program.outputs)

    def local(self, name: str, program: Program, eqn: Equation) -> Local:
        shapes = tuple(
            tuple(
                self.sizes.get(self.classes.find(dim), size)
                for dim, size in zip(_dims(name, program, i), value.shape, strict=True)
            )
            for i, value in zip(eqn.results, eqn.result_values, strict=True)
        )
        rank = len(eqn.operand_values[0].shape) if eqn.operands else 0
        return Local(
            names=(None,) * rank,
            result_shapes=shapes,
            offsets=tuple((0,) * len(shape) for shape in shapes),
            varying=self.varying,
        )

    def vary(self, constant: Any) -> Any:
        """A constant, varying over the mesh axes over which the operands vary."""
        return vary(jnp.asarray(constant), self.varying)


def _lower(
    rule_of: SignatureOf, eqn: Equation, operands: Sequence[Any], local: Local
) -> tuple[Any, ...]:
    """The call on blocks: its own body and its own derivative, both on blocks."""
    body, derivative = _programs(eqn)
    classes = _classes(rule_of, eqn)
    sizes = {
        classes.find(dim): size
        for value, block in zip(body.inputs, operands, strict=True)
        for dim, size in zip(_dims("body", body, value), jnp.shape(block), strict=True)
    }
    blocks = _Blocks(rule_of=rule_of, classes=classes, sizes=sizes, varying=local.varying)

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
