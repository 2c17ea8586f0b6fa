"""Layers that are alike are traced, and differentiated, once.

Deep networks repeat their layers, and JAX takes a millisecond for each operator that it
differentiates. Steps that follow each other in a layer, and occur again in another one, are one
function here, whose derivative JAX keeps. The program is the same, once its calls are inlined.

This is for programs that are only looked at. One that runs would call a function with a collective
from several places, and all of these collectives would have one channel.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlwp.lower import (
    Block,
    DeviceProgram,
    Made,
    Operate,
    Step,
    carry_out,
    every_step,
    step_groups,
)
from jaxlwp.program import CUSTOM, Program

RUN_SCOPE = "jaxlwp.run"
"""Name scope of a run, before its index."""

Mark = Callable[[Any, str], Any]
"""`mark(x, name)`: the block, marked by a name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Steps of a layer that follow each other.

    Attributes:
      steps: the steps.
      inputs: blocks that they read and do not make, constants left out.
      results: blocks that they make.
      outputs: those of the results that others read.
      key: equal for runs that do the same.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Block, ...]
    results: tuple[Block, ...]
    outputs: tuple[Block, ...]
    key: Hashable


class AlikeLayers:
    """Evaluates a program's steps: runs that occur several times by one function for all of them.

    Args:
      program: the program.
      mark: marks what operators make by the index of its value in the graph's program; None does
        not.
      alike: False evaluates all steps one by one.
    """

    def __init__(self, program: DeviceProgram, mark: Mark | None, alike: bool) -> None:
        self.program, self.mark = program, mark
        read = Counter(block for step in every_step(program.items) for block in step.operands)
        read.update(program.outputs)
        groups = [list(group) for layer, group in step_groups(program.items) if layer != -1]
        runs = [run for group in groups for run in self.runs(group, read)] if alike else []
        several = Counter(run.key for run in runs)
        self.repeated = [run for run in runs if several[run.key] > 1]
        self.index = {run.steps[0]: n for n, run in enumerate(self.repeated)}
        self.functions: dict[Hashable, Any] = {}

    def runs(self, steps: Iterable[Step], read: Counter[Block]) -> Iterator[Run]:
        """The runs of one layer: between calls with a derivative of their own."""
        for comparable, group in itertools.groupby(steps, _comparable):
            if not comparable:
                continue
            run = tuple(group)
            results = tuple(block for step in run for block in step.results)
            inside = Counter(block for step in run for block in step.operands)
            given = {*self.program.constants, *results}
            inputs = tuple(block for block in inside if block not in given)
            outputs = tuple(block for block in results if read[block] > inside[block])
            key = _key(run, inputs, results, outputs, self.program)
            if key is not None:
                yield Run(steps=run, inputs=inputs, results=results, outputs=outputs, key=key)

    def __call__(self, steps: Iterable[Step], made: Made) -> None:
        """Carry out the steps of one layer, adding to `made`."""
        left = list(steps)
        while left:
            index = self.index.get(left[0])
            if index is None:
                self.alone(left.pop(0), made)
                continue
            run = self.repeated[index]
            if run.key not in self.functions:
                self.functions[run.key] = jax.jit(self.function(run))
            with jax.named_scope(f"{RUN_SCOPE}{index}"):
                results = self.functions[run.key](*(made[block] for block in run.inputs))
            made.update(zip(run.outputs, results, strict=True))
            del left[: len(run.steps)]

    def alone(self, step: Step, made: Made) -> None:
        """Carry out one step; what it makes is marked by its value."""
        carry_out([step], made)
        for block in step.results:
            if self.mark and block in self.program.values:
                made[block] = self.mark(made[block], str(self.program.values[block]))

    def function(self, run: Run) -> Callable[..., tuple[Any, ...]]:
        """The run as a function; what it makes is marked by its place among the results."""
        names = {block: f"#{n}" for n, block in enumerate(run.results)}

        def function(*inputs: Any) -> tuple[Any, ...]:
            made: Made = {**self.program.constants, **dict(zip(run.inputs, inputs, strict=True))}
            for step in run.steps:
                carry_out([step], made)
                for block in step.results:
                    if self.mark and block in self.program.values:
                        made[block] = self.mark(made[block], names[block])
            return tuple(made[block] for block in run.outputs)

        return function

    def with_values(self, program: Program) -> Program:
        """The traced program, in which all marks name the values."""

        def named(eqn: Any) -> Any:
            if eqn.name != "name" or not eqn.params["name"].startswith("#"):
                return eqn
            run = self.repeated[int(re.findall(rf"{RUN_SCOPE}(\d+)", eqn.scope)[-1])]
            block = run.results[int(eqn.params["name"][1:])]
            name = str(self.program.values[block])
            return replace(eqn, params={**eqn.params, "name": name})

        return replace(program, equations=tuple(map(named, program.equations)))


def _comparable(step: Step) -> bool:
    """Not a call with a derivative of its own: the functions in it are new ones in each layer."""
    return not (isinstance(step.op, Operate) and step.op.eqn.name in CUSTOM)


def _key(
    steps: tuple[Step, ...],
    inputs: tuple[Block, ...],
    results: tuple[Block, ...],
    outputs: tuple[Block, ...],
    program: DeviceProgram,
) -> Hashable | None:
    """What a run does, whatever its blocks are called; None if that cannot be compared."""
    place = {block: n for n, block in enumerate((*inputs, *results))}

    def operand(block: Block) -> Hashable:
        if block in place:
            return place[block]
        constant = np.asarray(program.constants[block])
        return str(constant.dtype), constant.shape, constant.tobytes()

    blocks = tuple((block.shape, str(block.dtype), block.varying) for block in (*inputs, *results))
    done = tuple(
        (_meaning(step.op), tuple(map(operand, step.operands)), len(step.results)) for step in steps
    )
    marked = tuple(block in program.values for block in results)
    key = blocks, done, marked, tuple(place[block] for block in outputs)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _meaning(op: Any) -> Hashable:
    """What a step does, whichever equation it is of."""
    if not isinstance(op, Operate):
        return type(op), op
    eqn = op.eqn
    params = tuple(sorted(eqn.params.items()))
    values = eqn.operand_values, eqn.result_values, tuple(eqn.borders.items())
    return replace(op, position=0), op.names, eqn.primitive, params, values
