"""What a config costs, in seconds: work on local shapes, and the collectives that it performs.

A `CostModel` answers two questions: what does a layer cost under a config, and what does moving a
tensor cost. `build_tables` (`_tables`) asks them for every layer and edge.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from jaxlwp.cost._changes import IntArray, Wanted, changes
from jaxlwp.cost._collectives import SpareSums, member_collectives, spare_sums
from jaxlwp.cost._kernels import Kernel, layer_kernels, update_kernels
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import FUSED, ComputationGraph, Layer, Member, Use
from jaxlwp.lower import filter_kind
from jaxlwp.ops import RULES, Labels
from jaxlwp.program import Equation
from jaxlwp.solver import FloatArray
from jaxlwp.space import (
    Config,
    Layout,
    copied_bytes,
    degree,
    even_layout,
    layout_axes,
)

Key = TypeVar("Key")


class LayerCosts(NamedTuple):
    """Seconds of one layer under each of its configs; every array has shape (configs,).

    Attributes:
      compute_s: forward and backward time of the operators.
      exchange_s: transfer inside the layer: halo exchanges, partial sums.
      sync_s: above all synchronisation of the parameters' gradients.
      overhead_s: the optimizer's update of its parameters, memory that it takes anew, and the way
        of the batch that it reads to the devices.
    """

    compute_s: FloatArray
    exchange_s: FloatArray
    sync_s: FloatArray
    overhead_s: FloatArray


class CostModel(Protocol):
    """A layer under its configs, moving a tensor between layouts, and what every step costs.

    Layers whose operators, shapes and arguments are alike are asked about once, and so are uses:
    answers may not depend on names or indices.
    """

    def step_s(self, graph: ComputationGraph) -> float:
        """Seconds of a step that every strategy has."""
        ...

    def layer(self, layer: Layer, configs: Sequence[Config]) -> LayerCosts:
        """Compute, internal transfer (halo, partial sums) and sync seconds of a layer."""
        ...

    def transfer_s(
        self, use: Use, sources: Sequence[Config], targets: Sequence[Config]
    ) -> FloatArray:
        """Seconds to bring a value from one layer's layouts to another's, both directions.

        Args:
          use: the value, and how the layers name its dimensions.
          sources: configs of the layer that holds it.
          targets: configs of the layer that reads it.

        Returns:
          Shape (sources, targets).
        """
        ...

    def behind(self, work_s: Sequence[float]) -> CostModel:
        """The model as it is where layers take so long; itself if nothing depends on that.

        Args:
          work_s: forward and backward seconds of each layer that is not fused, in its fastest
            config.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AnalyticCostModel:
    """Time of operations and memory traffic of local shapes; alpha-beta times of collectives.

    Attributes:
      devices: rates of devices and links.
      optimizer_slots: arrays like the parameters that the optimizer keeps: 1 for SGD with momentum,
        2 for Adam, 0 for an evaluation or plain SGD.
      temporary_bytes: of memory that a step takes anew on each device, in all, about.
      wait_s: seconds that devices wait for one another where a layer's work meets a collective.
      bucket_bytes: of each dtype in which parameters are moved, how many bytes of their collectives
        start together; empty where each starts.
      kernels: of each layer, where work is priced kernel by kernel.
      serial_share: of the time of collectives inside layers, what is not hidden behind the work of
        other layers; see `serial_share`.
    """

    devices: DeviceGraph
    optimizer_slots: float = 1.0
    temporary_bytes: float = 0.0
    wait_s: float = 0.0
    bucket_bytes: tuple[tuple[str, float], ...] = ()
    kernels: tuple[tuple[Kernel, ...], ...] = ()
    serial_share: float = 1.0

    @classmethod
    def of(
        cls, graph: ComputationGraph, devices: DeviceGraph, optimizer_slots: float = 1.0
    ) -> AnalyticCostModel:
        """The model of one graph's training step."""
        model = cls(
            devices=devices,
            optimizer_slots=optimizer_slots,
            temporary_bytes=temporary_bytes(graph, devices.num_devices),
            bucket_bytes=_buckets(graph, devices.bucket_bytes),
            kernels=layer_kernels(graph) if devices.fuses else (),
            serial_share=serial_share(graph) if devices.fuses else 1.0,
        )
        whole_s = [
            sum(map(model.whole_s, layer.members)) for layer in graph.layers if not layer.fused
        ]
        return model.behind([seconds / devices.num_devices for seconds in whole_s])

    def behind(self, work_s: Sequence[float]) -> AnalyticCostModel:
        """See `CostModel`: devices wait for one another about so long as behind a layer.

        As if each layer met a collective on the way forward and another on the way back. What ran
        since the last one depends on the strategy: costs of pairs cannot see it.
        """
        waits = [self.devices.wait_after_s(seconds / 2) for seconds in work_s]
        return replace(self, wait_s=statistics.fmean(waits) if waits else 0.0)

    def step_s(self, graph: ComputationGraph) -> float:
        """See `CostModel`: dispatch, every array that the step reads, the wait for the last."""
        leaves = len(graph.program.inputs) + self.optimizer_slots * graph.num_parameters
        return self.devices.step_s + leaves * self.devices.leaf_s + self.wait_s

    def layer(self, layer: Layer, configs: Sequence[Config]) -> LayerCosts:
        """See `CostModel`."""
        blocks = _Blocks(configs, self.devices.axis_sizes)
        compute_s, exchange_s, sync_s = np.zeros((3, len(configs)))
        for kernel in self.kernels[layer.index] if self.kernels else ():
            compute_s += self._kernel_s(kernel, blocks)
        for member in layer.members:
            if not self.kernels:
                compute_s += self._operator_s(member, blocks)
            exchange_s += self._member_s(member, configs)
        for use in layer.uses:
            if use.source == layer.index:
                total_s = sync_s if use.argument else exchange_s
                total_s += self._own_use_s(use, configs)
        for spare in spare_sums(layer):
            exchange_s -= self._spare_s(spare, configs)
        exchange_s *= self.serial_share
        return LayerCosts(compute_s, exchange_s, sync_s, self._overhead_s(layer, configs, blocks))

    def _overhead_s(self, layer: Layer, configs: Sequence[Config], blocks: _Blocks) -> FloatArray:
        """Seconds of update, new memory and input, for each config."""
        new_s = self.devices.first_touch_s(self.temporary_bytes)
        total_s = np.zeros(blocks.count)
        for info, labels in layer.outputs:
            total_s += new_s * info.itemsize * blocks.elements(info.shape, labels)
        # The update reads parameter, gradient and slots, and writes parameter and slots.
        update_s = (3 + 2 * self.optimizer_slots) * self.devices.update_pass_byte_s
        stored = [u for u in layer.uses if u.argument and u.source == layer.index]
        convolutions = (m.equation for m in layer.members if filter_kind(m.equation))
        vectors = {eqn.operand_values[1].shape for eqn in convolutions}
        for first, use in first_of_value(stored):
            num_bytes = use.info.itemsize * blocks.elements(use.info.shape, use.source_labels)
            if use.fed:
                total_s += self.devices.input_byte_s * num_bytes
            if not use.gradient:
                continue
            # A gradient that is summed over devices is there twice: before and after.
            summed = [
                len(active - layout_axes(layout)) > 0 for layout, active in _wanted(use, configs)
            ]
            pass_s = update_s if first else 0.0
            total_s += (pass_s + new_s * (1 + np.array(summed))) * num_bytes
            if self.kernels:
                vector = use.info.shape in vectors
                sums = use.moved.itemsize / use.info.itemsize * np.array(summed)
                starts, copied = update_kernels(use.info, sums, vector=vector, again=not first)
                total_s += starts * self.devices.overhead_s
                total_s += copied * num_bytes / self.devices.memory_bytes_per_s
        return total_s

    def transfer_s(
        self, use: Use, sources: Sequence[Config], targets: Sequence[Config]
    ) -> FloatArray:
        """See `CostModel`."""
        rows, row_of = distinct(_source_layouts(use, sources, self.devices.axis_sizes))
        columns, column_of = distinct(_wanted(use, targets))
        table = self._changes_s(use, rows, columns, every_pair=True)
        table = table.reshape(len(rows), len(columns)) + self._copies_s(use, rows, columns)
        return table[np.ix_(row_of, column_of)]

    def _copies_s(
        self, use: Use, sources: Sequence[Layout], targets: Sequence[Wanted]
    ) -> FloatArray:
        """Seconds of the new memory that what is laid out anew takes, shape (sources, targets)."""
        wanted = [layout for layout, _ in targets]
        sizes = self.devices.axis_sizes
        num_bytes = copied_bytes(use.moved.shape, use.moved.itemsize, sources, wanted, sizes)
        return self.devices.first_touch_s(self.temporary_bytes) * num_bytes.astype(np.float64)

    def _own_use_s(self, use: Use, configs: Sequence[Config]) -> FloatArray:
        """Seconds of a change of layout inside a layer, for each of its configs."""
        sources = _source_layouts(use, configs, self.devices.axis_sizes)
        pairs, pair_of = distinct(list(zip(sources, _wanted(use, configs), strict=True)))
        rows, columns = zip(*pairs, strict=True)
        return self._changes_s(use, rows, columns, every_pair=False)[pair_of]

    def _changes_s(
        self, use: Use, sources: Sequence[Layout], targets: Sequence[Wanted], *, every_pair: bool
    ) -> FloatArray:
        """Seconds of changes of layout of one value; see `changes`."""
        table = changes(
            sources=tuple(sources),
            targets=tuple(targets),
            every_pair=every_pair,
            shape=tuple(math.gcd(size, self.devices.num_devices) for size in use.info.shape),
            forward=1 + use.recomputed,
            backward=int(use.gradient),
            devices=self.devices,
            wait_s=0.0 if use.argument else self.wait_s,
            bucket_bytes=dict(self.bucket_bytes).get(str(use.moved.dtype), 0.0)
            if use.argument
            else 0.0,
        )
        exposed = self.devices.exposed_share if use.argument and use.gradient else 1.0
        return exposed * table.seconds(use.moved.shape, use.moved.itemsize)

    def _member_s(self, member: Member, configs: Sequence[Config]) -> FloatArray:
        """Seconds of the collectives of one operator, for each config."""
        signature, sizes = member.signature, self.devices.axis_sizes
        names, mixed = signature.names, signature.reduced.union(signature.windows)

        def part(config: Config) -> tuple[tuple[str, tuple[str, ...]], ...]:
            """The splits that matter: none if no split dimension's elements are mixed."""
            splits = tuple(split for split in config.splits if split[0] in names)
            return splits if any(name in mixed for name, _ in splits) else ()

        if not mixed:
            return np.zeros(len(configs))
        parts, part_of = distinct([part(config) for config in configs])
        collectives = [member_collectives(member, Config(splits), sizes) for splits in parts]
        seconds = [
            sum(map(self.devices.collective_s, every))
            + self.wait_s * len({c.backward for c in every if c.backward or member.awaited})
            for every in collectives
        ]
        return np.array(seconds, dtype=np.float64)[part_of]

    def _spare_s(self, spare: SpareSums, configs: Sequence[Config]) -> FloatArray:
        """Seconds of starting all-reduces, and waiting, that do not run, for each config."""
        every = [tuple(a for name in spare.names for a in c.axes(name)) for c in configs]
        sums, sum_of = distinct(every)
        wait_s = self.wait_s if spare.awaited else 0.0
        once_s = [
            self.devices.link_rate("all-reduce", axes)[0] + wait_s if axes else 0.0 for axes in sums
        ]
        return spare.count * np.array(once_s, dtype=np.float64)[sum_of]

    def whole_s(self, member: Member) -> float:
        """Forward and backward seconds of one operator that is not split."""
        return float(self._operator_s(member, _Blocks([Config()], {}))[0])

    def _kernel_s(self, kernel: Kernel, blocks: _Blocks) -> FloatArray:
        """Seconds of a kernel on local shapes, for each config: the roofline's."""
        moved = np.zeros(blocks.count)
        for shape, labels, itemsize, factor in kernel.traffic:
            moved += factor * itemsize * blocks.elements(shape, labels)
        busy_s = moved / self.devices.memory_bytes_per_s
        if kernel.kind:
            shape, names = kernel.work
            share = blocks.elements(shape, names) / max(math.prod(shape), 1)
            rate = self.devices.flops_per_s(kernel.kind, kernel.dtype)
            busy_s = np.maximum(busy_s, share * kernel.flops / rate)
        return kernel.starts * self.devices.overhead_s + busy_s

    def _operator_s(self, member: Member, blocks: _Blocks) -> FloatArray:
        """Forward and backward seconds of one operator on its local shapes, for each config."""
        signature, eqn = member.signature, member.equation
        labels = (*signature.operands, *signature.results)
        values = (*eqn.operand_values, *eqn.result_values)
        tensors = list(zip(values, labels, strict=True))
        moved = np.zeros(blocks.count)
        for value, names in tensors:
            moved += blocks.elements(value.shape, names) * value.itemsize
        rule, passes = RULES.get(eqn.name), passes_of(member)
        rate, start_s = work_rate(eqn, self.devices), start_of_kernel_s(eqn, self.devices)
        if rule is None or rate is None:
            return passes * (moved / self.devices.memory_bytes_per_s + start_s)
        local = zip(*(blocks.shapes(v.shape, names).tolist() for v, names in tensors), strict=True)
        inputs = len(eqn.operand_values)
        flops = np.array([rule.flops(eqn, each[:inputs], each[inputs:]) for each in local])
        # A sum, not the roofline's maximum: an operator that reads more for the same operations
        # is never as fast, and where operations dominate the maximum would hide that.
        once_s = flops / rate + moved / self.devices.memory_bytes_per_s
        return passes * (once_s + start_s)


def work_rate(eqn: Equation, devices: DeviceGraph) -> float | None:
    """Operations per second of an operator; None where memory traffic alone is priced."""
    rule = RULES.get(eqn.name)
    if rule is None or rule.kind not in ("conv", "dense", "scan"):
        return None
    dtypes = [value.dtype for value in eqn.operand_values if value.differentiable]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize, default="float32")
    return devices.flops_per_s(rule.kind, str(widest))


def start_of_kernel_s(eqn: Equation, devices: DeviceGraph) -> float:
    """Seconds that a pass of an operator takes to start; 0 if it is fused with its neighbours."""
    rule = RULES.get(eqn.name)
    return 0.0 if rule is not None and rule.kind in FUSED else devices.overhead_s


def passes_of(member: Member) -> int:
    """How often an operator's work is done in a step, forward and backward."""
    rule = RULES.get(member.equation.name)
    kind = rule.kind if rule else "unknown"
    passes = 1 + sum(member.gradient)
    if kind == "scan":
        passes = min(passes, 3)  # as of a matrix product, however many operands there are
    elif kind not in ("conv", "dense"):
        passes = min(passes, 2)  # fused with its neighbours: what counts is one pass over memory
    return passes + member.recomputed


class _Blocks:
    """Local shapes under every config of a layer, padding included."""

    def __init__(self, configs: Sequence[Config], axis_sizes: dict[str, int]) -> None:
        self.count = len(configs)
        names = {name for config in configs for name, _ in config.splits}
        self._degrees = {
            name: np.array([degree(c.axes(name), axis_sizes) for c in configs]) for name in names
        }
        self._elements: dict[tuple[tuple[int, ...], Labels], IntArray] = {}

    def shapes(self, shape: Sequence[int], labels: Labels) -> IntArray:
        """Shape (configs, rank): the local shapes of a tensor."""
        result = np.tile(np.array(shape, dtype=np.int64), (self.count, 1))
        for dim, name in enumerate(labels):
            if name in self._degrees:
                result[:, dim] = -(-result[:, dim] // self._degrees[name])
        return result

    def elements(self, shape: tuple[int, ...], labels: Labels) -> IntArray:
        """Shape (configs,): elements of the local shapes, kept for the next operator."""
        key = shape, labels
        if key not in self._elements:
            self._elements[key] = self.shapes(shape, labels).prod(axis=1)
        return self._elements[key]


def first_of_value(uses: Iterable[Use]) -> list[tuple[bool, Use]]:
    """Uses, each with whether it is the first with a gradient: a parameter is updated once."""
    seen: set[int] = set()
    result = []
    for use in uses:
        result.append((use.value not in seen, use))
        if use.gradient:
            seen.add(use.value)
    return result


def _source_layouts(
    use: Use, configs: Sequence[Config], axis_sizes: dict[str, int]
) -> list[Layout]:
    """Layout in which the reader finds the value, for each config of its source."""
    layouts = [config.layout(use.source_labels) for config in configs]
    if not use.argument:
        return layouts
    even = {layout: even_layout(use.info.shape, layout, axis_sizes) for layout in set(layouts)}
    return [even[layout] for layout in layouts]


def _wanted(use: Use, configs: Sequence[Config]) -> list[Wanted]:
    """What the reader asks for under each of its configs."""
    return [
        (c.layout(use.labels), frozenset(a for name in use.active for a in c.axes(name)))
        for c in configs
    ]


def distinct(keys: Sequence[Key]) -> tuple[list[Key], list[int]]:
    """The distinct keys, and for each key its position among them."""
    numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return list(numbers), [numbers[key] for key in keys]


def temporary_bytes(graph: ComputationGraph, num_devices: int) -> float:
    """About how many bytes of activations and gradients a step keeps on each device."""
    values = graph.program.values
    kept = [value for layer in graph.layers for value, _ in layer.outputs]
    parameters = [
        values[i] for i in graph.program.inputs[: graph.num_parameters] if i in graph.gradients
    ]
    activations_bytes = sum(math.prod(v.shape) * v.itemsize for v in kept)
    gradients_bytes = sum(math.prod(v.shape) * v.itemsize for v in parameters)
    return activations_bytes / num_devices + gradients_bytes


def serial_share(graph: ComputationGraph) -> float:
    """Layers one after the other, of all layers: 1 for a chain, less where there are branches.

    While a layer of one branch communicates, XLA for GPUs has another branch's layers compute. How
    much is hidden depends on the schedule; on average it is about what is not on the longest path.
    """
    counts = [int(not layer.fused) for layer in graph.layers]
    longest = list(counts)
    for edge in sorted(graph.edges, key=lambda edge: edge.target):
        if edge.source < edge.target and not edge.use.argument:
            longest[edge.target] = max(
                longest[edge.target], longest[edge.source] + counts[edge.target]
            )
    return max(longest, default=1) / max(sum(counts), 1)


def _buckets(graph: ComputationGraph, most_bytes: float) -> tuple[tuple[str, float], ...]:
    """Bytes of gradients that start together, by dtype: all that there are, or what a bucket holds.

    As many gradients as there are under data parallelism; where fewer bytes are sent, a bucket of
    that size is filled less, and the start of one is charged in part.
    """
    if not most_bytes:
        return ()
    sizes = {
        (use.value, str(use.moved.dtype)): math.prod(use.moved.shape) * use.moved.itemsize
        for layer in graph.layers
        for use in layer.uses
        if use.argument and use.gradient
    }
    total: Counter[str] = Counter()
    for (_, dtype), num_bytes in sizes.items():
        total[dtype] += num_bytes
    return tuple((dtype, min(most_bytes, num_bytes)) for dtype, num_bytes in total.items())
