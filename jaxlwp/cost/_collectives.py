"""The collectives of layers, edges and whole strategies, as data.

What a layer communicates under a config, and a change of layout between two layers, is computed
from the same operator signatures, halo geometry and moves that the lowering carries out: `_model`
turns it into seconds, `_verify` compares it with a compiled program.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlwp.graph import ComputationGraph, Layer, Member, Use
from jaxlwp.lower import (
    AddUp,
    Again,
    Block,
    Change,
    DeviceProgram,
    Items,
    Op,
    Operate,
    Receive,
    Region,
    Step,
    Vary,
    build,
    every_step,
    plan_halo,
)
from jaxlwp.ops import RULES, ZERO_DERIVATIVE, unread_results, values_needed
from jaxlwp.program import MOVE, Checkpoint, Value
from jaxlwp.space import (
    Collective,
    Config,
    Layout,
    degree,
    even_layout,
    local_shape,
    move_collectives,
    plan_moves,
)


def member_collectives(
    member: Member, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Halo exchanges and sums of partial results of one operator under a config."""
    halo = list(halo_exchanges(member, config, axis_sizes))
    back = [replace(c, backward=True) for c in halo if member.gradient[0]]
    once = (*halo, *back, *_partial_collectives(member, config, axis_sizes))
    return _with_recomputation(once, member.recomputed)


def _with_recomputation(
    collectives: Sequence[Collective], recomputed: bool
) -> tuple[Collective, ...]:
    """The collectives, and those of the forward pass again in the backward pass."""
    again = (replace(c, backward=True) for c in collectives if recomputed and not c.backward)
    return (*collectives, *again)


def halo_exchanges(
    member: Member, config: Config, axis_sizes: dict[str, int]
) -> Iterator[Collective]:
    """What every device sends to its neighbours for one operator under a config, in order."""
    signature, eqn = member.signature, member.equation
    split = [name for name in sorted(signature.windows) if config.axes(name)]
    if not split:
        return
    value, labels = eqn.operand_values[0], signature.operands[0]
    block = list(local_shape(value.shape, config.layout(labels), axis_sizes))
    for name in split:
        axes, dim = config.axes(name), labels.index(name)
        out_size = eqn.result_values[0].shape[signature.results[0].index(name)]
        halo = plan_halo(
            value.shape[dim], out_size, signature.windows[name], degree(axes, axis_sizes)
        )
        rest = math.prod(size for d, size in enumerate(block) if d != dim)
        for start, stop in halo.received.pieces:
            num_bytes = (stop - start) * rest * value.itemsize
            if num_bytes:
                yield Collective(kind="collective-permute", axes=axes, num_bytes=num_bytes)
        block[dim] = halo.rows  # the next dimension's halo carries the rows just received
        if halo.left_over is None:
            block[dim] = halo.extent


def _partial_collectives(
    member: Member, config: Config, axis_sizes: dict[str, int]
) -> list[Collective]:
    signature, eqn = member.signature, member.equation
    axes = tuple(a for a in axis_sizes for n in signature.reduced if a in config.axes(n))
    if not axes:
        return []
    result = []
    for labels, value in zip(signature.results, eqn.result_values, strict=True):
        shape = local_shape(value.shape, config.layout(labels), axis_sizes)
        num_bytes = math.prod(shape) * value.itemsize
        once = Collective(kind="all-reduce", axes=axes, num_bytes=num_bytes)
        result.append(once)
        # A maximum that is differentiated also counts the elements that attain it.
        if RULES[eqn.name].combines and member.gradient[0]:
            result.append(replace(once, backward=True))
    return result


def use_collectives(
    use: Use, source_config: Config, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Collectives that bring a value from its source's layout to the one its reader wants."""
    source = use_source_layout(use, source_config, axis_sizes)
    active = frozenset(axis for name in use.active for axis in config.axes(name))
    once = layout_collectives(
        use.moved.shape,
        use.moved.itemsize,
        source,
        config.layout(use.labels),
        active,
        use.gradient,
        tuple(axis_sizes.items()),
    )
    return _with_recomputation(once, use.recomputed) if use.recomputed else once


def use_source_layout(use: Use, source_config: Config, axis_sizes: dict[str, int]) -> Layout:
    """Layout in which the reader finds the value."""
    layout = source_config.layout(use.source_labels)
    return even_layout(use.info.shape, layout, axis_sizes) if use.argument else layout


@functools.lru_cache(maxsize=1 << 18)
def layout_collectives(
    shape: tuple[int, ...],
    itemsize: int,
    source: Layout,
    target: Layout,
    active: frozenset[str],
    gradient: bool,
    axes: tuple[tuple[str, int], ...],
) -> tuple[Collective, ...]:
    """Collectives of a change of layout; cached, since layers share shapes."""
    axis_sizes = dict(axes)
    moves = plan_moves(
        shape=shape, source=source, target=target, active=active, axis_sizes=axis_sizes
    )
    return move_collectives(shape, itemsize, source, moves, axis_sizes, gradient=gradient)


def layer_collectives(
    layer: Layer, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Collectives inside a layer; those of its own arguments (gradient synchronisation) not."""
    inside = [c for m in layer.members for c in member_collectives(m, config, axis_sizes)]
    for use in layer.uses:
        if use.source == layer.index and not use.argument:
            inside += use_collectives(use, config, config, axis_sizes)
    return tuple(inside)


@dataclass(frozen=True, kw_only=True)
class SpareSums:
    """All-reduces of a layer that do not start of their own: compilers let them join another one.

    Sums that are ready together, as those of a normalisation's mean and mean square, are one
    all-reduce. It sends the bytes of all of them, but starts, and is waited for, once.

    Attributes:
      names: dimensions over which the sums run; there are none where these are not split.
      count: all-reduces that join another one, in a step.
      awaited: see `Member`.
    """

    names: frozenset[str]
    count: int
    awaited: bool


def spare_sums(layer: Layer) -> tuple[SpareSums, ...]:
    """The all-reduces among a layer's own (`layer_collectives`) that join another one.

    Sums are ready together if equally many sums of the layer come one after the other before them.
    So it is with those of gradients, where a value that is whole on every device meets split
    ones: they run in the order of these values, backward.
    """
    turns: dict[int, int] = {}  # of a value: the sums before it, one after the other
    groups: dict[tuple[object, ...], list[SpareSums]] = {}
    for member in layer.members:
        eqn, signature = member.equation, member.signature
        turn = max((turns.get(operand, 0) for operand in eqn.operands), default=0)
        turn += bool(signature.reduced)
        turns |= dict.fromkeys(eqn.results, turn)
        if signature.reduced and not signature.windows and not RULES[eqn.name].combines:
            names, dtype = frozenset(signature.reduced), eqn.result_values[0].dtype
            one = SpareSums(names=names, count=1 + member.recomputed, awaited=member.awaited)
            groups.setdefault((False, turn, dtype, one), []).append(one)
    for use in layer.uses:
        inside = use.source == layer.index and not use.argument
        if inside and use.gradient and use.labels == use.source_labels:
            names = use.active.difference(name for name in use.labels if name)
            one = SpareSums(names=names, count=1, awaited=True)
            groups.setdefault((True, turns.get(use.value, 0), use.moved.dtype, one), []).append(one)
    return tuple(
        replace(group[0], count=(len(group) - 1) * group[0].count)
        for group in groups.values()
        if len(group) > 1
    )


def argument_collectives(
    layer: Layer, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Collectives of the arguments that the layer owns: above all gradient synchronisation."""
    return tuple(
        collective
        for use in layer.uses
        if use.source == layer.index and use.argument
        for collective in use_collectives(use, config, config, axis_sizes)
    )


def strategy_collectives(
    graph: ComputationGraph, configs: Sequence[Config], axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Every collective of one training step (forward and backward) under a strategy.

    Readers that want a value in the same layout share one change of layout, and operators that
    read it with the same window share one halo exchange, as in the lowered function; the sums in
    the cost tables count each reader.
    """
    return tuple(c for _, c in collectives_by_layer(graph, configs, axis_sizes))


def collectives_by_layer(
    graph: ComputationGraph, configs: Sequence[Config], axis_sizes: dict[str, int]
) -> list[tuple[int | None, Collective]]:
    """As `strategy_collectives`, each with the index of the layer for which it runs.

    That is the layer that reads what is moved, the first of them if they share it; None for the
    function's outputs.
    """
    program = build(graph, configs, axis_sizes)
    flow = _Flow(graph, program)
    result = []
    for step in every_step(program.items):
        for collective in step_collectives(step, flow.cotangents):
            times = 1 if collective.backward else 1 + flow.again[step]
            result.append((step.layer, collective))
            result += [(step.layer, replace(collective, backward=True))] * (times - 1)
    return result


def step_collectives(step: Step, cotangents: Collection[Block]) -> Iterator[Collective]:
    """The collectives of one step, forward and, if its result has a cotangent, backward.

    Args:
      step: a step of a device's program.
      cotangents: the blocks that have a cotangent.
    """
    again = isinstance(step.op, Again)
    op = step.op.op if isinstance(step.op, Again) else step.op
    gradient = any(block in cotangents for block in step.results)
    for collective in _op_collectives(op, step.operands[:1] if again else step.operands):
        if collective.num_bytes and (gradient if collective.backward else not again):
            yield collective
    if isinstance(op, Operate) and op.combines:
        for block in step.results:
            sums = Collective(kind="all-reduce", axes=op.reduced_axes, num_bytes=_num_bytes(block))
            yield sums
            # A maximum that is differentiated also counts the elements that attain it, once.
            if block in cotangents:
                yield replace(sums, backward=True)


def _op_collectives(op: Op, operands: Sequence[Block]) -> Iterable[Collective]:
    if not operands:
        return ()
    block = operands[0]
    if isinstance(op, Change):
        return move_collectives(
            op.shape, _itemsize(block), op.before, [op.move], dict(op.axes), gradient=True
        )
    if isinstance(op, AddUp):
        num_bytes = sum(map(_num_bytes, operands))
        return (Collective(kind="all-reduce", axes=op.axes, num_bytes=num_bytes),)
    if isinstance(op, Vary):
        num_bytes = sum(map(_num_bytes, operands))
        return (Collective(kind="all-reduce", axes=op.axes, num_bytes=num_bytes, backward=True),)
    if isinstance(op, Receive):
        rows = Collective(kind="collective-permute", axes=op.axes, num_bytes=_num_bytes(block))
        return (rows, replace(rows, backward=True))
    return ()


def _itemsize(block: Block) -> int:
    return Value((), block.dtype).itemsize


def _num_bytes(block: Block) -> int:
    return math.prod(block.shape) * _itemsize(block)


class _Flow:
    """Where cotangents flow in a device's program, and what is evaluated again for them.

    Attributes:
      cotangents: blocks that have a cotangent: they depend on the parameters, and the loss depends
        on them.
      again: for each step, how many times it is evaluated again in the backward pass.
    """

    def __init__(self, graph: ComputationGraph, program: DeviceProgram) -> None:
        steps = list(every_step(program.items))
        values = zip(program.inputs, graph.program.inputs, strict=True)
        dependent = {block for block, value in values if value in graph.gradients}
        for step in steps:
            if not dependent.isdisjoint(_flowing(step, step.operands)):
                dependent.update(_flowing(step, step.results))
        reached = set(program.outputs[:1])
        for step in reversed(steps):
            if not reached.isdisjoint(step.results):
                reached.update(_flowing(step, step.operands))
        self.cotangents = frozenset(dependent & reached)
        self.reached = reached
        self.again: Counter[Step] = Counter()
        for item in program.items:
            if isinstance(item, Region):
                self.evaluate_again(item)

    def needed(self, step: Step) -> set[Block]:
        """Blocks whose values the derivative of a step needs."""
        op = step.op
        driven = self.reached.intersection(step.results)
        moved = [block in self.cotangents for block in step.operands]
        if not isinstance(op, Operate) or not driven or not any(moved):
            return set()
        values = {step.operands[n] for n in values_needed(op.eqn, moved)}
        return values.union(step.results) if op.combines else values

    def evaluate_again(self, region: Region, outside: tuple[Checkpoint, ...] = ()) -> set[Block]:
        """Count the steps of a checkpointed call that its backward pass evaluates again.

        Args:
          region: the call.
          outside: the calls around it. What the policy of one of them keeps is not evaluated again.

        Returns:
          The blocks that this reads: made before the call, or kept by a policy.
        """
        calls = (*outside, region.call)
        needed: set[Block] = set()
        for item in region.items:
            if isinstance(item, Region):
                needed |= self.evaluate_again(item, calls)
            else:
                needed |= self.needed(item)
        return self._count(region.items, needed, calls)

    def _count(self, items: Items, needed: set[Block], calls: tuple[Checkpoint, ...]) -> set[Block]:
        """Count what makes the blocks needed; returns those that are there already."""
        there = set(needed)
        for step in reversed(list(every_step(items))):
            if there.isdisjoint(step.results) or _is_kept(step, calls):
                continue
            self.again[step] += 1
            there.difference_update(step.results)
            there.update(step.operands)
        return there


def _is_kept(step: Step, calls: Iterable[Checkpoint]) -> bool:
    """Whether the policy of a checkpointed call keeps the results of a step."""
    primitive: Any = MOVE
    params: dict[str, Any] = {}
    if isinstance(step.op, Operate):
        primitive, params = step.op.eqn.primitive, step.op.eqn.params
    operands = step.operands
    if isinstance(step.op, Vary) or (isinstance(step.op, AddUp) and len(operands) > 1):  # a vector
        size = sum(math.prod(block.shape) for block in operands)
        operands = (replace(operands[0], shape=(size,)),)
    return any(call.keeps(primitive, operands, params) for call in calls)


def _flowing(step: Step, blocks: Iterable[Block]) -> list[Block]:
    """Those of a step's blocks through which cotangents can flow."""
    if isinstance(step.op, Again):
        blocks = [block for block in blocks if block is not step.operands[1]]
    if isinstance(step.op, Operate):
        eqn = step.op.eqn
        if eqn.name in ZERO_DERIVATIVE:
            return []
        unread = unread_results(eqn)
        results = zip(eqn.results, step.results, strict=True)
        left_out = {block for value, block in results if value in unread}
        blocks = [block for block in blocks if block not in left_out]
    return [block for block in blocks if Value((), block.dtype).differentiable]
