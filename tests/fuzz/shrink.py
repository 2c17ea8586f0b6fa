"""Makes what fails small: fewer operators, smaller arrays, simpler choices, fewer splits.

A smaller case counts if a finding of the same kind is left. The configs of a failing strategy go
along by the order and kind of layers; a few random strategies are tried besides, since another
graph may need another strategy to fail.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import jaxlwp

from . import checks, programs, strategies
from .checks import Case, Finding
from .operators import Unfit
from .programs import Program
from .strategies import MeshCase, Splits

SECONDS = 120.0
"""How long one case is made smaller."""

TOGETHER = 6
"""Smaller strategies that are tried in one compiled program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A case that fails under one strategy.

    Attributes:
      case: with that strategy alone, named "pinned".
      finding: what is left.
      steps: operators of the program.
    """

    case: Case
    finding: Finding

    @property
    def steps(self) -> int:
        return len(self.case.written.program.steps)


def shrink(
    case: Case,
    finding: Finding,
    mark: Callable[[str], None] = lambda stage: None,
    seconds: float = SECONDS,
) -> Small:
    """The smallest case found with a finding of the same kind."""
    end = time.monotonic() + seconds
    chosen = case.strategies.get(finding.strategy)
    only = {"pinned": chosen} if chosen is not None else {}
    best = Small(case=dataclasses.replace(case, strategies=only), finding=finding)
    again = True
    while again and time.monotonic() < end:
        again = False
        for candidate in _candidates(best.case):
            if time.monotonic() > end:
                break
            mark("shrink")
            found = _fails(candidate, best)
            if found is not None:
                best, again = found, True
                break
    return best


def _candidates(case: Case) -> Iterator[Case]:
    """Smaller cases, the boldest first."""
    for program in _programs(case.written.program):
        try:
            written = programs.write(program)
        except (Unfit, KeyError):
            continue
        yield dataclasses.replace(case, written=written)
    used = {
        axis
        for one in case.strategies.values()
        for s in one.values()
        for a in s.values()
        for axis in a
    }
    for mesh in _meshes(case.mesh, used):
        yield dataclasses.replace(case, mesh=mesh)
    for splits in case.strategies.values():
        fewer = list(_fewer(splits))
        for start in range(0, len(fewer), TOGETHER):
            tried = enumerate(fewer[start : start + TOGETHER])
            yield dataclasses.replace(case, strategies={f"fewer{n}": one for n, one in tried})


def _programs(program: Program) -> Iterator[Program]:
    """A program with a step, an output, a term of the loss, or a choice less."""
    change = dataclasses.replace
    for form in ("block", "unused", "outputs"):
        if getattr(program, form):
            yield change(program, **{form: None if form == "block" else ()})
    if program.batch_gradients:
        yield change(program, batch_gradients=False)
    if program.evaluated == "replicated":
        yield change(program, evaluated="made")
    for step in reversed(program.steps):
        yield _without(program, step.number)
    for n in range(len(program.losses)):
        if len(program.losses) > 1:
            yield _pruned(change(program, losses=program.losses[:n] + program.losses[n + 1 :]))
    for n, (name, form) in enumerate(program.losses):
        if form != "square":
            terms = (*program.losses[:n], (name, "square"), *program.losses[n + 1 :])
            yield change(program, losses=terms)
    for n in range(len(program.outputs)):
        yield change(program, outputs=program.outputs[:n] + program.outputs[n + 1 :])
    for n, given in enumerate(program.inputs):
        for d, size in enumerate(given.shape):
            for less in (1, 2, 3, 5, 7):
                if less < size:
                    shape = (*given.shape[:d], less, *given.shape[d + 1 :])
                    inputs = list(program.inputs)
                    inputs[n] = change(given, shape=shape)
                    yield change(program, inputs=tuple(inputs))
    for n, step in enumerate(program.steps):
        for key, _ in step.choices:
            kept = tuple(pair for pair in step.choices if pair[0] != key)
            steps = (*program.steps[:n], change(step, choices=kept), *program.steps[n + 1 :])
            yield change(program, steps=steps)


def _without(program: Program, number: int) -> Program:
    """Without a step: what read its result reads its first operand."""
    gone = next(step for step in program.steps if step.number == number)
    name, instead = f"v{number}", gone.operands[0]

    def renamed(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((instead if v == name else v, form) for v, form in pairs))

    steps = tuple(
        dataclasses.replace(
            step, operands=tuple(instead if v == name else v for v in step.operands)
        )
        for step in program.steps
        if step.number != number
    )
    return _pruned(
        dataclasses.replace(
            program, steps=steps, losses=renamed(program.losses), outputs=renamed(program.outputs)
        )
    )


def _pruned(program: Program) -> Program:
    """Without steps and inputs that nothing reads."""
    wanted = {name for name, _ in (*program.losses, *program.outputs)}
    steps = []
    for step in reversed(program.steps):
        if f"v{step.number}" in wanted:
            steps.append(step)
            wanted.update(step.operands)
    inputs = tuple(given for given in program.inputs if given.name in wanted)
    return dataclasses.replace(program, steps=tuple(reversed(steps)), inputs=inputs)


def _meshes(mesh: MeshCase, used: set[str]) -> Iterator[MeshCase]:
    """A mesh without an axis that splits nothing, or with simpler habits."""
    change = dataclasses.replace
    for n, name in enumerate(mesh.names):
        if name not in used and len(mesh.names) > 1:
            shape = (*mesh.shape[:n], *mesh.shape[n + 1 :])
            names = (*mesh.names[:n], *mesh.names[n + 1 :])
            yield change(mesh, shape=shape, names=names, devices=tuple(range(math.prod(shape))))
    if mesh.devices != tuple(range(len(mesh.devices))):
        yield change(mesh, devices=tuple(range(len(mesh.devices))))
    for habit in ("explicit", "entered", "placed", "checked_first", "turned"):
        if getattr(mesh, habit):
            yield change(mesh, **{habit: False})


def _fewer(splits: Splits) -> Iterator[Splits]:
    """A strategy that splits less."""
    for layer, split in splits.items():
        if split:
            yield {**splits, layer: {}}
    for layer, split in splits.items():
        for dimension, axes in split.items():
            for axis in axes:
                left = tuple(a for a in axes if a != axis)
                fewer = {**split, dimension: left} if left else _less(split, dimension)
                if fewer:
                    yield {**splits, layer: fewer}


def _less(split: dict[str, Any], dimension: str) -> dict[str, Any]:
    return {name: axes for name, axes in split.items() if name != dimension}


def _fails(candidate: Case, before: Small) -> Small | None:
    """The candidate, if a finding of the same kind is left."""
    try:
        reference = checks.evaluate(candidate.written)
    except Exception:
        return None
    if reference is None:
        return None
    same_program = candidate.written is before.case.written
    if candidate.strategies and not same_program:
        try:
            tried = _carried(candidate, before.case)
        except Exception:  # no graph: the trace itself may be what fails
            tried = {}
        candidate = dataclasses.replace(candidate, strategies=tried)
    outcome = checks.check(candidate, reference, drawn_from=1, searches=False)
    for finding in outcome.findings:
        if finding.kind == before.finding.kind and _cause(finding) == _cause(before.finding):
            chosen = outcome.case.strategies.get(finding.strategy)
            only = {"pinned": chosen} if chosen is not None else {}
            small = dataclasses.replace(outcome.case, strategies=only)
            return Small(case=small, finding=finding)
    return None


def _cause(finding: Finding) -> str:
    """What must stay the same: the error of an exception, nothing more of numbers and prices."""
    return finding.group if finding.kind in ("crash", "refused") else ""


def _carried(candidate: Case, before: Case) -> dict[str, Splits]:
    """The strategies of one program for another, and a few random ones."""
    graphs = [_graph(case) for case in (before, candidate)]
    old, new = ([(layer.kind, *layer.dimensions) for layer in graph.layers] for graph in graphs)
    sizes = dict(zip(candidate.mesh.names, candidate.mesh.shape, strict=True))
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    pairs = {
        graphs[1].layers[b.b + n].name: graphs[0].layers[b.a + n].name
        for b in matcher.get_matching_blocks()
        for n in range(b.size)
    }
    result = {}
    for name, splits in before.strategies.items():
        result[name] = {
            layer.name: dict(
                jaxlwp.Config.of(splits.get(pairs.get(layer.name, ""), {}))
                .within(layer.dimensions, layer.even, sizes)
                .splits
            )
            for layer in graphs[1].layers
        }
    rng = random.Random(0)
    drawn = strategies.draw_strategies(rng, graphs[1], sizes, 2)
    return result | {f"random{n}": splits for n, splits in enumerate(drawn)}


def _graph(case: Case) -> jaxlwp.graph.ComputationGraph:
    return checks.trace(case.written)
