"""Which buffers a compiled program holds, and when: its memory, predicted from its kernels.

The kernels are those of one device's program, differentiated (`jaxlwp.kernels`). What XLA does with
them for GPUs is imitated, by rule, as far as it decides about memory:

- *Order*: the chain of activations and their gradients first; what only gradients of parameters
  wait for (above all the convolutions that make them) after it, since that overlaps with
  collectives (`LatencyHidingScheduler`); large gradients that are reduced alone after the combined
  ones; the updates last. So every convolution's input and output gradient are kept until the chain
  has ended. A small reduction is evaluated beside the kernel that made or read its operand
  (multi-output fusion).
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

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxlwp.devices import BUCKET_BYTES
from jaxlwp.kernels import SUMS, Builder, Node, fuse, joins
from jaxlwp.program import Program


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
        inputs, which the update that follows overwrites; empty for an evaluation, which keeps
        nothing.
      loss: position of the loss among the outputs.

    Returns:
      Its memory, that of the arguments left out.
    """
    builder = Builder(program, _held)
    root = builder.root(gradients)
    kernels = fuse(root)
    order = _order(kernels)
    live = _most(order, kernels)
    end = builder.operand(program.outputs[loss]).number
    kept = dict.fromkeys(
        operand
        for node, reads in kernels.items()
        for operand in reads
        if gradients and operand.number <= end < node.number and not operand.argument
    )
    return Buffers(
        live_bytes=sum(node.num_bytes for node in live),
        live=tuple(sorted(live, key=lambda node: -node.num_bytes)),
        kept=tuple(kept),
        tags=tuple(builder.tag(node) for node in kept),
    )


def _held(kernels: Mapping[Node, tuple[Node, ...]]) -> int:
    """Bytes that one iteration of a loop holds at most; the next one uses the same memory."""
    return sum(node.num_bytes for node in _most(_order(kernels), kernels))


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
        elif phase and node.num_bytes >= BUCKET_BYTES:
            phase = 2  # a gradient that is reduced alone
        place[node] = after if joins(node) else max(after, (phase, node.number))
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
