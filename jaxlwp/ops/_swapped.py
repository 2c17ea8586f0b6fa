"""Convolutions that end the process in XLA for processors, and how to keep away from them.

XLA's algebraic simplifier swaps the operands of a convolution if the kernel is larger than the
input. A spatial dimension that nothing pads, with base dilation = kernel size = stride + 1, it
takes for one of groups, and leaves its window as it is; but the kernel is the other operand then.
If that has another size, the process ends: "Window dimensions do not match RHS shape" (JAX 0.10.2
and 0.12; conv_operand_swapper.cc). Gradients of a convolution are convolutions, too.

On one device a program is hardly ever such a one. A device's part of it is, as soon as halos took
the place of its padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ConvDim:
    """A spatial dimension of a convolution: what XLA knows of it.

    Attributes:
      rows: size of the input.
      kernel: size of the kernel.
      low: padding before the dilated input.
      high: padding behind it.
      base: dilation of the input.
      dilation: of the kernel.
      stride: of the result.
    """

    rows: int
    kernel: int
    low: int
    high: int
    base: int
    dilation: int
    stride: int

    @property
    def dilated_rows(self) -> int:
        """Size of the dilated input."""
        return (self.rows - 1) * self.base + 1

    @property
    def dilated_kernel(self) -> int:
        """Size of the dilated kernel."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def made(self) -> int:
        """Rows of the result."""
        return (self.dilated_rows + self.low + self.high - self.dilated_kernel) // self.stride + 1

    @property
    def bare(self) -> bool:
        """Whether neither input nor kernel is more than it is, but for a dilated input."""
        return self.low == self.high == 0 and self.dilation == 1


def rows_to_add(windows: Sequence[ConvDim]) -> tuple[int, ...]:
    """How many rows of zeros to add to the input, in each spatial dimension, for XLA to compile it.

    The padding behind them becomes smaller by as much, so the result is the same: `with_rows`.
    """
    counts = sorted(itertools.product(range(3), repeat=len(windows)), key=sum)
    return next(
        added
        for added in counts
        if not any(map(_ends_xla, _convolutions([*map(with_rows, windows, added)])))
    )


def with_rows(window: ConvDim, added: int) -> ConvDim:
    """The same with rows of zeros behind the input that the padding takes away again."""
    return replace(window, rows=window.rows + added, high=window.high - added * window.base)


def _convolutions(windows: Sequence[ConvDim]) -> tuple[tuple[ConvDim, ...], ...]:
    """The convolution, and those that JAX makes of it for the gradients of kernel and input."""
    return (
        tuple(windows),
        tuple(map(_kernel_gradient, windows)),
        tuple(map(_input_gradient, windows)),
    )


def _kernel_gradient(w: ConvDim) -> ConvDim:
    """The input, convolved with the result's gradient."""
    dilated_result = (w.made - 1) * w.stride + 1
    high = w.dilated_kernel + dilated_result - w.dilated_rows - 1 - w.low
    return replace(w, kernel=w.made, dilation=w.stride, stride=w.dilation, high=high)


def _input_gradient(w: ConvDim) -> ConvDim:
    """The result's gradient, convolved with the kernel turned round."""
    low = w.dilated_kernel - w.low - 1
    high = w.dilated_rows + w.dilated_kernel - 1 - ((w.made - 1) * w.stride + 1) - low
    return replace(w, rows=w.made, base=w.stride, stride=w.base, low=low, high=high)


def _ends_xla(windows: Sequence[ConvDim]) -> bool:
    """Whether XLA swaps the operands of a convolution, and takes a window for another's."""
    groups = [w for w in windows if w.bare and w.base == w.kernel and w.stride == w.kernel - 1]
    whole = [w for w in windows if w.bare and w.rows == w.kernel and w.base == w.stride == 1]
    others = [w for w in windows if w not in groups and w not in whole]
    once = [
        w.rows == w.stride == w.dilation == 1 and w.low == w.high == w.kernel - 1 for w in others
    ]
    swapped = [w.kernel if o else w.rows for w, o in zip(others, once, strict=True)]
    larger = math.prod(w.kernel for w in others) > math.prod(swapped)
    return larger and any(w.rows != w.kernel for w in groups)
