"""The collectives of layers, edges and whole strategies, as data.

What a layer communicates under a config, and a change of layout between two layers, is computed
from the same operator signatures, halo geometry and moves that the lowering carries out: `_cost`
turns it into seconds, `_verify` compares it with a compiled program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxlwp._config import Config, Layout
from jaxlwp._graph import ComputationGraph, Layer, Member, Use
from jaxlwp._halo import plan_halo
from jaxlwp._layout import (
    Collective,
    degree,
    even_layout,
    layout_axes,
    local_shape,
    move_collectives,
    plan_moves,
)
from jaxlwp.ops import RULES


def member_collectives(
    member: Member, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Halo exchanges and sums of partial results of one operator under a config."""
    once = (
        *(
            collective
            for piece in halo_pieces(member, config, axis_sizes)
            for collective in _piece_collectives(piece, member.gradient[0])
        ),
        *_partial_collectives(member, config, axis_sizes),
    )
    return _with_recomputation(once, member.recomputed)


def _with_recomputation(
    collectives: Sequence[Collective], recomputed: bool
) -> tuple[Collective, ...]:
    """The collectives, and those of the forward pass again in the backward pass."""
    again = (replace(c, backward=True) for c in collectives if recomputed and not c.backward)
    return (*collectives, *again)


@dataclass(frozen=True, kw_only=True)
class HaloPiece:
    """Rows that every device receives from one neighbour.

    Attributes:
      path: what is exchanged, from the operand on: two operators that read the same operand and
        have pieces of the same path share them in the forward pass.
      cut: the rows that are exchanged with this piece. Where they differ too, the gradients are
        sent apart.
      axes: mesh axes that split the dimension.
      num_bytes: bytes that each device sends.
    """

    path: tuple[object, ...]
    cut: tuple[tuple[int, int], ...]
    axes: tuple[str, ...]
    num_bytes: int


def halo_pieces(member: Member, config: Config, axis_sizes: dict[str, int]) -> Iterator[HaloPiece]:
    """The halo exchanges of one operator under a config, in order."""
    signature, eqn = member.signature, member.equation
    split = [name for name in sorted(signature.windows) if config.axes(name)]
    if not split:
        return
    value, labels = eqn.operand_values[0], signature.operands[0]
    layout = config.layout(labels)
    block = list(local_shape(value.shape, layout, axis_sizes))
    uneven = even_layout(value.shape, layout, axis_sizes) != layout
    fill = eqn.operands[1] if signature.fill == "value" else signature.fill
    path: tuple[object, ...] = (fill,) if uneven else ()
    for name in split:
        axes, dim = config.axes(name), labels.index(name)
        out_size = eqn.result_values[0].shape[signature.results[0].index(name)]
        halo = plan_halo(
            value.shape[dim], out_size, signature.windows[name], degree(axes, axis_sizes)
        )
        rest = math.prod(size for d, size in enumerate(block) if d != dim)
        for start, stop in halo.received.pieces:
            yield HaloPiece(
                path=(*path, dim, start, stop, halo.received.ring),
                cut=halo.received.pieces,
                axes=axes,
                num_bytes=(stop - start) * rest * value.itemsize,
            )
        path = (*path, dim, halo, fill)
        block[dim] = halo.rows  # the next dimension's halo carries the rows just received
        if halo.left_over is None:
            block[dim] = halo.extent


def _piece_collectives(piece: HaloPiece, gradient: bool) -> Iterator[Collective]:
    for backward in (False, True) if gradient else (False,):
        if piece.num_bytes:
            yield Collective(
                kind="collective-permute",
                axes=piece.axes,
                num_bytes=piece.num_bytes,
                backward=backward,
            )


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
        # A maximum that is differentiated also counts the elements that attain it.
        extra = RULES[eqn.name].combines and member.gradient[0]
        result += [Collective(kind="all-reduce", axes=axes, num_bytes=num_bytes)] * (1 + extra)
    return result


def use_collectives(
    use: Use, source_config: Config, config: Config, axis_sizes: dict[str, int]
) -> tuple[Collective, ...]:
    """Collectives that bring a value from its source's layout to the one its reader wants."""
    source = use_source_layout(use, source_config, axis_sizes)
    active = frozenset(axis for name in use.active for axis in config.axes(name))
    once = layout_collectives(
        use.info.shape,
        use.info.itemsize,
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
            groups.setdefault((True, turns.get(use.value, 0), use.info.dtype, one), []).append(one)
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
    result: list[tuple[int | None, Collective]] = []
    received: set[tuple[object, ...]] = set()
    for layer, config in zip(graph.layers, configs, strict=True):
        for member in layer.members:
            partial = _partial_collectives(member, config, axis_sizes)
            every = _with_recomputation(partial, member.recomputed)
            result += [(layer.index, collective) for collective in every]
            operand = _operand_key(graph, layer, member, config)
            for piece in halo_pieces(member, config, axis_sizes):
                once = tuple(_piece_collectives(piece, member.gradient[0]))
                every = _with_recomputation(once, member.recomputed)
                for number, collective in enumerate(every):
                    # Forward the compiler merges what only differs in the axes of the gradient.
                    source = (*operand, piece.cut) if collective.backward else operand[:-1]
                    key = (number, *source, piece.path)
                    if key not in received:
                        result.append((layer.index, collective))
                    received.add(key)
    changes: dict[_Change, list[tuple[int, Use]]] = {}
    for change, reader in _changes(graph, configs, axis_sizes):
        changes.setdefault(change, []).extend([reader] if reader else [])
    done: set[tuple[object, ...]] = set()
    for change, readers in changes.items():
        gradient = any(use.gradient for _, use in readers)
        once = tuple(_change_collectives(graph, change, gradient, axis_sizes, done))
        every = _with_recomputation(once, any(use.recomputed for _, use in readers))
        result += [(readers[0][0] if readers else None, collective) for collective in every]
    return result


def _operand_key(
    graph: ComputationGraph, layer: Layer, member: Member, config: Config
) -> tuple[object, ...]:
    """What identifies the block of a member's first operand: value, layout, and active axes."""
    value, labels = (member.equation.operands or (-1,))[0], (member.signature.operands or ((),))[0]
    where = value if value not in graph.lazy else (value, layer.index, labels)
    active = frozenset(axis for name in member.signature.names for axis in config.axes(name))
    return where, config.layout(labels), active


_Change = tuple[int, Layout, Layout, frozenset[str]]
"""A change of layout: value, source, target, axes over which the reader is active."""


def _change_collectives(
    graph: ComputationGraph,
    change: _Change,
    gradient: bool,
    axis_sizes: dict[str, int],
    done: set[tuple[object, ...]],
) -> Iterator[Collective]:
    """Collectives of a change of layout; forward moves that were done already are left out.

    Two readers that are active over different axes have transposes of their own, but as long as
    their forward moves are the same, the compiler merges them.
    """
    value, source, target, active = change
    info = graph.program.values[value]
    moves = plan_moves(
        shape=info.shape, source=source, target=target, active=active, axis_sizes=axis_sizes
    )
    path: tuple[object, ...] = (value, source)
    layout = source
    for move in moves:
        if move.kind != "cast":
            path = (*path, (move.kind, move.axes, move.dim, move.to_dim))
        for collective in move_collectives(
            info.shape, info.itemsize, layout, [move], axis_sizes, gradient=gradient
        ):
            if collective.backward or path not in done:
                yield collective
        done.add(path)
        layout = move.after


def _changes(
    graph: ComputationGraph, configs: Sequence[Config], axis_sizes: dict[str, int]
) -> Iterator[tuple[_Change, tuple[int, Use] | None]]:
    """Every change of layout: what layers read, by index and use, and the function's outputs."""
    for layer, config in zip(graph.layers, configs, strict=True):
        for use in layer.uses:
            source = use_source_layout(use, configs[use.source], axis_sizes)
            active = frozenset(axis for name in use.active for axis in config.axes(name))
            yield (use.value, source, config.layout(use.labels), active), (layer.index, use)
    for value in graph.program.outputs:
        if value in graph.homes:
            home, labels = graph.homes[value]
            source = configs[home].layout(labels)
            target = even_layout(graph.program.values[value].shape, source, axis_sizes)
            yield (value, source, target, layout_axes(target)), None
