"""Programs inside an operator (the body of a scan, a function with a derivative of its own).

Which of their dimensions can be split, and their evaluation on one device's blocks. A dimension
that a program merely maps (no reduction, window or index touches it) can be split: each device then
evaluates the program on its block, without communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlwp.mesh import vary
from jaxlwp.ops._rule import Labels, Local, Rule, Signature
from jaxlwp.program import Checkpoint, Equation, Program, inner_jaxprs

Dim = tuple[str, int, int]
"""A dimension of a value of a program: program, value, position."""

SignatureOf = Callable[[Equation], tuple[Rule, Signature] | None]

_COMBINERS = ("scatter", "reduce", "select_and")
"""Operators whose inner program combines two elements: evaluated like any other."""


class Classes:
    """Dimensions that must be split together, and whether they can be.

    Attributes:
      closed: an equation cannot be evaluated on blocks; nothing can be split.
    """

    def __init__(self) -> None:
        self.parent: dict[Dim, Dim] = {}
        self.blocked: set[Dim] = set()
        self.closed = False

    def find(self, dim: Dim) -> Dim:
        """What stands for the dimension's class."""
        while self.parent.setdefault(dim, dim) != dim:
            dim = self.parent[dim]
        return dim

    def union(self, a: Dim, b: Dim) -> None:
        """The two are split together."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a
            if b in self.blocked:
                self.blocked.add(a)

    def block(self, dim: Dim) -> None:
        """The dimension cannot be split."""
        self.blocked.add(self.find(dim))

    def can_split(self, dim: Dim) -> bool:
        """Whether it can."""
        return not self.closed and self.find(dim) not in self.blocked


def dims_of(name: str, program: Program, value: int) -> list[Dim]:
    """The dimensions of a program's value."""
    return [(name, value, d) for d in range(len(program.values[value].shape))]


def relate(
    classes: Classes, name: str, program: Program, rule_of: SignatureOf, *, cuts: bool
) -> None:
    """Unite the dimensions that a program's equations map to each other; block all others.

    Args:
      classes: where to.
      name: the program's.
      program: the program.
      rule_of: rule and signature of an equation.
      cuts: what is the same on every device (constants, iota, random bits) may be cut to blocks:
        it will be known where they begin (`Blocks.offsets`).
    """
    if not cuts:
        _block(classes, [dims_of(name, program, i) for i in program.constants], program)
    for eqn in program.equations:
        operands = [dims_of(name, program, i) for i in eqn.operands]
        results = [dims_of(name, program, i) for i in eqn.results]
        found = rule_of(eqn)
        if found is None:
            classes.closed |= is_closed(eqn)
            _block(classes, operands + results, program)
        elif made_whole(eqn, found[1]):
            _block(classes, operands if cuts else operands + results, program)
        else:
            _unite(classes, eqn, found[1], operands + results)


def is_closed(eqn: Equation) -> bool:
    """Whether an equation without a rule (`while`, `cond`) cannot read blocks.

    The programs in it were traced for values that are the same on all devices.
    """
    return bool(inner_jaxprs(eqn)) and not eqn.name.startswith(_COMBINERS)


def _block(classes: Classes, tensors: Sequence[Sequence[Dim]], program: Program) -> None:
    for dim in (dim for dims in tensors for dim in dims):
        _, value, position = dim
        if program.values[value].shape[position] > 1:
            classes.block(dim)


def _unite(
    classes: Classes, eqn: Equation, signature: Signature, tensors: Sequence[Sequence[Dim]]
) -> None:
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


def made_whole(eqn: Equation, signature: Signature) -> bool:
    """Whether the results (random bits, iota) are made whole, of whole operands, then cut."""
    return signature.role == "lazy" and not (eqn.operands and signature.names)


def labels_of(classes: Classes, dims: Sequence[Dim], shape: Sequence[int]) -> Labels:
    """A label for each dimension, the same for those of one class; None where it stays whole."""
    return tuple(
        "#" + "/".join(map(str, classes.find(dim))) if size > 1 and classes.can_split(dim) else None
        for dim, size in zip(dims, shape, strict=True)
    )


# --- evaluation on blocks ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How programs are evaluated on blocks.

    Attributes:
      rule_of: rule and signature of an equation.
      classes: which dimensions go together.
      sizes: class of dimensions -> size of the block.
      offsets: class of dimensions -> global index of the block's first element.
      varying: mesh axes over which the blocks vary.
    """

    rule_of: SignatureOf
    classes: Classes
    sizes: Mapping[Dim, int]
    offsets: Mapping[Dim, Any]
    varying: tuple[str, ...]

    def run(self, name: str, program: Program, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Evaluate a program, its operands blocks."""
        env: dict[int, Any] = {
            i: self.cut(self.vary(_array(c, program.values[i].dtype)), dims_of(name, program, i))
            for i, c in program.constants.items()
        }
        env.update(zip(program.inputs, operands, strict=True))
        self.evaluate(name, program, env, range(len(program.equations)), depth=0)
        return tuple(env[i] for i in program.outputs)

    def evaluate(
        self,
        name: str,
        program: Program,
        env: dict[int, Any],
        positions: Sequence[int],
        depth: int,
    ) -> None:
        """Evaluate equations in order.

        Args:
          name: the program's.
          program: the program.
          env: the values made so far.
          positions: of the equations in the program.
          depth: how many calls of `jax.checkpoint` around them are dealt with already.
        """

        def call_of(position: int) -> Checkpoint | None:
            calls = program.equations[position].checkpoints
            return calls[depth] if len(calls) > depth else None

        for call, group in itertools.groupby(positions, call_of):
            if call is not None:
                self.checkpoint(call, name, program, env, tuple(group), depth + 1)
                continue
            for eqn in (program.equations[position] for position in group):
                env.update(zip(eqn.results, self.apply(name, program, eqn, env), strict=True))

    def checkpoint(
        self,
        call: Checkpoint,
        name: str,
        program: Program,
        env: dict[int, Any],
        positions: Sequence[int],
        depth: int,
    ) -> None:
        """Evaluate the equations of a `jax.checkpoint`: only what others read is kept."""
        inside = frozenset(positions)
        wanted = set(program.outputs)
        for position, eqn in enumerate(program.equations):
            if position not in inside:
                wanted.update(eqn.operands)
        made = (value for i in positions for value in program.equations[i].results)
        kept = tuple(value for value in made if value in wanted)

        def body() -> list[Any]:
            inner = dict(env)
            self.evaluate(name, program, inner, positions, depth)
            return [inner[value] for value in kept]

        body = jax.checkpoint(body, policy=call.policy, prevent_cse=call.prevent_cse)
        env.update(zip(kept, body(), strict=True))

    def apply(
        self, name: str, program: Program, eqn: Equation, env: Mapping[int, Any]
    ) -> Sequence[Any]:
        """The results of one equation."""
        operands = [env[i] for i in eqn.operands]
        found = self.rule_of(eqn)
        if found is not None and not made_whole(eqn, found[1]):
            return found[0].lower(eqn, operands, self.local(name, program, eqn))
        results = eqn.bind(*operands)
        if not eqn.operands:
            results = tuple(map(self.vary, results))
        dims = (dims_of(name, program, i) for i in eqn.results)
        return [self.cut(x, d) for x, d in zip(results, dims, strict=True)]

    def local(self, name: str, program: Program, eqn: Equation) -> Local:
        """What the lowering of an equation may know."""
        classes = [
            [self.classes.find(dim) for dim in dims_of(name, program, i)] for i in eqn.results
        ]
        rank = len(eqn.operand_values[0].shape) if eqn.operands else 0
        return Local(
            names=(None,) * rank,
            result_shapes=tuple(
                tuple(self.sizes.get(dim, size) for dim, size in zip(dims, v.shape, strict=True))
                for dims, v in zip(classes, eqn.result_values, strict=True)
            ),
            places=lambda: tuple(
                tuple((self.offsets.get(dim, 0), None) for dim in dims) for dims in classes
            ),
            varying=self.varying,
        )

    def cut(self, x: Any, dims: Sequence[Dim]) -> Any:
        """The block of what is whole on every device; padding holds the last element."""
        for position, dim in enumerate(map(self.classes.find, dims)):
            size = self.sizes.get(dim, x.shape[position])
            if size != x.shape[position]:
                index = self.offsets[dim] + lax.iota(jnp.int32, size)
                x = jnp.take(x, index, axis=position, mode="clip")
        return x

    def vary(self, x: Any) -> Any:
        """What is the same on every device, varying over the axes over which blocks vary."""
        return vary(x, self.varying)


def _array(constant: Any, dtype: Any) -> Any:
    return jnp.asarray(constant, dtype) if isinstance(dtype, np.dtype) else constant
