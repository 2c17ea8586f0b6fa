"""Fusion: which operators have a kernel of their own, and what it reads.

As XLA's `PriorityFusion` has it: an elementwise operator, a broadcast, a slice, a concatenation has
no buffer of its own if all of its readers can evaluate it on the fly, and if that moves fewer
bytes: evaluated in n kernels that read r bytes for it, it costs n r; written once it costs r + w,
and n reads of its w bytes. So an activation is kept for the backward pass as what it is computed
from, and a mask not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence

from jaxlwp.kernels._node import REDUCTIONS, Node


def fuse(root: Node) -> dict[Node, tuple[Node, ...]]:
    """The kernels: nodes whose results are in memory, and the nodes in memory that they read."""
    nodes = post_order(root)
    required = {node for node in nodes if node.writes or node.argument}
    required.update(node.operands[i] for node in nodes for i in node.wants)
    required = _with_epilogues(nodes, required)
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
            count = max(1, sum(not joins(kernel) for kernel in kernels_of[node]))
            read_bytes = sum(min(n.num_bytes, node.num_bytes) for n in found)
            if (count - 1) * read_bytes > (count + 1) * node.num_bytes:
                written.add(node)
    return written, reads


def joins(kernel: Node) -> bool:
    """Whether XLA evaluates it beside another kernel that reads the same (`MultiOutputFusion`)."""
    read_bytes = max((n.num_bytes for n in kernel.operands), default=0)
    return kernel.kind in REDUCTIONS and 8 * kernel.num_bytes <= read_bytes


def _with_epilogues(nodes: Sequence[Node], required: set[Node]) -> set[Node]:
    """A convolution adds a bias and one tensor like its result, where nothing else reads it.

    It writes the sum (`CudnnFusedConvRewriter`); what it adds to its result is in memory.
    """
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        for operand in dict.fromkeys(node.operands):
            readers[operand].append(node)
    written = set(required)
    sums: set[Node] = set()
    for node in nodes:
        if node.kind != "conv":
            continue
        total, added = node, set[bool]()
        while len(readers[total]) == 1 and (reader := readers[total][0]) not in sums:
            others = [operand for operand in reader.operands if operand is not total]
            if reader.kind != "add" or reader.num_bytes != total.num_bytes or len(others) != 1:
                break
            bias = others[0].kind == "broadcast_in_dim" or others[0].num_bytes < total.num_bytes
            if bias in added:
                break
            if not bias:
                written.add(others[0])
            added.add(bias)
            total = reader
        sums.add(total)
        written.discard(node)
        written.add(total)
    return written


def library_call(node: Node, written: Container[Node]) -> Node | None:
    """The convolution or product that writes a node: itself, or what the node's additions end."""
    if node.eqn is not None:
        return node
    if node.kind != "add":
        return None
    terms = (library_call(n, written) for n in node.operands if n not in written)
    return next((call for call in terms if call is not None), None)


def _reading_kernels(nodes: Sequence[Node], written: set[Node]) -> dict[Node, set[Node]]:
    """For each node the kernels that would evaluate it, if only what must be is in memory."""
    kernels: dict[Node, set[Node]] = defaultdict(set)
    for node in reversed(nodes):
        for operand in node.operands:
            if not operand.argument:
                kernels[operand] |= {node} if node in written else kernels[node]
    return kernels


def post_order(root: Node) -> list[Node]:
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
