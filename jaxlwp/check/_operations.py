"""Floating-point operations of convolutions and matrix products in a compiled GPU program.

They come from shapes, window and dimension labels alone; a multiply-add is two. Convolutions are
XLA's instruction, alone or inside a fusion, or calls of cuDNN; products are XLA's, alone or inside
a fusion that Triton compiles, or calls of cuBLAS. Positions in the padding count, since kernels
compute them; the zeros between elements of a dilated operand do not.

Sources: XLA's page "Operation semantics" (convolution, dot); `GetGpuConvConfig` and the targets in
xla/service/gpu/cublas_cudnn.h: a call of cuDNN names the dimensions of the *forward* convolution,
whose input, filter or output is the result of the call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxlwp.check._module import Array, Instruction, Module, arrays, callees

FORWARD, BACKWARD_INPUT, BACKWARD_FILTER = (
    "convolution forward",
    "convolution backward-input",
    "convolution backward-filter",
)
PRODUCT = "product"

CUDNN = {
    "__cudnn$convForward": FORWARD,
    "__cudnn$convBiasActivationForward": FORWARD,
    "__cudnn$convForwardGraph": FORWARD,
    "__cudnn$convBackwardInput": BACKWARD_INPUT,
    "__cudnn$convBackwardFilter": BACKWARD_FILTER,
}
"""Targets of custom calls that are convolutions."""

CUBLAS = ("__cublas$gemm", "__cublas$lt$")
"""How targets of custom calls begin that are matrix products."""


class Work(NamedTuple):
    """Operations of one convolution or product.

    Attributes:
      kind: `FORWARD`, `BACKWARD_INPUT`, `BACKWARD_FILTER` or `PRODUCT`.
      flops: a multiply-add is two.
      dtype: XLA's name of the operands' type; the wider one if they differ.
      is_exact: whether float32 must not be rounded to TensorFloat-32.
      fits_winograd: whether it is a plain 3x3 convolution of stride 1.
    """

    kind: str
    flops: float
    dtype: str
    is_exact: bool
    fits_winograd: bool


Shapes = Mapping[str, str]
"""Shape of each instruction of a computation, by name."""


def work_of(instruction: Instruction, shapes: Shapes, module: Module) -> tuple[Work, ...]:
    """Convolutions and products that a kernel computes, those inside a fusion included.

    Args:
      instruction: the kernel.
      shapes: of the computation that it is in.
      module: the program.

    Raises:
      ValueError: a convolution or product that cannot be read.
    """
    if instruction.opcode == "fusion":
        return tuple(_inside(instruction, module))
    found = _work(instruction, shapes)
    return () if found is None else (found,)


def _inside(fusion: Instruction, module: Module) -> Iterator[Work]:
    for callee in callees(fusion, module):
        if not _HAS_WORK.search(module.text(callee)):
            continue
        body = module.instructions(callee)
        shapes = {i.name: i.shape for i in body}
        for instruction in body:
            yield from work_of(instruction, shapes, module)


_HAS_WORK = re.compile(r" (?:dot|convolution|custom-call|fusion)\(")


def _work(instruction: Instruction, shapes: Shapes) -> Work | None:
    try:
        if instruction.opcode == "dot":
            return _dot(instruction, shapes)
        if instruction.opcode == "convolution":
            return _convolution(instruction, shapes)
        if instruction.opcode == "custom-call":
            target = custom_call_target(instruction)
            if target in CUDNN:
                return _cudnn(CUDNN[target], instruction, shapes)
            if target.startswith(CUBLAS):
                return _dot(instruction, shapes)
    except (KeyError, IndexError, ValueError) as error:
        line = f"{instruction.opcode} of {instruction.operands}{instruction.attributes}"
        raise ValueError(f"%{instruction.name}: cannot count operations: {line[:300]}") from error
    return None


def custom_call_target(instruction: Instruction) -> str:
    """What a custom call calls, "" if it is none."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found.group(1) if found else ""


# --- Products ---------------------------------------------------------------------------------

_CONTRACTING = re.compile(
    r'lhs_contracting_dim(?:s=\{([\d,]*)\}|ension_?s"\s*:\s*\[([^\]]*)\])', re.IGNORECASE
)


def _dot(instruction: Instruction, shapes: Shapes) -> Work:
    """Twice the elements of the result times the length of what is contracted."""
    lhs, rhs = (_first(shapes[name]) for name in instruction.operands[:2])
    found = _CONTRACTING.search(instruction.attributes)
    if found is None:
        raise ValueError("no contracting dimensions")
    contracted = [lhs.dims[i] for i in _ints(found[1] or found[2] or "")]
    return Work(
        kind=PRODUCT,
        flops=2.0 * _first(instruction.shape).elements * math.prod(contracted),
        dtype=_wider(lhs, rhs),
        is_exact=_is_exact(instruction),
        fits_winograd=False,
    )


# --- Convolutions -----------------------------------------------------------------------------


class _Window(NamedTuple):
    """A window, one number per spatial dimension."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    lhs_dilate: tuple[int, ...]
    rhs_dilate: tuple[int, ...]
    is_reversed: bool


def _window(attributes: str) -> _Window:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    size = _ints(fields.get("size", ""))
    ones = (1,) * len(size)
    return _Window(
        size=size,
        stride=_ints(fields["stride"]) if "stride" in fields else ones,
        lhs_dilate=_ints(fields["lhs_dilate"]) if "lhs_dilate" in fields else ones,
        rhs_dilate=_ints(fields["rhs_dilate"]) if "rhs_dilate" in fields else ones,
        is_reversed="1" in fields.get("rhs_reversal", ""),
    )


def _labels(attributes: str) -> tuple[str, str, str]:
    """Dimension labels of operands and result: `b01f`, `01io`, `b01f`."""
    found = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
    if found is None:
        raise ValueError("no dimension labels")
    return found[1], found[2], found[3]


def _cudnn(kind: str, instruction: Instruction, shapes: Shapes) -> Work:
    """A call of cuDNN: output elements times what each sums up, of the forward convolution."""
    first, second = (_first(shapes[name]) for name in instruction.operands[:2])
    result = _first(instruction.shape)
    kernel, output = {
        FORWARD: (second, result),
        BACKWARD_INPUT: (second, first),
        BACKWARD_FILTER: (result, second),
    }[kind]
    features = kernel.dims[_labels(instruction.attributes)[1].index("o")]
    return Work(
        kind=kind,
        flops=2.0 * output.elements * kernel.elements / features,
        dtype=_wider(first, second),
        is_exact=_is_exact(instruction),
        fits_winograd=_fits_winograd(_window(instruction.attributes), instruction.attributes),
    )


def _convolution(instruction: Instruction, shapes: Shapes) -> Work:
    """XLA's own instruction, which writes gradients as convolutions, too."""
    lhs, rhs = (_first(shapes[name]) for name in instruction.operands[:2])
    result = _first(instruction.shape)
    lhs_labels, rhs_labels, out_labels = _labels(instruction.attributes)
    window = _window(instruction.attributes)
    pairs = 1.0
    for d, size in enumerate(window.size):
        out_size = result.dims[out_labels.index(str(d))]
        if window.lhs_dilate[d] == 1:
            pairs *= out_size * size
        else:  # each element between the zeros meets the whole window, in steps of the stride
            pairs *= lhs.dims[lhs_labels.index(str(d))] * size / window.stride[d]
    batch, features = (result.dims[out_labels.index(label)] for label in "bf")
    inputs = rhs.dims[rhs_labels.index("i")]
    kind = _kind(window, result, out_labels)
    return Work(
        kind=kind,
        flops=2.0 * batch * features * inputs * pairs,
        dtype=_wider(lhs, rhs),
        is_exact=_is_exact(instruction),
        fits_winograd=_fits_winograd(
            _forward_window(kind, window, result, out_labels), instruction.attributes
        ),
    )


def _kind(window: _Window, result: Array, out_labels: str) -> str:
    """What a convolution is for, by its form.

    The gradient of the filter has a window as large as the output was, and a result as large as
    the filter; the gradient of the input reverses the filter, or puts zeros between the elements.
    """
    spatial = [result.dims[out_labels.index(str(d))] for d in range(len(window.size))]
    if math.prod(window.size) > math.prod(spatial):
        return BACKWARD_FILTER
    if window.is_reversed or max(window.lhs_dilate, default=1) > 1:
        return BACKWARD_INPUT
    return FORWARD


def _forward_window(kind: str, window: _Window, result: Array, out_labels: str) -> _Window:
    """The window of the forward convolution that a gradient belongs to."""
    if kind == FORWARD:
        return window
    ones = (1,) * len(window.size)
    if kind == BACKWARD_INPUT:
        return window._replace(stride=window.lhs_dilate, lhs_dilate=ones)
    spatial = tuple(result.dims[out_labels.index(str(d))] for d in range(len(window.size)))
    return _Window(spatial, window.rhs_dilate, ones, window.stride, False)


def _fits_winograd(window: _Window, attributes: str) -> bool:
    grouped = re.search(r"(?:feature|batch)_group_count=(?!1\b)\d", attributes) is not None
    ones = (1, 1)
    return not grouped and window[:4] == ((3, 3), ones, ones, ones)


# --- Operands ---------------------------------------------------------------------------------


def _first(shape: str) -> Array:
    """The array of a shape, of a tuple the first: the others are workspace and side results."""
    return arrays(shape)[0]


def _wider(lhs: Array, rhs: Array) -> str:
    return max(lhs, rhs, key=lambda array: array.num_bytes / max(array.elements, 1)).dtype


def _is_exact(instruction: Instruction) -> bool:
    """Whether the precision asked for is the highest.

    By default and by "high" XLA lets cuDNN and cuBLAS round float32 to TensorFloat-32 where the
    GPU knows it (`allow_tf32` where `operand_precision` is at most HIGH), and Triton too.
    """
    found = re.search(r'operand_precision\W+([\w,"\s]*)', instruction.attributes)
    return found is not None and "highest" in found[1].lower()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
