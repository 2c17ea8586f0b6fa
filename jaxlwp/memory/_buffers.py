"""Which buffers a compiled program holds, and when: its memory, predicted from its equations.

The equations are those of one device's program, differentiated. What XLA does with them for GPUs
is imitated, by rule, as far as it decides about memory:

- *Fusion* (XLA's `PriorityFusion`). An elementwise operator, a broadcast, a slice, a concatenation
  has no buffer of its own if all of its readers can evaluate it on the fly, and if that moves
  fewer bytes: evaluated in n kernels that read r bytes for it, it costs n r; written once it costs
  r + w, and n reads of its w bytes. So an activation is kept for the backward pass as what it is
  computed from, and a mask not at all.
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
- *Order*: the chain of activations and their gradients first; what only gradients of parameters
  wait for (above all the convolutions that make them) after it, since that overlaps with
  collectives (`LatencyHidingScheduler`); large gradients that are reduced alone after the combined
  ones; the updates last. So every convolution's input and output gradient are kept until the chain
  has ended. A small reduction is evaluated beside the kernel that made or read its operand
  (multi-output fusion).
- *Loops* (scans) are kernels of their own, with what one iteration holds beside their operands and
  results.
- *Reuse*: an elementwise kernel writes over an operand of the same size that nobody reads later;
  parameters and optimizer state are donated and updated in place.

Sources: the passes named, in openxla/xla under `xla/service`, `xla/hlo` and `xla/service/gpu`; and
the programs that JAX 0.10.2 compiles for 16 H200s (`make bench-memory` compares). What is known to
differ: the scheduler sometimes evaluates the places of maxima early, to overlap with a collective;
before Ampere, XLA lays out convolutions channels first, with transposed copies around them; matrix
products that XLA splits along the contraction hold partial results. Not included, there or here:
the workspaces of cuDNN, chosen when the program is loaded.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxlwp.program import SCAN, Equation, Program, scan_of

COMBINED_BYTES = 30 * 1024 * 1024
"""Largest combined all-reduce: XLA's `xla_gpu_all_reduce_combine_threshold_bytes`."""

ALIASES = (
    "reshape",
    "squeeze",
    "expand_dims",
    "pcast",
    "pvary",
    "copy",
    "name",
    "stop_gradient",
    "random_wrap",
    "random_unwrap",
    "optimization_barrier",
    "bitcast_convert_type",
)
"""Same bytes under another shape or name."""

GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
SCATTERS = ("reduce_scatter", "psum_scatter", "unreduced_reduce_scatter")
SUMS = ("psum", "psum_invariant", "pmax", "pmin", "unreduced_psum")
EXCHANGES = (*GATHERS, *SCATTERS, "all_to_all")
COLLECTIVES = (*SUMS, *EXCHANGES, "ppermute", "pbroadcast")

LIBRARY = ("conv_general_dilated", "dot_general")
REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "reduce_xor",
    "reduce",
    "argmax",
    "argmin",
    "reduce_window",
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "scatter",
    "scatter-add",
    "scatter_add",
)
"""They evaluate their operands on the fly; their results are in memory."""

ALONE = (
    "sort",
    "top_k",
    "approx_top_k",
    "while",
    "scan",
    "cond",
    "fft",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "cumlogsumexp",
    "custom_call",
    "ffi_call",
    "pure_callback",
    "triangular_solve",
    "cholesky",
)
"""Kernels of their own, whose operands are in memory too."""


@dataclass(eq=False)
class Node:
    """What one operator makes, or one step of it.

    Attributes:
      kind: the primitive's name, or that of the step.
      num_bytes: of its result.
      operands: what it reads.
      writes: its result is always in memory.
      wants: the operands (positions) that must be in memory.
      in_place: it may write over an operand of the same size that nobody reads later.
      argument: it is in memory before and after the program.
      origin: index of the value in the program, -1 for a step in between.
      combined: it is a step of a combined all-reduce.
      number: position in the order in which nodes are made, which is that of the program.
    """

    kind: str
    num_bytes: int
    operands: tuple[Node, ...] = ()
    writes: bool = False
    wants: frozenset[int] = frozenset()
    in_place: bool = False
    argument: bool = False
    origin: int = -1
    combined: bool = False
    number: int = field(default_factory=itertools.count().__next__)


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """The memory of a program, its arguments left out.

    Attributes:
      live_bytes: what lives beside the arguments at the moment when most does.
      live: that, largest first.
      kept: what is made before the loss and read after it.
      tags: for each that is kept the name that its value was given (`checkpoint_name`); a step in
        between has that of the next value that was given one, None if there is none.
    """

    live_bytes: int
    live: tuple[Node, ...] = field(repr=False)
    kept: tuple[Node, ...] = field(repr=False)
    tags: tuple[str | None, ...] = field(repr=False)


def predict(program: Program, gradients: Mapping[int, int], loss: int) -> Buffers:
    """Predict the memory of a training step.

    Args:
      program: loss and gradients on one device's blocks.
      gradients: position of a gradient among the outputs -> position of its parameter among the
        inputs, which the update that follows overwrites.
      loss: position of the loss among the outputs.

    Returns:
      Its memory, that of the arguments left out.
    """
    builder = _Builder(program)
    root = builder.root(gradients)
    kernels = _fuse(root)
    order = _order(kernels)
    live = _most(order, kernels)
    end = builder.operand(program.outputs[loss]).number
    kept = dict.fromkeys(
        operand
        for node, reads in kernels.items()
        for operand in reads
        if operand.number <= end < node.number and not operand.argument
    )
    return Buffers(
        live_bytes=sum(node.num_bytes for node in live),
        live=tuple(sorted(live, key=lambda node: -node.num_bytes)),
        kept=tuple(kept),
        tags=tuple(builder.tag(node) for node in kept),
    )


# --- the operators ---------------------------------------------------------------------------


class _Builder:
    """Makes the nodes of a program: equal operators once, library calls with their copies."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: dict[int, Node] = {}
        self.made: dict[Hashable, Node] = {}
        self.filters: dict[Node, Node] = {}
        self.copies: dict[Node, Node] = {}
        self.axes: dict[int, str] = {}
        self.names: list[tuple[int, str]] = []
        self.ordered: list[tuple[int, str]] = []
        self.read = {v for eqn in program.equations for v in eqn.operands} | set(program.outputs)
        for value in program.inputs:
            self.nodes[value] = Node("argument", self.size(value), argument=True, origin=value)
        for eqn in program.equations:
            results = self.expand(eqn, [self.operand(v) for v in eqn.operands])
            self.nodes.update(zip(eqn.results, results, strict=True))

    def size(self, value: int) -> int:
        info = self.program.values[value]
        return math.prod(info.shape) * info.itemsize

    def operand(self, value: int) -> Node:
        if value not in self.nodes:
            constant: Any = self.program.constants.get(value)
            text = str(np.asarray(constant)) if np.ndim(constant) == 0 else f"constant {value}"
            key = ("constant", text, str(self.program.values[value].dtype))
            self.nodes[value] = self.once(key, Node("constant", 0, argument=True, origin=value))
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
                    Node(eqn.name, node.num_bytes, (node,), True, _FIRST, in_place=True, origin=v),
                )
                for node, v in zip(operands, eqn.results, strict=True)
            ]
        made = self.first(eqn, operands)
        # Several results of a kernel of its own come from one call; pieces of a split do not.
        read = (made,) if made.writes else made.operands
        others = [
            self.once((made, v), Node(eqn.name, self.size(v), read, made.writes, origin=v))
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
            return Node("conv", num_bytes, call, True, frozenset((0, 1)), origin=value)
        if name in EXCHANGES:
            return self.exchange(eqn, operands[0])
        if name.startswith("select_and_scatter"):
            return self.scatter_maxima(eqn, operands)
        if name == SCAN:
            operands = [*operands, self.scratch(eqn)]
        if name in ("dot_general", "ppermute", "pbroadcast", *ALONE):
            every = frozenset(range(len(operands)))
            return Node(name, num_bytes, tuple(operands), True, every, origin=value)
        if name == "transpose" and operands[0].kind == "dot_general":
            return operands[0]  # a matrix product writes its result in either order
        if name in ("add", "add_any") and any(node.kind == "scatter" for node in operands):
            return self.scatter_into(operands, value)
        if name in REDUCTIONS:
            return Node(name, num_bytes, tuple(operands), True, origin=value)
        spread = tuple(
            self.spread(node, v, eqn) for node, v in zip(operands, eqn.operands, strict=True)
        )
        return Node(name, num_bytes, spread, in_place=True, origin=value)

    def scratch(self, eqn: Equation) -> Node:
        """What one iteration of a loop holds at most; the next one uses the same memory."""
        scan, _, _ = scan_of(eqn).only([n for n, v in enumerate(eqn.results) if v in self.read])
        kernels = _fuse(_Builder(scan.body).root({}))
        live = _most(_order(kernels), kernels)
        return Node("scratch", sum(node.num_bytes for node in live), writes=True)

    def spread(self, node: Node, value: int, eqn: Equation) -> Node:
        """A scalar constant as the operand that elementwise operators read: an array."""
        result = eqn.result_values[0]
        if node.kind != "constant" or self.program.values[value].shape or not result.shape:
            return node
        return self.full(node, result.shape, self.program.values[value].itemsize)

    def full(self, constant: Node, shape: tuple[int, ...], itemsize: int) -> Node:
        """An array filled with a scalar constant."""
        num_bytes = math.prod(shape) * itemsize
        return self.once(("full", constant, shape), Node("full", num_bytes, (constant,)))

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
        copy = self.once(("padded", data, num_bytes), Node("pad", num_bytes, (data,)))
        if _is_filter(kernel):
            self.copies[data] = copy
        return copy

    def filter(self, kernel: Node) -> Node:
        """A convolution's second operand: a filter in the library's order, or a gradient."""
        if not _is_filter(kernel):
            return kernel
        root = _unturned(kernel)
        copied = Node("filter", root.num_bytes, (root,), writes=True, origin=root.origin)
        return self.filters.setdefault(root, copied)

    def exchange(self, eqn: Equation, operand: Node) -> Node:
        """A collective that moves blocks of one dimension; XLA's are along the first."""
        value, params = eqn.results[0], eqn.params
        names = ("all_gather_dimension", "scatter_dimension", "split_axis", "concat_axis")
        inner = any(params.get(name, 0) for name in names)
        if inner:
            operand = Node("transpose", operand.num_bytes, (operand,))
        node = Node(eqn.name, self.size(value), (operand,), True, _FIRST, origin=value)
        return Node("transpose", node.num_bytes, (node,), origin=value) if inner else node

    def scatter_maxima(self, eqn: Equation, operands: list[Node]) -> Node:
        """The gradient of max pooling: the maxima's places, then a scatter into zeros."""
        source, operand = operands[:2]
        info, result = eqn.operand_values[0], eqn.result_values[0]
        count = math.prod(info.shape)
        places = Node(
            "places", count * (info.itemsize + 4 * len(info.shape)), (operand,), writes=True
        )
        padding = eqn.params.get("padding", ((0, 0),) * len(result.shape))
        shape = tuple(n + sum(pads) for n, pads in zip(result.shape, padding, strict=True))
        zero = self.once(("constant", "0.0", str(result.dtype)), Node("constant", 0, argument=True))
        zeros = self.full(zero, shape, result.itemsize)
        # The scatter overwrites its zeros: a copy, unless nobody else needs them.
        copy = Node("copy", zeros.num_bytes, (zeros,), True, _FIRST, in_place=True)
        scattered = Node(
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
        return Node("slice", self.size(eqn.results[0]), (scattered,), origin=eqn.results[0])

    def scatter_into(self, operands: Sequence[Node], value: int) -> Node:
        """A sum with the gradient of max pooling: the scatter adds to the other term at once."""
        scattered, other = sorted(operands, key=lambda node: node.kind != "scatter")
        _, source, places = scattered.operands
        read, size = (other, source, places), scattered.num_bytes
        return Node("scatter", size, read, True, _FIRST, in_place=True, origin=value)

    def root(self, gradients: Mapping[int, int]) -> Node:
        """What reads every output: the updates of the parameters, and the program's result."""
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
            read.append(Node("update", 0, (node, *copies), writes=True))
        return Node("root", 0, tuple(read), True, frozenset(range(len(read))))

    def combined(self, outputs: list[Node], gradients: Mapping[int, int]) -> list[Node]:
        """The outputs, their all-reduces combined."""
        groups: dict[Hashable, list[list[Node]]] = defaultdict(lambda: [[]])
        for node in dict.fromkeys(outputs[position] for position in gradients):
            if node.kind in SUMS and node.num_bytes < COMBINED_BYTES:
                lists = groups[self.devices(node)]
                if sum(n.num_bytes for n in lists[-1]) + node.num_bytes > COMBINED_BYTES:
                    lists.append([])
                lists[-1].append(node)
        pieces: dict[Node, Node] = {}
        for group in (group for lists in groups.values() for group in lists if len(group) > 1):
            total = sum(node.num_bytes for node in group)
            read = tuple(node.operands[0] for node in group)
            joined = Node("concatenate", total, read, writes=True, combined=True)
            summed = Node("psum", total, (joined,), True, _FIRST, in_place=True, combined=True)
            for node in group:
                pieces[node] = Node(
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


# --- fusion ----------------------------------------------------------------------------------


def _fuse(root: Node) -> dict[Node, tuple[Node, ...]]:
    """The kernels: nodes whose results are in memory, and the nodes in memory that they read."""
    nodes = _post_order(root)
    required = {node for node in nodes if node.writes or node.argument}
    required.update(node.operands[i] for node in nodes for i in node.wants)
    required = _with_bias(nodes, required)
    # Who reads a value depends on what else is in memory: decide, and decide again knowing that.
    written, _ = _write(nodes, required, required)
    written, reads = _write(nodes, required, written)
    return {node: tuple(reads[node]) for node in nodes if node in written}


def _write(
    nodes: Sequence[Node], required: set[Node], supposed: set[Node]
) -> tuple[set[Node], dict[Node, dict[Node, None]]]:
    """What is in memory, supposing it for a value's readers; and what each node then reads."""
    written = set(required)
    kernels_of = _reading_kernels(nodes, supposed)
    reads: dict[Node, dict[Node, None]] = {}
    for node in nodes:
        found: dict[Node, None] = {}
        for operand in node.operands:
            found |= {operand: None} if operand in written else reads[operand]
        reads[node] = found
        if node not in written:
            # A small reduction is evaluated beside another kernel that reads the same.
            count = max(1, sum(not _joins(kernel) for kernel in kernels_of[node]))
            read_bytes = sum(min(n.num_bytes, node.num_bytes) for n in found)
            if (count - 1) * read_bytes > (count + 1) * node.num_bytes:
                written.add(node)
    return written, reads


def _joins(kernel: Node) -> bool:
    """Whether XLA evaluates it beside another kernel that reads the same (`MultiOutputFusion`)."""
    read_bytes = max((n.num_bytes for n in kernel.operands), default=0)
    return kernel.kind in REDUCTIONS and 8 * kernel.num_bytes <= read_bytes


def _with_bias(nodes: Sequence[Node], written: set[Node]) -> set[Node]:
    """A convolution whose only reader adds a bias writes their sum."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        for operand in dict.fromkeys(node.operands):
            readers[operand].append(node)
    for node in nodes:
        if node.kind == "conv" and len(readers[node]) == 1:
            (reader,) = readers[node]
            if reader.kind == "add" and reader.num_bytes == node.num_bytes:
                written = (written - {node}) | {reader}
    return written


def _reading_kernels(nodes: Sequence[Node], written: set[Node]) -> dict[Node, set[Node]]:
    """For each node the kernels that would evaluate it, if only what must be is in memory."""
    kernels: dict[Node, set[Node]] = defaultdict(set)
    for node in reversed(nodes):
        for operand in node.operands:
            if not operand.argument:
                kernels[operand] |= {node} if node in written else kernels[node]
    return kernels


def _post_order(root: Node) -> list[Node]:
    """Every node after the nodes that it reads."""
    order: dict[Node, None] = {}
    stack = [(root, iter(root.operands))]
    while stack:
        node, operands = stack[-1]
        following = next((n for n in operands if n not in order), None)
        if following is None:
            order[node] = None
            stack.pop()
        else:
            stack.append((following, iter(following.operands)))
    return list(order)


# --- order and memory ------------------------------------------------------------------------


def _order(kernels: Mapping[Node, tuple[Node, ...]]) -> list[Node]:
    """Kernels in about the order of XLA's latency-hiding scheduler.

    The chain of the program first; then what only gradients of parameters wait for; then what
    waits for their all-reduces. A small reduction comes as soon as its operands are there.
    """
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node, reads in kernels.items():
        for operand in reads:
            readers[operand].append(node)
    deferred = _deferred(kernels, readers)
    place: dict[Node, tuple[int, int]] = {}
    for node, reads in kernels.items():
        after = max((place[n] for n in reads), default=(0, 0))
        phase = int(node in deferred)
        if node.kind in ("update", "root") or (node.combined and node.kind == "slice"):
            phase = 3
        elif phase and node.num_bytes >= COMBINED_BYTES:
            phase = 2  # a gradient that is reduced alone
        place[node] = after if _joins(node) else max(after, (phase, node.number))
    for node in reversed(list(kernels)):
        if node.kind in ("filter", "full") and readers[node]:
            first = min(readers[node], key=lambda reader: (place[reader], reader.number))
            place[node] = place[first]
            # Zeros are written in one kernel with the first result that needs them, and twice if
            # that is no elementwise one.
            for copy in (n for n in readers[node] if n.kind == "copy" and not first.in_place):
                place[copy] = place[first]
    return sorted(kernels, key=lambda node: (place[node], node.number))


def _deferred(
    kernels: Mapping[Node, tuple[Node, ...]], readers: Mapping[Node, Sequence[Node]]
) -> set[Node]:
    """What only the updates wait for: gradients of parameters, their all-reduces, and updates."""
    result: set[Node] = set()
    for node in reversed(list(kernels)):
        heavy = node.kind in ("conv", "dot_general", "slice", *SUMS)
        waits = bool(readers[node]) and all(reader in result for reader in readers[node])
        if node.kind in ("update", "root") or node.combined or (heavy and waits):
            result.add(node)
    return result


def _most(order: Sequence[Node], kernels: Mapping[Node, tuple[Node, ...]]) -> tuple[Node, ...]:
    """What is in memory, arguments left out, when most is while the kernels run in this order."""
    last = {operand: node for node in order for operand in kernels[node]}
    live: dict[Node, None] = {}
    live_bytes = most_bytes = 0
    most: tuple[Node, ...] = ()
    for node in order:
        if node.argument:
            continue
        ends = [n for n in kernels[node] if last[n] is node and n in live]
        same = (n for n in ends if node.in_place and n.num_bytes == node.num_bytes)
        reused = next(same, None)
        if reused is not None:
            ends.remove(reused)
            del live[reused]
            live_bytes -= reused.num_bytes
        live[node] = None
        live_bytes += node.num_bytes
        if live_bytes > most_bytes:
            most_bytes, most = live_bytes, tuple(live)
        for operand in ends:
            del live[operand]
            live_bytes -= operand.num_bytes
    return most
