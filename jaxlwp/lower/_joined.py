"""Small sums over devices that are ready together are one sum.

A normalisation adds up its values and their squares, and in the backward pass what reaches its mean
and its scale. XLA would put two such sums together by itself, late: in kernels of their own that
write the operands side by side and take the results apart, three for each pair. Put together here,
before it fuses, they cost none.

A sum of cotangents is the transpose of a block's becoming varying. So blocks that become varying
together, as one vector, have one sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxlwp.lower._steps import AddUp, Block, Change, Items, Op, Operate, Region, Step, Vary

MOST_ELEMENTS = 1 << 14
"""Of an operand that is put together with others: writing it once more takes no time."""


def joined(items: Items, *, backward: bool) -> tuple[Step | Region, ...]:
    """The steps, small sums of a layer that do not wait for one another as one step.

    Args:
      items: steps in order.
      backward: sums of cotangents too.
    """
    result: list[Step | Region] = []
    group, layer = _Group(), None
    summed: set[Block] = set()  # what is made of the layer's sums
    for item in items:
        if isinstance(item, Region):
            result += group.closed()
            result.append(replace(item, items=joined(item.items, backward=backward)))
            continue
        if item.layer != layer:
            result += group.closed()
            layer = item.layer
            summed.clear()
        waits = not group.late.isdisjoint(item.operands)
        op = _sum_of(item, summed if backward else set())
        made = isinstance(item.op, Operate) and not summed.isdisjoint(item.operands)
        if made or isinstance(item.op, AddUp):
            summed.update(item.results)
        if op is not None:
            if waits or not group.takes(op, item):
                result += group.closed()
            group.op = op
            group.sums.append(item)
            group.late.update(item.results)
        elif waits:
            group.waiting.append(item)
            group.late.update(item.results)
        else:
            result.append(item)
    return (*result, *group.closed())


@dataclass
class _Group:
    """Sums that are put together, the steps that wait for them, and what all of these make."""

    op: Op | None = None
    sums: list[Step] = field(default_factory=list)
    waiting: list[Step] = field(default_factory=list)
    late: set[Block] = field(default_factory=set)

    def takes(self, op: Op, step: Step) -> bool:
        """Whether a sum is over the same axes, of the same dtype, and varies alike."""
        if not self.sums:
            return True
        first, block = self.sums[0].operands[0], step.operands[0]
        alike = str(block.dtype) == str(first.dtype) and block.varying == first.varying
        return alike and op == self.op

    def closed(self) -> Sequence[Step]:
        """The steps of the group, which is empty then."""
        steps = [_together(self.op, self.sums), *self.waiting] if self.op else []
        self.op, self.sums, self.waiting, self.late = None, [], [], set()
        return steps


def _sum_of(step: Step, summed: set[Block]) -> Op | None:
    """What a small sum is together with others; None for other steps.

    Args:
      step: the step.
      summed: what is made of the layer's sums. Only of these the cotangents are added up here:
        those of arguments are gradients, which are added up in buckets.
    """
    if not step.operands or math.prod(step.operands[0].shape) > MOST_ELEMENTS:
        return None
    if isinstance(step.op, AddUp):
        return step.op
    if isinstance(step.op, Change) and step.op.move.kind == "cast":
        return Vary(step.op.move.axes) if step.operands[0] in summed else None
    return None


def _together(op: Op, sums: Sequence[Step]) -> Step:
    if len(sums) == 1:
        return sums[0]
    operands = tuple(block for step in sums for block in step.operands)
    results = tuple(block for step in sums for block in step.results)
    return Step(op, operands, results, sums[0].layer)
