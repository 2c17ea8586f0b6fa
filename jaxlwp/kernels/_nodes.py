"""The nodes of a program: its operators as XLA for GPUs sees them.

- *Library calls and collectives* (convolution, matrix product, all-gather, ...) want their operands
  in memory. A convolution's bias is added by cuDNN, and its filter is copied to cuDNN's order of
  dimensions, once for all its uses. What it cannot pad itself, on one side only or between the
  elements, is a padded copy (`ConvPaddingLegalization`). A collective along a dimension that is not
  the first is wrapped in transposed copies.
- *Max pooling's backward pass* (`SelectAndScatterExpander`) finds the places of the maxima, four
  numbers for each element of a 4-dimensional output, and scatters into zeros. Zeros of one shape
  are one array, in memory for all who read them (relu too) from the first of these to the last;
  the scatter, which overwrites its zeros, takes a copy. If its result is added to another gradient,
  it scatters into that one instead (`AlgebraicSimplifier`).
- *All-reduces* of gradients over the same devices are combined up to 30 MiB: their operands are
  copied into one buffer, which is reduced in place, and copied out of it.
- *Loops* (scans) are kernels of their own, with what one iteration holds beside their operands and
  results.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlwp.devices import BUCKET_BYTES
from jaxlwp.kernels._fuse import fuse
from jaxlwp.kernels._node import (
    ALIASES,
    ALONE,
    EXCHANGES,
    GATHERS,
    REDUCTIONS,
    SUMS,
    Node,
)
from jaxlwp.program import SCAN, Equation, Program, Value, scan_of


class Builder:
    """Makes the nodes of a program: equal operators once, library calls with their copies."""

    def __init__(
        self,
        program: Program,
        held: Callable[[Mapping[Node, tuple[Node, ...]]], int] = lambda kernels: 0,
    ) -> None:
        self.program, self.held, self.scope = program, held, ""
        self.nodes: dict[int, Node] = {}
        self.made: dict[Hashable, Node] = {}
        self.filters: dict[Node, Node] = {}
        self.copies: dict[Node, Node] = {}
        self.axes: dict[int, str] = {}
        self.names: list[tuple[int, str]] = []
        self.ordered: list[tuple[int, str]] = []
        self.read = {v for eqn in program.equations for v in eqn.operands} | set(program.outputs)
        for value in program.inputs:
            self.nodes[value] = self.node("argument", self.size(value), argument=True, origin=value)
        for eqn in program.equations:
            results = self.expand(eqn, [self.operand(v) for v in eqn.operands])
            self.nodes.update(zip(eqn.results, results, strict=True))

    def node(
        self,
        kind: str,
        num_bytes: int,
        operands: tuple[Node, ...] = (),
        writes: bool = False,
        wants: frozenset[int] = frozenset(),
        **more: Any,
    ) -> Node:
        """A node of the equation at hand."""
        origin = more.get("origin", -1)
        more.setdefault("info", self.program.values[origin] if origin >= 0 else None)
        return Node(kind, num_bytes, operands, writes, wants, scope=self.scope, **more)

    def size(self, value: int) -> int:
        info = self.program.values[value]
        return math.prod(info.shape) * info.itemsize

    def operand(self, value: int) -> Node:
        if value not in self.nodes:
            constant: Any = self.program.constants.get(value)
            text = str(np.asarray(constant)) if np.ndim(constant) == 0 else f"constant {value}"
            key = ("constant", text, str(self.program.values[value].dtype))
            self.nodes[value] = self.once(
                key, self.node("constant", 0, argument=True, origin=value)
            )
        return self.nodes[value]

    def tag(self, node: Node) -> str | None:
        """The name of the node's value, or of the next one that has a name."""
        if not self.ordered:
            self.ordered = sorted(self.names)
        place = bisect.bisect_left(self.ordered, (node.number, ""))
        return self.ordered[place][1] if place < len(self.ordered) else None

    def once(self, key: Hashable, node: Node) -> Node:
        return self.made.setdefault(key, node)

    def expand(self, eqn: Equation, operands: list[Node]) -> list[Node]:
        """The nodes of an equation's results."""
        self.scope = eqn.scope
        if eqn.name == "name":
            self.names.append((operands[0].number, eqn.params["name"]))
        if eqn.name in ALIASES:
            return operands[: len(eqn.results)]
        if eqn.name in SUMS:
            group = (eqn.name, str(eqn.params.get("axes")))
            self.axes.update(dict.fromkeys(eqn.results, group[1]))
            return [
                self.once(
                    (*group, node, eqn.checkpoints),
                    self.node(
                        eqn.name, node.num_bytes, (node,), True, _FIRST, in_place=True, origin=v
                    ),
                )
                for node, v in zip(operands, eqn.results, strict=True)
            ]
        made = self.first(eqn, operands)
        # Several results of a kernel of its own come from one call; pieces of a split do not.
        read = (made,) if made.writes else made.operands
        others = [
            self.once((made, v), self.node(eqn.name, self.size(v), read, made.writes, origin=v))
            for v in eqn.results[1:]
        ]
        return [made, *others]

    def first(self, eqn: Equation, operands: list[Node]) -> Node:
        """The node of an equation's first result."""
        key = (eqn.name, _text(eqn.params), tuple(operands), eqn.result_values, eqn.checkpoints)
        if key not in self.made:
            self.made[key] = self.make(eqn, operands)
        return self.made[key]

    def make(self, eqn: Equation, operands: list[Node]) -> Node:
        value = eqn.results[0]
        num_bytes = self.size(value)
        name = eqn.name
        if name == "conv_general_dilated":
            data, kernel = operands
            call = (self.padded(eqn, data, kernel), self.filter(kernel))
            return self.node(
                "conv", num_bytes, call, True, frozenset((0, 1)), origin=value, eqn=eqn
            )
        if name in EXCHANGES:
            return self.exchange(eqn, operands[0])
        if name.startswith("select_and_scatter"):
            return self.scatter_maxima(eqn, operands)
        if name == SCAN:
            operands = [*operands, self.scratch(eqn)]
        if name in ("dot_general", "ppermute", "pbroadcast", *ALONE):
            every = frozenset(range(len(operands)))
            product = eqn if name == "dot_general" else None
            return self.node(
                name, num_bytes, tuple(operands), True, every, origin=value, eqn=product
            )
        if name == "transpose" and operands[0].kind == "dot_general":
            return operands[0]  # a matrix product writes its result in either order
        if name in ("add", "add_any") and any(node.kind == "scatter" for node in operands):
            return self.scatter_into(operands, value)
        if name in REDUCTIONS:
            return self.node(name, num_bytes, tuple(operands), True, origin=value)
        spread = tuple(
            self.spread(node, v, eqn) for node, v in zip(operands, eqn.operands, strict=True)
        )
        return self.node(name, num_bytes, spread, in_place=True, origin=value)

    def scratch(self, eqn: Equation) -> Node:
        """What one iteration of a loop holds at most; the next one uses the same memory."""
        scan, _, _ = scan_of(eqn).only([n for n, v in enumerate(eqn.results) if v in self.read])
        kernels = fuse(Builder(scan.body, self.held).root({}))
        return self.node("scratch", self.held(kernels), writes=True)

    def spread(self, node: Node, value: int, eqn: Equation) -> Node:
        """A scalar constant as the operand that elementwise operators read: an array."""
        result = eqn.result_values[0]
        if node.kind != "constant" or self.program.values[value].shape or not result.shape:
            return node
        return self.full(node, result.shape, self.program.values[value].itemsize)

    def full(self, constant: Node, shape: tuple[int, ...], itemsize: int) -> Node:
        """An array filled with a scalar constant."""
        num_bytes = math.prod(shape) * itemsize
        info = None if constant.info is None else Value(shape, constant.info.dtype)
        node = self.node("full", num_bytes, (constant,), info=info)
        return self.once(("full", constant, shape), node)

    def padded(self, eqn: Equation, data: Node, kernel: Node) -> Node:
        """A convolution's first operand, padded where the library cannot do that itself.

        It cannot on one side only, nor between elements, unless the convolution is a gradient of
        another's operand; the gradient of the filter reads the same copy.
        """
        params = eqn.params
        dilation, padding = params["lhs_dilation"], params["padding"]
        spread = any(step > 1 for step in dilation)
        uneven = _is_filter(kernel) and any(low != high or low < 0 for low, high in padding)
        if kernel.kind == "rev" or not (spread or uneven):
            return data if _is_filter(kernel) else self.copies.get(data, data)
        info, dims = eqn.operand_values[0], params["dimension_numbers"].lhs_spec[2:]
        num_bytes = math.prod(info.shape) * info.itemsize
        for dim, step, (low, high) in zip(dims, dilation, padding, strict=True):
            size = info.shape[dim]
            num_bytes = num_bytes // max(size, 1) * max((size - 1) * step + 1 + low + high, 0)
        copy = self.once(("padded", data, num_bytes), self.node("pad", num_bytes, (data,)))
        if _is_filter(kernel):
            self.copies[data] = copy
        return copy

    def filter(self, kernel: Node) -> Node:
        """A convolution's second operand: a filter in the library's order, or a gradient."""
        if not _is_filter(kernel):
            return kernel
        root = _unturned(kernel)
        copied = self.node("filter", root.num_bytes, (root,), writes=True, origin=root.origin)
        return self.filters.setdefault(root, copied)

    def exchange(self, eqn: Equation, operand: Node) -> Node:
        """A collective that moves blocks of one dimension; XLA's are along the first."""
        value, params = eqn.results[0], eqn.params
        names = ("all_gather_dimension", "scatter_dimension", "split_axis", "concat_axis")
        inner = any(params.get(name, 0) for name in names)
        if inner:
            operand = self.node("transpose", operand.num_bytes, (operand,))
        node = self.node(eqn.name, self.size(value), (operand,), True, _FIRST, origin=value)
        return self.node("transpose", node.num_bytes, (node,), origin=value) if inner else node

    def scatter_maxima(self, eqn: Equation, operands: list[Node]) -> Node:
        """The gradient of max pooling: the maxima's places, then a scatter into zeros."""
        source, operand = operands[:2]
        info, result = eqn.operand_values[0], eqn.result_values[0]
        count = math.prod(info.shape)
        places = self.node(
            "places", count * (info.itemsize + 4 * len(info.shape)), (operand,), writes=True
        )
        padding = eqn.params.get("padding", ((0, 0),) * len(result.shape))
        shape = tuple(n + sum(pads) for n, pads in zip(result.shape, padding, strict=True))
        zero = self.once(
            ("constant", "0.0", str(result.dtype)), self.node("constant", 0, argument=True)
        )
        zeros = self.full(zero, shape, result.itemsize)
        # The scatter overwrites its zeros: a copy, unless nobody else needs them.
        copy = self.node("copy", zeros.num_bytes, (zeros,), True, _FIRST, in_place=True)
        scattered = self.node(
            "scatter",
            zeros.num_bytes,
            (copy, source, places),
            writes=True,
            wants=_FIRST,
            in_place=True,
            origin=eqn.results[0],
        )
        if shape == result.shape:
            return scattered
        return self.node("slice", self.size(eqn.results[0]), (scattered,), origin=eqn.results[0])

    def scatter_into(self, operands: Sequence[Node], value: int) -> Node:
        """A sum with the gradient of max pooling: the scatter adds to the other term at once."""
        scattered, other = sorted(operands, key=lambda node: node.kind != "scatter")
        _, source, places = scattered.operands
        read, size = (other, source, places), scattered.num_bytes
        return self.node("scatter", size, read, True, _FIRST, in_place=True, origin=value)

    def root(self, gradients: Mapping[int, int]) -> Node:
        """What reads every output: the updates of the parameters, and the program's result."""
        self.scope = ""
        outputs = [self.operand(value) for value in self.program.outputs]
        outputs = self.combined(outputs, gradients)
        read = []
        for position, node in enumerate(outputs):
            if position not in gradients:
                read.append(node)
                continue
            parameter = self.nodes[self.program.inputs[gradients[position]]]
            copies = [self.filters[parameter]] if parameter in self.filters else []
            # Parameter and optimizer state are overwritten: the update takes no new memory.
            read.append(self.node("update", 0, (node, *copies), writes=True))
        return self.node("root", 0, tuple(read), True, frozenset(range(len(read))))

    def combined(self, outputs: list[Node], gradients: Mapping[int, int]) -> list[Node]:
        """The outputs, their all-reduces combined."""
        groups: dict[Hashable, list[list[Node]]] = defaultdict(lambda: [[]])
        for node in dict.fromkeys(outputs[position] for position in gradients):
            if node.kind in SUMS and node.num_bytes < BUCKET_BYTES:
                lists = groups[self.devices(node)]
                if sum(n.num_bytes for n in lists[-1]) + node.num_bytes > BUCKET_BYTES:
                    lists.append([])
                lists[-1].append(node)
        pieces: dict[Node, Node] = {}
        for group in (group for lists in groups.values() for group in lists if len(group) > 1):
            total = sum(node.num_bytes for node in group)
            read = tuple(node.operands[0] for node in group)
            joined = self.node("concatenate", total, read, writes=True, combined=True)
            summed = self.node("psum", total, (joined,), True, _FIRST, in_place=True, combined=True)
            for node in group:
                pieces[node] = self.node(
                    "slice",
                    node.num_bytes,
                    (summed,),
                    writes=True,
                    origin=node.origin,
                    combined=True,
                )
        return [pieces.get(node, node) for node in outputs]

    def devices(self, node: Node) -> Hashable:
        """What all-reduces must share to be combined."""
        axes = self.axes[node.origin]
        return axes, str(self.program.values[node.origin].dtype)


_FIRST = frozenset((0,))


def _unturned(kernel: Node) -> Node:
    """A convolution's second operand before it is reversed and transposed."""
    while kernel.kind in ("rev", "transpose"):
        kernel = kernel.operands[0]
    return kernel


def _is_filter(kernel: Node) -> bool:
    """Whether a convolution's second operand is a filter, not the gradient of its result."""
    root = _unturned(kernel)
    return root.argument or root.kind in GATHERS or kernel.kind == "rev"


def _text(params: Mapping[str, Any]) -> str:
    return str(sorted((name, str(value)) for name, value in params.items()))
