"""Kernels of a compiled GPU program: kind, bytes, operations, seconds.

One kernel for each instruction that is not merely a name for memory. A kernel takes its start, and
then the longer of its bytes at the memory's rate and its operations at the arithmetic rate of its
operands' type; rates are those that kernels reach (`jaxlwp.devices.Gpu`). float32 is rounded to
TensorFloat-32 where the GPU has it, as JAX has it by default, unless the precision asked for is
the highest; without it, 3x3 convolutions of stride 1 run by Winograd's method.

Sources: JAX's page "Matmul precision" (TF32 on recent GPUs by default); XLA, `allow_tf32` in
xla/backends/gpu/autotuner and xla/service/gpu/autotuning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxlwp.check._module import Instruction, Module, callees, op_name
from jaxlwp.check._operations import PRODUCT, Shapes, Work, custom_call_target, work_of
from jaxlwp.check._traffic import Fused, kernel_bytes

if TYPE_CHECKING:
    from jaxlwp.devices import Gpu

FUSION, REDUCTION, COPY, OTHER = "fusion", "reduction", "copy", "other"

NO_KERNEL = frozenset(
    "add-dependency after-all bitcast constant domain get-dimension-size get-tuple-element "
    "opt-barrier optimization-barrier parameter tuple".split()
)
"""Opcodes that are names for memory that is there."""

_MARKERS = frozenset({"Sharding", "AllocateBuffer", "Pin", "Unpin", "annotate_device_placement"})
"""Targets of custom calls that run nothing."""

_MOVES = frozenset(
    "bitcast broadcast concatenate constant copy copy-start dynamic-slice dynamic-update-slice "
    "get-tuple-element pad parameter reshape reverse slice transpose tuple".split()
)
"""Opcodes that bring data to another place and compute nothing."""

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
"""XLA's names of element types, and numpy's."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
      name: of the instruction.
      kind: "convolution forward", "convolution backward-input", "convolution backward-filter",
        "product", "fusion", "reduction", "copy" (of whatever layout) or "other".
      num_bytes: read and written.
      flops: of convolutions and products.
      dtype: of their operands as the arithmetic units take them, as in "tensorfloat32"; "" where
        there are none.
      seconds: start included.
      op_name: where it comes from, in JAX's words.
    """

    name: str
    kind: str
    num_bytes: int
    flops: float
    dtype: str
    seconds: float
    op_name: str


@dataclass(frozen=True, kw_only=True)
class KernelReader:
    """Reads the kernels of one program for one GPU model.

    Attributes:
      module: the program.
      gpu: what it runs on.
      notes: what could not be known is added here, a line each.
    """

    module: Module
    gpu: Gpu
    notes: dict[str, None] = field(default_factory=dict)
    _fused: dict[str, Fused] = field(default_factory=dict, repr=False)

    def kernel(self, instruction: Instruction, shapes: Shapes) -> Kernel | None:
        """The kernel that an instruction is, None if it is none.

        Raises:
          ValueError: a convolution or product that cannot be read.
        """
        target = custom_call_target(instruction) if instruction.opcode == "custom-call" else ""
        if instruction.opcode in NO_KERNEL or target in _MARKERS:
            return None
        work = work_of(instruction, shapes, self.module)
        num_bytes = kernel_bytes(instruction, shapes, self.module, self._fused)
        if target and not work:
            self.notes[f"{target}: by its bytes alone, its operations are not known"] = None
        if "S(5)" in instruction.shape:
            self.notes["memory of the host: at the rate of the GPU's"] = None
        arithmetic_s = sum(w.flops / self._flops_per_s(w) for w in work)
        memory_s = num_bytes / self.gpu.memory_bytes_per_s
        return Kernel(
            name=instruction.name,
            kind=_kind(instruction, work, self.module),
            num_bytes=num_bytes,
            flops=sum(w.flops for w in work),
            dtype=self._dtype(max(work, key=lambda w: w.flops)) if work else "",
            seconds=self.gpu.kernel_s + max(memory_s, arithmetic_s),
            op_name=op_name(instruction),
        )

    def _dtype(self, work: Work) -> str:
        """What the arithmetic units take: the operands' type, or the one that stands in for it.

        On a GPU without units for bfloat16 or float16 XLA computes in float32. Types of 8 bits and
        complex numbers, in which convolutional networks do not train, are charged as bfloat16 or
        float32. The notes name every type that another one stands in for.
        """
        known = self.gpu.peak_flops_per_s
        dtype = _DTYPES.get(work.dtype, work.dtype)
        if dtype == "float32":
            return "tensorfloat32" if "tensorfloat32" in known and not work.is_exact else dtype
        if dtype in known:
            return dtype
        stands_in = "bfloat16" if dtype.startswith("f8") and "bfloat16" in known else "float32"
        self.notes[f"{dtype} on {self.gpu.name}: at the rate of {stands_in}"] = None
        return stands_in

    def _flops_per_s(self, work: Work) -> float:
        dtype = self._dtype(work)
        if dtype != "float32":
            return self.gpu.flops_per_s(dtype)
        # Not `flops_per_s`, which rounds float32 wherever the GPU can.
        rate = self.gpu.peak_flops_per_s[dtype] * self.gpu.vector_share
        return rate * self.gpu.winograd if work.fits_winograd else rate


def _kind(instruction: Instruction, work: tuple[Work, ...], module: Module) -> str:
    if work:
        convolutions = [w for w in work if w.kind != PRODUCT]
        return max(convolutions or work, key=lambda w: w.flops).kind
    if instruction.opcode in _MOVES:
        return COPY
    if instruction.opcode != "fusion":
        return REDUCTION if instruction.opcode.startswith("reduce") else OTHER
    (body,) = callees(instruction, module)
    if _REDUCES.search(module.text(body)):
        return REDUCTION
    moves = all(i.opcode in _MOVES for i in module.instructions(body))
    return COPY if moves else FUSION


_REDUCES = re.compile(r" (?:reduce|reduce-window|select-and-scatter)\(")
