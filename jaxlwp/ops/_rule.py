"""What an operator rule says: the dimension names of an operator's tensors, its work, its lowering.

A `Signature` names the dimensions of every operand and result, in the manner of einsum: dimensions
with the same name are split together. From it follow, for any config, the layout in which each
operand must arrive, the layout of the results, and the reductions over split dimensions that appear
in no result. Windowed dimensions (convolution, pooling) name the window, from which the halo
exchange follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from jaxlwp.program import Border, Equation

Labels = tuple[str | None, ...]
"""For each dimension of an array its dimension name; None where it cannot be split."""

Role = Literal["anchor", "reduce", "follow", "lazy"]
"""How an operator becomes part of a layer.

anchor: starts a layer. reduce: starts a layer which later operators on the same operand join
(softmax, normalisation, losses). follow: joins the layer of its operand (bias, activation). lazy:
evaluated where it is used, in the layout asked for (broadcasts, iota, random bits).
"""


class Reach(Protocol):
    """Which elements of a split dimension the elements of the result read."""

    def __hash__(self) -> int:
        """Equal for what reads the same."""
        ...

    @property
    def border(self) -> Border:
        """The elements that stand beyond the array's ends."""
        ...

    def behind(self, border: Border) -> Reach:
        """The same of the array alone, where this one is said of the array with the border."""
        ...

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """First position, and one past the last, that the results `start` to `stop - 1` read.

        Either may lie outside the array, and `stop` beyond the result's end.
        """
        ...

    def left_over(self, start: int, stop: int) -> tuple[int, int, int]:
        """Padding (low, high) and base dilation that the elements read still need."""
        ...


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window that slides over one dimension.

    Attributes:
      size: elements under the window, dilation not counted.
      stride: step between windows.
      dilation: distance between the window's elements.
      pad_low: padding before the first element; negative cuts elements off.
      base_dilation: distance between the array's elements (transposed convolution): zeros between.
      border: elements that stand beyond the array's ends; beyond them is padding.
    """

    size: int = 1
    stride: int = 1
    dilation: int = 1
    pad_low: int = 0
    base_dilation: int = 1
    border: Border = Border()

    def behind(self, border: Border) -> Window:
        """See `Reach`."""
        pad_low = self.pad_low + len(border.before) * self.base_dilation
        return replace(self, pad_low=pad_low, border=border)

    @property
    def extent(self) -> int:
        """Elements from the first to the last under the window."""
        return (self.size - 1) * self.dilation + 1

    def _dilated(self, start: int, stop: int) -> tuple[int, int]:
        """First and last position read, counted in the array with its zeros between."""
        return (
            start * self.stride - self.pad_low,
            (stop - 1) * self.stride - self.pad_low + self.extent - 1,
        )

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """See `Reach`."""
        first, last = self._dilated(start, stop)
        return -(-first // self.base_dilation), last // self.base_dilation + 1

    def left_over(self, start: int, stop: int) -> tuple[int, int, int]:
        """See `Reach`: the zeros before the first element read and after the last."""
        first, last = self._dilated(start, stop)
        low, high = self.reads(start, stop)
        step = self.base_dilation
        return low * step - first, last - (high - 1) * step, step


@dataclass(frozen=True)
class Rows:
    """For each element of the result the elements that it reads (resizing).

    Attributes:
      first: first element read, for each element of the result.
      stop: one past the last.
      border: elements that stand beyond the array's ends.
    """

    first: tuple[int, ...]
    stop: tuple[int, ...]
    border: Border = Border()

    def behind(self, border: Border) -> Rows:
        """See `Reach`."""
        first, stop = (
            tuple(i - len(border.before) for i in each) for each in (self.first, self.stop)
        )
        return Rows(first, stop, border)

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """See `Reach`; beyond the result's end nothing more is read."""
        end = min(stop, len(self.first))
        start = min(start, end - 1)
        return min(self.first[start:end]), max(self.stop[start:end])

    def left_over(self, start: int, stop: int) -> tuple[int, int, int]:
        """See `Reach`: nothing is left to do."""
        return 0, 0, 1


Fill = Literal["zero", "lowest", "highest", "value"] | None


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Dimension names of an operator's tensors.

    Attributes:
      role: how this use of the operator joins a layer.
      operands: labels of each operand. A dimension that appears in operands but in no result is
        reduced.
      results: labels of each result.
      windows: dimension name -> what the result reads of it, for windowed dimensions of the first
        operand.
      even: dimension name -> a size that the degree of its split must divide (groups of a
        convolution, blocks of a reshape).
      fill: what padding holds in the operands: the neutral element ("zero", "lowest", "highest"),
        or "value" for the second operand, a scalar; None for operators whose padding does not mix
        with data.
      likely: for each operand and result, names for dimensions that have none yet; None stands for
        `default_names` everywhere.
    """

    role: Role
    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]
    windows: Mapping[str, Reach] = field(default_factory=dict)
    even: Mapping[str, int] = field(default_factory=dict)
    fill: Fill = None
    likely: tuple[Labels, ...] | None = None

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """All dimension names."""
        every = (label for labels in self.operands + self.results for label in labels)
        return frozenset(label for label in every if label is not None)

    @functools.cached_property
    def reduced(self) -> frozenset[str]:
        """Dimension names of operands that appear in no result."""
        kept = {label for labels in self.results for label in labels}
        return frozenset(self.names - kept)


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a lowering may know about the device it runs on.

    Attributes:
      names: the layer's dimension names of the first operand's dimensions.
      result_shapes: local shapes of the results.
      places: gives, for each result and dimension, the global index of the block's first element
        (a traced integer, or 0), and how many elements of the block are no padding (a traced
        integer; None where blocks have no padding). Called only where that is wanted: most
        operators do not ask where they are.
      haloed: dimension name -> (low padding, high padding, base dilation) that is left to apply,
        for dimensions whose halo is already in the first operand.
      varying: mesh axes over which the operands vary.
      reduced_axes: mesh axes that split a reduced dimension. Partial sums are added by the caller;
        a lowering with `combines` set does its own combination over them.
    """

    names: Labels
    result_shapes: tuple[tuple[int, ...], ...]
    places: Callable[[], tuple[tuple[tuple[Any, Any], ...], ...]]
    haloed: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    reduced_axes: tuple[str, ...] = ()


Lowering = Callable[[Equation, Sequence[Any], Local], tuple[Any, ...]]


def elementwise_flops(
    eqn: Equation, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> float:
    """One operation per element of the largest result."""
    return float(max((_size(shape) for shape in results), default=0))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


@dataclass(frozen=True, kw_only=True)
class Rule:
    """All that the project knows about one operator.

    Attributes:
      kind: the layer kind that reports show, such as "conv".
      signature: the dimension names for an equation; None if this use of the operator has no rule.
      lower: evaluates the operator on one device's blocks.
      flops: floating-point operations of the forward pass for given local operand and result
        shapes.
      combines: the lowering itself combines partial results over a split reduced dimension.
      lower_whole: evaluates the operator on whole arrays, where it is not split; the primitive
        itself by default.
      once: it is evaluated once, never where it is read. All other operators have derivatives that
        are linear in the cotangent: whether each of several readers evaluates them, and whether
        each device has a part of the cotangent, cannot be told apart.
      unread: positions of the results whose cotangents the derivative does not read.
      needed: `needed(equation, gradient)` gives the positions of the operands whose values the
        derivative needs, `gradient` says which operands have a cotangent; None if `_derivative`
        knows.
      weight_first: the signature, named for a weight on the left, of an operator with the same
        lowering whose weight may be either operand; `signature` takes it to be on the right.
    """

    kind: str
    signature: Callable[[Equation], Signature | None]
    lower: Lowering
    flops: Callable[[Equation, Sequence[Sequence[int]], Sequence[Sequence[int]]], float] = (
        elementwise_flops
    )
    combines: bool = False
    lower_whole: Callable[[Equation, Sequence[Any]], tuple[Any, ...]] | None = None
    once: bool = False
    unread: Callable[[Equation], tuple[int, ...]] = lambda eqn: ()
    needed: Callable[[Equation, Sequence[bool]], tuple[int, ...]] | None = None
    weight_first: Callable[[Equation], Signature] | None = None


def bind_lowering(eqn: Equation, operands: Sequence[Any], local: Local) -> tuple[Any, ...]:
    """Lowering of operators whose parameters do not depend on shapes."""
    return eqn.bind(*operands)


def spatial_names(rank: int) -> tuple[str, ...]:
    """Names of `rank` spatial dimensions."""
    return {0: (), 1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}.get(
        rank, tuple(f"space{i}" for i in range(rank))
    )


def anonymous(rank: int) -> tuple[str, ...]:
    """Dimension names of a tensor that takes the names its layers give it: "#0", "#1", ..."""
    return tuple(f"#{dim}" for dim in range(rank))


def default_names(rank: int) -> tuple[str, ...]:
    """Names for the dimensions of an activation of the given rank: sample, space, channel."""
    if rank == 0:
        return ()
    if rank == 1:
        return ("sample",)
    return ("sample", *spatial_names(rank - 2), "channel")
