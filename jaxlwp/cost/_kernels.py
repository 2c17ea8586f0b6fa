"""Work priced kernel by kernel, as XLA for GPUs fuses it.

Operators that are fused read and write nothing of their own. So what a layer takes is not the sum
of what its operators would take alone. The differentiated program, not split, is fused as XLA does
(`jaxlwp.kernels`); each kernel belongs to the layer for which it runs. What it reads and writes
under a config follows from the names of the layer's dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.kernels import (
    LIBRARY,
    REDUCTIONS,
    Builder,
    Node,
    differentiated,
    fuse,
    joins,
    library_call,
)
from jaxlwp.lower import Lowered, layer_index
from jaxlwp.ops import RULES, Labels, reshape_groups
from jaxlwp.program import Value
from jaxlwp.solver import FloatArray
from jaxlwp.space import Config

SPLIT_REDUCTION = 1024
"""Elements that are reduced to one, from which on XLA makes two kernels of a reduction."""


SLICES = ("slice", "dynamic_slice", "split")
"""Fused operators that read a part of their operand."""


class Traffic(NamedTuple):
    """A tensor that a kernel reads or writes: `factor` times its elements' bytes."""

    shape: tuple[int, ...]
    labels: Labels
    itemsize: int
    factor: float


@dataclass(frozen=True)
class Kernel:
    """A kernel of a layer.

    Attributes:
      traffic: what it reads and writes.
      starts: how many kernels it is when it runs.
      kind: "conv" or "dense" for a library call, whose operations count, else "".
      flops: operations of the whole.
      dtype: of the operands of a library call.
      work: shape and names of the dimensions over which the operations are split.
    """

    traffic: tuple[Traffic, ...]
    starts: int
    kind: str = ""
    flops: float = 0.0
    dtype: str = ""
    work: tuple[tuple[int, ...], Labels] = ((), ())


def layer_kernels(graph: ComputationGraph) -> tuple[tuple[Kernel, ...], ...]:
    """The kernels of every layer, forward and backward; the parameters' updates are in none."""
    whole = (Config(),) * len(graph.layers)
    lowered = Lowered(graph=graph, configs=whole, axis_sizes={"device": 1})
    local = differentiated(lowered, alike=True)
    kernels = fuse(Builder(local.program).root(local.gradients))
    of_layer: dict[int, list[Node]] = {}
    for node in kernels:
        index = layer_index((library_call(node, kernels) or node).scope)
        if index is not None and not node.argument:
            of_layer.setdefault(index, []).append(node)
    readers = (_LayerReader(layer, kernels) for layer in graph.layers)
    return tuple(reader.kernels(of_layer.get(reader.layer.index, [])) for reader in readers)


def update_kernels(
    parameter: Value, sums: FloatArray, *, vector: bool = False, again: bool = False
) -> tuple[FloatArray, FloatArray]:
    """What the optimizer's update of a parameter takes besides one pass over its arrays.

    cuDNN has filters in an order of its own: gradients and parameters are copied into it and back.
    Where the gradient is a vector, it alone is. Small parameters are updated several in one kernel.
    Sums that are joined are copied into a bucket and out of it.

    Args:
      parameter: its shape and dtype.
      sums: bytes that are summed over devices, for each byte of the parameter, for each config.
      vector: it is a filter whose gradient is taken as a vector (`filter_kind`).
      again: the update is counted already; these are further sums of its gradient.

    Returns:
      Kernels that start, and bytes that are copied for each byte of the parameter, each of shape
      (configs,). Counted in the programs that JAX 0.10.2 compiles of ResNet-50 and VGG-16.
    """
    rank = len(parameter.shape)
    starts = 0.0 if again else 3.0 if vector else 4.0 if rank > 2 else 1.0 if rank == 2 else 0.5
    copied = 0.0 if again else 1.0 if vector else 4.0 if rank > 2 else 0.0
    return np.asarray(starts + 1.5 * (sums > 0)), np.asarray(copied + 2.5 * sums)


@dataclass(frozen=True)
class _Call:
    """A convolution or a matrix product of a layer.

    Attributes:
      work: sizes and names of all of its dimensions.
      tensors: shapes and names of its operands and its result. Of its gradients, one operand has
        the names of the result.
    """

    work: tuple[tuple[int, ...], Labels]
    tensors: tuple[tuple[tuple[int, ...], Labels], ...]

    def renamed(self, traffic: Sequence[Traffic]) -> tuple[Traffic, ...]:
        """What the call, or its gradient, reads and writes: each of its tensors once.

        By shape alone the operand and the result of a convolution of as many channels are the same.
        """
        left = list(self.tensors)
        result = []
        for tensor in traffic:
            found = next((t for t in left if t[0] == tensor.shape), None)
            if found is not None:
                left.remove(found)
                tensor = tensor._replace(labels=found[1])
            result.append(tensor)
        return tuple(result)


class _LayerReader:
    """Names the dimensions of what a layer's kernels read and write."""

    def __init__(self, layer: Layer, kernels: Mapping[Node, tuple[Node, ...]]) -> None:
        self.layer, self.written = layer, kernels
        self.labels: dict[tuple[int, ...], Labels] = {}
        self.calls: dict[str, _Call] = {}
        for member in layer.members:
            eqn, signature = member.equation, member.signature
            values = (*eqn.operand_values, *eqn.result_values)
            sizes: dict[str, int] = {}
            for value, labels in zip(
                values, (*signature.operands, *signature.results), strict=True
            ):
                known = self.labels.get(value.shape, ())
                if sum(map(bool, labels)) >= sum(map(bool, known)):
                    self.labels[value.shape] = labels
                sizes |= {n: s for n, s in zip(labels, value.shape, strict=True) if n}
            if eqn.name in LIBRARY:
                tensors = zip(values, (*signature.operands, *signature.results), strict=True)
                named = tuple((value.shape, labels) for value, labels in tensors)
                work = tuple(sizes.values()), tuple(sizes)
                self.calls.setdefault(eqn.name, _Call(work, named))

    def kernels(self, nodes: Sequence[Node]) -> tuple[Kernel, ...]:
        """The kernels; reductions that read the same tensors are one kernel."""
        read: set[frozenset[Node]] = set()
        result = []
        for node in nodes:
            reads = self.reads(node)
            most = max((each.num_bytes for each in reads), default=0)
            large = frozenset(each for each in reads if 8 * each.num_bytes > most)
            beside = joins(node) and large in read
            if joins(node):
                read.add(large)
            result.append(self.kernel(node, () if beside else reads, most, beside))
        return tuple(result)

    def reads(self, node: Node) -> tuple[Node, ...]:
        """What a kernel reads: nodes in memory, or slices of them that it evaluates itself."""
        found: dict[Node, None] = {}
        seen = set[Node]()
        stack = list(reversed(node.operands))
        while stack:
            operand = stack.pop()
            if operand in seen:
                continue
            seen.add(operand)
            if operand.argument or operand in self.written or operand.kind in SLICES:
                found[operand] = None
            else:
                stack += reversed(operand.operands)
        return tuple(found)

    def kernel(self, node: Node, reads: Sequence[Node], most: int, beside: bool) -> Kernel:
        """A kernel of these reads, the largest of which has `most` bytes."""
        traffic = tuple(self.tensor(each) for each in (*reads, node) if each.num_bytes)
        split = node.kind in REDUCTIONS and most >= SPLIT_REDUCTION * max(node.num_bytes, 1)
        starts = int(not beside) + int(split)
        call = library_call(node, self.written)
        if call is None or call.eqn is None:
            return Kernel(traffic, starts)
        eqn = call.eqn
        shapes = [v.shape for v in eqn.operand_values], [v.shape for v in eqn.result_values]
        rule = RULES[eqn.name]
        own = self.calls.get(eqn.name, _Call(((), ()), ()))
        flops, dtype = rule.flops(eqn, *shapes), str(eqn.operand_values[0].dtype)
        if any(operand.kind == "pad" for operand in call.operands):
            # Between the elements of a padded copy are zeros, and operations with them are done.
            flops *= math.prod(eqn.params["lhs_dilation"]) * math.prod(eqn.params["rhs_dilation"])
        return Kernel(own.renamed(traffic), starts, rule.kind, flops, dtype, own.work)

    def tensor(self, node: Node) -> Traffic:
        """What a node holds, by a tensor of the layer of the same shape.

        A step in between has the shape of what it is made of, and that tensor's bytes by a factor.
        """
        source = node
        while source.info is None and source.operands:
            source = max(source.operands, key=lambda operand: operand.num_bytes)
        if source.info is None:  # as the layer's largest tensor
            shape, itemsize = max(self.labels, key=math.prod, default=()), 1
        else:
            shape, itemsize = source.info.shape, source.info.itemsize
        factor = node.num_bytes / max(math.prod(shape) * itemsize, 1)
        return Traffic(shape, self.named(shape), itemsize, factor)

    def named(self, shape: tuple[int, ...]) -> Labels:
        """Names of the dimensions of an array of that shape, or of one that is transposed."""
        if shape in self.labels:
            return self.labels[shape]
        alike = (s for s in self.labels if sorted(s) == sorted(shape) and len(s) <= 5)
        found = next(alike, None)
        if found is None:
            return self.regrouped(shape) or self.resembling(shape)
        orders = itertools.permutations(range(len(found)))
        order = next(o for o in orders if tuple(found[d] for d in o) == shape)
        return tuple(self.labels[found][d] for d in order)

    def regrouped(self, shape: tuple[int, ...]) -> Labels | None:
        """Names where an array of the layer is the same one reshaped.

        Of dimensions that are merged, or of which one is divided, the most significant one has the
        name: the one that the rule of reshapes splits.
        """
        for known, labels in self.labels.items():
            if math.prod(known) != math.prod(shape) or not math.prod(shape):
                continue
            found: list[str | None] = [None] * len(shape)
            for before, after in reshape_groups(known, shape):
                found[after[0]] = labels[before[0]]
            return tuple(found)
        return None

    def resembling(self, shape: tuple[int, ...]) -> Labels:
        """Names of the dimensions of the tensor of the layer that is most like it.

        A dimension of another size has the name too if it is a multiple, or a part: of what is
        resized, or of a window.
        """
        alike = (known for known in self.labels if len(known) == len(shape))

        def equal(known: tuple[int, ...]) -> int:
            return sum(a == b for a, b in zip(known, shape, strict=True))

        found = max(alike, key=equal, default=None)
        if found is None:
            return (None,) * len(shape)
        related = 2 * equal(found) >= len(shape)

        def same(a: int, b: int) -> bool:
            return a == b or (related and min(a, b) > 1 and max(a, b) % min(a, b) == 0)

        pairs = zip(found, shape, self.labels[found], strict=True)
        return tuple(label if same(a, b) else None for a, b, label in pairs)
