"""Bytes that the kernels of a compiled GPU program read and write.

Operands and results of every kernel, each once. An operand that is read only through slices,
dynamic slices or gathers counts what these keep, elementwise operators, joins and padding between
them notwithstanding: fusions evaluate what is asked for. A result that is an operand updated in
place (`dynamic-update-slice`) counts the update; a scatter into it reads and writes the sectors of
memory in which its elements are, since it adds to what is there: single elements (max pooling's
gradient) touch nearly all of an array. What a library takes as workspace is no traffic.

Source of the sector: NVIDIA, CUDA C++ best practices guide, "Coalesced access to global memory".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxlwp.check._module import Instruction, Module, arrays, callees, shape_bytes
from jaxlwp.check._operations import custom_call_target

Shapes = Mapping[str, str]

SECTOR_BYTES = 32
"""The least that a GPU reads or writes of its memory at once."""

_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_MIXING = ("convolution", "custom-call", "dot", "reduce-window", "scatter", "sort")
"""Operators whose elements are made of many, even where operand and result are as large."""
_PLACING = ("concatenate", "pad")
"""Operators each of whose elements is one of an operand, or padding."""

_NOT_ALL = re.compile(r" (?:slice|dynamic-slice|gather|dynamic-update-slice|scatter)\(")


class Fused(NamedTuple):
    """What a fusion reads of each operand, None for all, and what it writes, None for all."""

    read_bytes: tuple[int | None, ...]
    written_bytes: int | None


def kernel_bytes(
    instruction: Instruction, shapes: Shapes, module: Module, fused: dict[str, Fused]
) -> int:
    """Bytes that a kernel reads and writes.

    Args:
      instruction: the kernel.
      shapes: of the computation that it is in.
      module: the program.
      fused: what is known of fused computations already; it is added to.
    """
    opcode, operands = instruction.opcode, instruction.operands
    result = shape_bytes(instruction.shape)
    if opcode == "fusion":
        return _fusion_bytes(instruction, shapes, module, fused)
    if opcode in _SLICES:
        return 2 * result + sum(shape_bytes(shapes[name]) for name in operands[1:])
    if opcode == "dynamic-update-slice":
        return 2 * shape_bytes(shapes[operands[1]])
    if opcode == "scatter":
        read = sum(shape_bytes(shapes[name]) for name in operands[1:])
        return read + _scattered_bytes(instruction, shapes)
    if opcode == "custom-call":
        result -= _workspace_bytes(instruction)
    if opcode == "copy-start":  # (target, source, context)
        result = arrays(instruction.shape)[0].num_bytes
    return result + sum(shape_bytes(shapes[name]) for name in set(operands) & shapes.keys())


def _workspace_bytes(call: Instruction) -> int:
    """Bytes of a library call's last result if it is workspace: plain bytes in one dimension."""
    results = arrays(call.shape)
    if len(results) < 2 or not custom_call_target(call).startswith("__cu"):
        return 0
    last = results[-1]
    return last.num_bytes if last.dtype in ("u8", "s8") and len(last.dims) == 1 else 0


# --- Fusions ----------------------------------------------------------------------------------


def _fusion_bytes(
    fusion: Instruction, shapes: Shapes, module: Module, fused: dict[str, Fused]
) -> int:
    (name,) = callees(fusion, module)
    if name not in fused:
        fused[name] = _fused(module.instructions(name), module.text(name))
    read, written = fused[name]
    total = shape_bytes(fusion.shape) if written is None else written
    seen: dict[str, int] = {}  # an operand that is given twice is read once
    for position, operand in enumerate(fusion.operands):
        size = shape_bytes(shapes[operand])
        asked = read[position] if position < len(read) else None
        seen[operand] = min(size, seen.get(operand, 0) + (size if asked is None else asked))
    return total + sum(seen.values())


def _fused(body: tuple[Instruction, ...], text: str) -> Fused:
    if _NOT_ALL.search(text) is None:
        return Fused((), None)
    by_name = {i.name: i for i in body}
    updated = _updated_in_place(body, by_name)
    asked = _asked_elements(body, by_name, updated)
    read: dict[int, int] = {}
    for i in body:
        if i.opcode == "parameter":
            array = arrays(i.shape)
            size = shape_bytes(i.shape)
            if len(array) == 1 and array[0].elements:
                size = round(size * asked[i.name] / array[0].elements)
            read[int(i.operands[0])] = size
    written = None
    if updated:
        written = 0
        for result in _results(body, by_name):
            update = updated.get(_behind_bitcasts(result, by_name).name)
            written += shape_bytes(result.shape) if update is None else update
    return Fused(tuple(read.get(i, 0) for i in range(max(read, default=-1) + 1)), written)


def _results(
    body: tuple[Instruction, ...], by_name: Mapping[str, Instruction]
) -> list[Instruction]:
    """What a computation returns; the parts of a tuple."""
    root = next((i for i in body if i.is_root), body[-1])
    return [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _behind_bitcasts(instruction: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = by_name[instruction.operands[0]]
    return instruction


def _updated_in_place(
    body: tuple[Instruction, ...], by_name: Mapping[str, Instruction]
) -> dict[str, int]:
    """Updates of parameters that are results, and the bytes that these cost."""
    found = {}
    for result in _results(body, by_name):
        update = _behind_bitcasts(result, by_name)
        if update.opcode not in _UPDATES:
            continue
        if _behind_bitcasts(by_name[update.operands[0]], by_name).opcode == "parameter":
            if update.opcode == "scatter":
                shapes = {name: by_name[name].shape for name in update.operands}
                found[update.name] = _scattered_bytes(update, shapes)
            else:
                found[update.name] = shape_bytes(by_name[update.operands[1]].shape)
    return found


def _scattered_bytes(scatter: Instruction, shapes: Shapes) -> int:
    """Bytes that a scatter reads and writes of its operand: whole sectors, at most all of it."""
    update = arrays(shapes[scatter.operands[-1]])[0]
    found = re.search(r"update_window_dims=\{([\d,]*)\}", scatter.attributes)
    window_dims = [int(d) for d in found[1].split(",") if d] if found else []
    window = math.prod(update.dims[d] for d in window_dims)
    count = update.elements // max(window, 1)
    sectors = -(-window * update.num_bytes // max(update.elements, 1) // SECTOR_BYTES)
    return 2 * min(shape_bytes(scatter.shape), count * sectors * SECTOR_BYTES)


def _asked_elements(
    body: tuple[Instruction, ...],
    by_name: Mapping[str, Instruction],
    updated: Mapping[str, int],
) -> dict[str, int]:
    """Elements of each instruction that the results ask for, from the results back."""
    sizes = {i.name: sum(array.elements for array in arrays(i.shape)) for i in body}
    asked = dict.fromkeys(sizes, 0)
    for result in _results(body, by_name):
        asked[result.name] = sizes[result.name]
    for i in reversed(body):
        if i.opcode in ("parameter", "constant", "tuple"):
            continue
        for position, operand in enumerate(i.operands):
            size = sizes[operand]
            if i.opcode in _SLICES:
                asks = asked[i.name] if position == 0 else size
            elif i.name in updated and position == 0:
                asks = 0
            elif i.opcode in _PLACING:  # of a join, each part gets its share of what is asked
                asks = min(size, -(-asked[i.name] * size // max(sizes[i.name], 1)))
            else:
                element_by_element = sizes[i.name] == size and i.opcode not in _MIXING
                asks = asked[i.name] if element_by_element else size
            asked[operand] = min(size, asked[operand] + asks)
    return asked
