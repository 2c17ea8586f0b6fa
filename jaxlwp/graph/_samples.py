"""Which dimension is the sample: the leading one of the batch, followed through the program.

Under `jax.vmap` the batch ends up in any place: `W @ x` puts it behind the weight's rows. What
tells it is where it comes from. Dimensions that operators map to each other are one class; a class
with the leading dimension of an argument of the batch, and no dimension of a parameter, is the
sample. (Running statistics are arguments too, but their dimensions are those of parameters.)
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

from jaxlwp.ops import RULES, Labels, rule_of
from jaxlwp.program import Equation, Program

Dim = tuple[int, int]
"""A dimension: the index of a value of the program, and its position."""

REARRANGED = ("concat", "split", "slice", "pad", "sort", "reverse", "cumulative")
"""Kinds of operators along whose dimensions elements change places, but that leave them what they
are, though they cannot be split."""


class Samples:
    """The dimensions of a program's values that are samples, and those that cannot be.

    Attributes:
      found: there is a sample dimension at all.
    """

    def __init__(self, program: Program, num_parameters: int) -> None:
        self._parent: dict[Dim, Dim] = {}
        for eqn in program.equations:
            self._relate(eqn)
        parameters, batch = program.inputs[:num_parameters], program.inputs[num_parameters:]
        shapes = [value.shape for value in program.values]
        self._of_parameters = {
            self._find((i, d)) for i in parameters for d in range(len(shapes[i]))
        }
        # A random key has a leading dimension as well, but none that a result of the network has.
        made = {
            self._find((i, d))
            for i in _computed(program, parameters)
            for d in range(len(shapes[i]))
        }
        leading = [(self._find((i, 0)), math.prod(shapes[i])) for i in batch if shapes[i]]
        leading = [(c, size) for c, size in leading if c in made and c not in self._of_parameters]
        counts = collections.Counter(c for c, _ in leading)
        largest = {c: max(size for other, size in leading if other == c) for c in counts}
        ranked = sorted(counts, key=lambda c: (counts[c], largest[c]), reverse=True)
        self._rank = {c: n for n, c in enumerate(ranked)}
        self.found = bool(ranked)

    def rank(self, value: int, dim: int) -> int | None:
        """0 for the sample, more for leading dimensions of fewer arguments, None for all others."""
        return self._rank.get(self._find((value, dim)))

    def excluded(self, value: int, dim: int) -> bool:
        """Whether the dimension is one of parameters, in a program that has samples elsewhere."""
        return self.found and self._find((value, dim)) in self._of_parameters

    def _find(self, dim: Dim) -> Dim:
        root = dim
        while (above := self._parent.get(root, root)) != root:
            root = above
        while dim != root:  # the next search is shorter
            self._parent[dim], dim = root, self._parent.get(dim, dim)
        return root

    def _relate(self, eqn: Equation) -> None:
        """Unite the dimensions that an operator maps to each other."""
        first: dict[str, Dim] = {}
        tensors = (*eqn.operands, *eqn.results)
        for value, labels in zip(tensors, _labels(eqn), strict=True):
            for dim, label in enumerate(labels):
                if label is not None:
                    self._parent[self._find((value, dim))] = self._find(
                        first.setdefault(label, (value, dim))
                    )


def _labels(eqn: Equation) -> Sequence[Labels]:
    """Labels of an equation's operands and results that say more than where it can be split."""
    found, values = rule_of(eqn), (*eqn.operand_values, *eqn.result_values)
    if found is None:
        # What changes no shape, whatever it does, most likely keeps the dimensions' meaning.
        like = eqn.result_values[0].shape
        return [
            tuple(map(str, range(len(like)))) if v.shape == like else (None,) * len(v.shape)
            for v in values
        ]
    labels = (*found[1].operands, *found[1].results)
    if RULES[eqn.name].kind not in REARRANGED or any(len(x) != len(labels[0]) for x in labels if x):
        return labels
    return [tuple(x or f"{d}" for d, x in enumerate(each)) for each in labels]


def _computed(program: Program, inputs: Sequence[int]) -> set[int]:
    """The values that depend on some of the inputs."""
    found = set(inputs)
    for eqn in program.equations:
        if found.intersection(eqn.operands):
            found.update(eqn.results)
    return found
