"""What several steps receive is received once, whatever becomes of its gradients.

A reader that is active over an axis over which its operand is not split returns a partial gradient
on each device, so its block is *varying* over that axis. Two readers that differ in this alone
receive the same data, whose gradients come back on different ways. `received_once` lets the second
take what the first has received (`Again`); only its transpose is its own. Without that it would be
for the compiler to find out.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxlwp.lower._steps import (
    AddUp,
    Again,
    Block,
    Change,
    Items,
    Op,
    Operate,
    Receive,
    Region,
    Step,
    every_step,
)


def receives(op: Op) -> bool:
    """Whether a step's data come from other devices, forward."""
    if isinstance(op, Change):
        return op.move.kind in ("all_to_all", "all_gather", "permute")
    return isinstance(op, (Receive, AddUp))


def received_once(items: Items) -> tuple[Step | Region, ...]:
    """The steps, those that receive the same data as an earlier one taking what that received."""
    groups = _groups(items)
    if all(len(group) == 1 for group in groups.values()):
        return tuple(items)
    return _Sharing(items, groups).rewritten(items)


def _groups(items: Items) -> dict[Step, list[Step]]:
    """Steps that receive, each with those that receive the same while it is there."""
    groups: dict[Step, list[Step]] = {}
    numbers: dict[Any, int] = {}
    data: dict[Block, Any] = {}  # equal for blocks that hold the same data

    def number(key: Any) -> int:
        return numbers.setdefault(key, len(numbers))

    def of(block: Block) -> Any:
        return data.get(block, block)

    def visit(items: Items, seen: ChainMap[int, Step]) -> None:
        for item in items:
            if isinstance(item, Region):
                visit(item.items, seen.new_child())
                continue
            if isinstance(item.op, Change) and item.op.move.kind == "cast":
                data[item.results[0]] = of(item.operands[0])
                continue
            key = number((item.op.plain, tuple(map(of, item.operands))))
            for n, block in enumerate(item.results):
                data[block] = number((key, n))
            if receives(item.op):
                first = seen.setdefault(key, item)
                groups.setdefault(first, []).append(item)

    visit(items, ChainMap())
    return groups


class _Sharing:
    """Puts one step that receives before each group of steps that receive the same."""

    def __init__(self, items: Items, groups: Mapping[Step, Sequence[Step]]) -> None:
        self.producers = {b: step for step in every_step(items) for b in step.results}
        self.several = {
            step: group for group in groups.values() if len(group) > 1 for step in group
        }
        self.received: dict[Step, Block] = {}  # by the first of a group
        self.bare: dict[Block, Block] = {}

    def rewritten(self, items: Items) -> tuple[Step | Region, ...]:
        result: list[Step | Region] = []
        for item in items:
            if isinstance(item, Region):
                result.append(self.region(item))
            elif item in self.several:
                result += self.shared(item)
            else:
                result.append(item)
        return tuple(result)

    def region(self, region: Region) -> Region:
        outside = dict(self.bare)
        items = self.rewritten(region.items)
        # What was made inside is not there any more, but for the blocks that are kept. Of what was
        # made further inside, `rewritten` has come by here already.
        self.bare = outside
        for item in region.items:
            if isinstance(item, Step):
                for block in item.results:
                    self.producers.pop(block)
        return replace(region, items=items)

    def shared(self, step: Step) -> list[Step]:
        """A step of a group, and what has to come before it."""
        added: list[Step] = []
        first = self.several[step][0]
        if first not in self.received:
            operand = self.untyped(step.operands[0], added)
            varying = operand.varying
            axes = _gathered(step.op)
            block = replace(step.results[0], varying=varying.difference(axes))
            added.append(Step(step.op.plain, (operand,), (block,), step.layer))
            self.received[first] = block
        block = self.received[first]
        if not block.varying <= step.results[0].varying:
            return [*added, step]
        again = Step(Again(step.op), (*step.operands, block), step.results, step.layer)
        self.producers[step.results[0]] = again
        return [*added, again]

    def untyped(self, block: Block, added: list[Step]) -> Block:
        """A block of the same data that is varying over no more axes than it must be."""
        if block not in self.bare:
            self.bare[block] = self._untyped(block, added)
        return self.bare[block]

    def _untyped(self, block: Block, added: list[Step]) -> Block:
        step = self.producers.get(block)
        if step is None:
            return block
        if isinstance(step.op, Again):
            return step.operands[1]
        if isinstance(step.op, Change) and step.op.move.kind == "cast":
            return self.untyped(step.operands[0], added)
        if receives(step.op):
            return block
        plain = step.op.plain
        if isinstance(plain, Operate) and block.varying <= frozenset(plain.varying):
            return block  # of a layer: its results vary over the axes of its layout alone
        operands = tuple(self.untyped(operand, added) for operand in step.operands)
        if operands == step.operands and plain == step.op:
            return block
        varying = frozenset[str]().union(*(operand.varying for operand in operands))
        if isinstance(plain, Operate):
            varying |= frozenset(plain.varying)
        elif isinstance(plain, Change):
            varying |= frozenset(plain.move.axes)
        results = tuple(replace(result, varying=varying) for result in step.results)
        added.append(Step(plain, operands, results, step.layer))
        self.bare.update(zip(step.results, results, strict=True))
        return results[step.results.index(block)]


def _gathered(op: Op) -> tuple[str, ...]:
    """Mesh axes over which the result is the same on all devices, though the operand is not."""
    if isinstance(op, AddUp):
        return op.axes
    return op.move.axes if isinstance(op, Change) and op.move.kind == "all_gather" else ()
