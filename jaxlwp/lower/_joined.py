"""Small sums over devices that are ready together are one sum.

A normalisation adds up its values and their squares. XLA would put two such sums together by
itself, late: in kernels of their own that write the operands side by side and take the results
apart, three for each normalisation. Put together here, before it fuses, they cost none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxlwp.lower._steps import AddUp, Block, Items, Region, Step

MOST_ELEMENTS = 1 << 14
"""Of an operand that is put together with others: writing it once more takes no time."""


def joined(items: Items) -> tuple[Step | Region, ...]:
    """The steps, small sums of a layer that do not wait for one another as one step."""
    result: list[Step | Region] = []
    group = _Group()
    for item in items:
        if isinstance(item, Region):
            result += group.closed()
            result.append(replace(item, items=joined(item.items)))
            continue
        if group.sums and item.layer != group.sums[0].layer:
            result += group.closed()
        waits = not group.late.isdisjoint(item.operands)
        if _is_small_sum(item):
            if waits or not group.takes(item):
                result += group.closed()
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

    sums: list[Step] = field(default_factory=list)
    waiting: list[Step] = field(default_factory=list)
    late: set[Block] = field(default_factory=set)

    def takes(self, step: Step) -> bool:
        """Whether a sum is over the same axes, of the same dtype, and varies alike."""
        return not self.sums or _alike(step) == _alike(self.sums[0])

    def closed(self) -> Sequence[Step]:
        """The steps of the group, which is empty then."""
        steps = [_together(self.sums), *self.waiting] if self.sums else []
        self.sums, self.waiting, self.late = [], [], set()
        return steps


def _is_small_sum(step: Step) -> bool:
    return isinstance(step.op, AddUp) and math.prod(step.operands[0].shape) <= MOST_ELEMENTS


def _alike(step: Step) -> object:
    block = step.operands[0]
    return step.op, str(block.dtype), block.varying


def _together(sums: Sequence[Step]) -> Step:
    operands = tuple(block for step in sums for block in step.operands)
    results = tuple(block for step in sums for block in step.results)
    return Step(sums[0].op, operands, results, sums[0].layer)
