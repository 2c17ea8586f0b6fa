"""The program of one device as data: its steps in order, every collective among them.

Steps are operators on blocks, moves from one layout to another, halo exchanges, sums of partial
results, padding. `_build` makes them of a graph and one config per layer, `_lower` carries them
out, `jaxlwp.cost` reads off what they communicate. What is priced is what runs, since it is the
same list.

*Nothing is done twice.* A step is known by what it does and by the blocks that it reads; one that
is there already is not added again. So a tensor that several layers read in one layout is brought
into it once, operators that read one tensor through one window share one halo exchange, and work
that is evaluated where it is read (`Draft`, "lazy") is evaluated once for all who read it alike.

*Checkpoints.* What is made inside a call of `jax.checkpoint` is not there after it, except for what
others read (`Region`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxlwp.lower._halo import Halo
from jaxlwp.ops import RULES, Labels
from jaxlwp.program import Border, Checkpoint, Equation
from jaxlwp.space import (
    Layout,
    Move,
    layout_axes,
)

AxisSizes = tuple[tuple[str, int], ...]
"""Names and sizes of the mesh axes."""


@dataclass(frozen=True, eq=False)
class Block:
    """What one device holds of a value; each is made by one step, or given.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      varying: mesh axes over which devices use different ones, or use one differently.
    """

    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset[str]


# --- what a step does -----------------------------------------------------------------------------


class Op:
    """What a step does; equal ones of equal operands make equal results."""

    @property
    def plain(self) -> Op:
        """The same, as regards data: it may differ in the axes over which results are varying."""
        return self


@dataclass(frozen=True)
class Change(Op):
    """One move of a change of layout.

    Attributes:
      move: the move.
      before: layout before.
      shape: global shape.
      axes: the mesh axes.
    """

    move: Move
    before: Layout
    shape: tuple[int, ...]
    axes: AxisSizes

    @property
    def plain(self) -> Op:
        """See `Op`."""
        return replace(self, move=replace(self.move, varying=False))


@dataclass(frozen=True)
class Fill(Op):
    """Replaces padding: by a number, or by the second operand (a scalar)."""

    shape: tuple[int, ...]
    layout: Layout
    axes: AxisSizes
    value: Any


@dataclass(frozen=True)
class Spread(Op):
    """Broadcasts a block to a shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slice(Op):
    """Cuts rows out of a block, along a dimension: those that are sent."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Receive(Op):
    """Receives what the device `step` to the left sends, in a ring or not.

    Its operand is what is sent: rows along a dimension that `parts` devices split.
    """

    dim: int
    axes: tuple[str, ...]
    parts: int
    step: int
    ring: bool


@dataclass(frozen=True)
class Assemble(Op):
    """Puts received rows and one's own block together, and cuts out what the operator reads.

    Its operands are the pieces, which begin at the rows `starts`, and what fills the padding unless
    `value` does.
    """

    dim: int
    axes: tuple[str, ...]
    halo: Halo
    starts: tuple[int, ...]
    value: Any


@dataclass(frozen=True)
class Extend(Op):
    """Puts an array's border around it, along a dimension that is not split."""

    dim: int
    border: Border


@dataclass(frozen=True)
class Dilate(Op):
    """Puts zeros between rows, and around them, as each device needs them."""

    dim: int
    axes: tuple[str, ...]
    halo: Halo


@dataclass(frozen=True)
class AddUp(Op):
    """Adds up partial results, those of several operands in one go."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Vary(Op):
    """Marks blocks as varying over mesh axes, as one vector; so their cotangents are added up."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Filter(Op):
    """Reads a filter, whose gradient is made a vector; see `turned`."""

    kept: bool


@dataclass(frozen=True)
class Operate(Op):
    """Evaluates an operator on blocks.

    Attributes:
      position: of its equation in the program.
      layouts: of the results.
      haloed: see `Local`; by position of the dimension in the first operand.
      reduced_axes: see `Local`.
      varying: see `Local`.
      axes: the mesh axes.
      eqn: the equation.
      names: labels of the first operand.
    """

    position: int
    layouts: tuple[Layout, ...]
    haloed: tuple[tuple[int, tuple[int, int, int]], ...]
    reduced_axes: tuple[str, ...]
    varying: tuple[str, ...]
    axes: AxisSizes
    eqn: Equation = field(compare=False, repr=False)
    names: Labels = field(compare=False)

    @property
    def combines(self) -> bool:
        """Its lowering combines partial results over the mesh itself."""
        rule = RULES.get(self.eqn.name)
        return bool(self.reduced_axes) and rule is not None and rule.combines

    @property
    def plain(self) -> Op:
        """See `Op`."""
        split = frozenset(axis for layout in self.layouts for axis in layout_axes(layout))
        needed = split.union(self.reduced_axes)
        return replace(self, varying=tuple(axis for axis in self.varying if axis in needed))


@dataclass(frozen=True)
class Again(Op):
    """Takes what another step has received (the second operand) as if it had done `op` itself."""

    op: Op

    @property
    def plain(self) -> Op:
        """See `Op`."""
        return self.op.plain


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    Attributes:
      op: what it does.
      operands: the blocks that it reads.
      results: the blocks that it makes.
      layer: index of the layer for which it is done, the first one that wants it; None for the
        function's outputs.
    """

    op: Op
    operands: tuple[Block, ...]
    results: tuple[Block, ...]
    layer: int | None


@dataclass(frozen=True, eq=False)
class Region:
    """The steps of one call of `jax.checkpoint`, and those of its results that others read."""

    call: Checkpoint
    items: tuple[Step | Region, ...]
    kept: tuple[Block, ...]


Items = Sequence["Step | Region"]


def every_step(items: Items) -> Iterator[Step]:
    """All steps in order, those in regions too."""
    for item in items:
        if isinstance(item, Region):
            yield from every_step(item.items)
        else:
            yield item


@dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """What one device evaluates.

    Attributes:
      inputs: blocks that are given, the function's arguments.
      constants: blocks that are known, and their values.
      items: the steps.
      outputs: the results.
      values: block -> index of the value of the graph's program that it is made for, for the
        results of operators that belong to a layer.
    """

    inputs: tuple[Block, ...]
    constants: dict[Block, Any]
    items: tuple[Step | Region, ...]
    outputs: tuple[Block, ...]
    values: dict[Block, int]
