"""The collectives of a compiled program, counted in its HLO text (`_module`).

`jax.jit(f).lower(...).compile().as_text()` is the program that one device runs, so the shape of
an operand there is the local one. Text of CPU, GPU and TPU programs is read: plain collectives,
their `-start`/`-done` halves, async wrappers, several operands, every notation of device groups.
Not counted: `send` and `recv`, into which XLA's point-to-point pipelining rewrites a permute. TPU
programs do not say the trip counts of their loops.

Source: OpenXLA's pages "Operation semantics" (which ids a replica group holds) and "Async HLO
instructions", and the text that JAX 0.10.2 gives. The mesh notation of groups is Shardy's: `'a'`
is a mesh axis, `'a':(p)s` the sub-axis of size s behind the first p parts of it.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxlwp.check._module import (
    Instruction,
    Module,
    callees,
    op_name,
    parse,
    shape_bytes,
    trip_count,
)

KINDS = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class CompiledCollective:
    """One collective instruction of a compiled program.

    Attributes:
        kind: HLO name without `-start`, such as "all-reduce" or "collective-permute".
        count: How often one run of the program executes it: the product of the trip counts of
            the loops around it. Every branch of a conditional counts as taken.
        group_size: Devices that exchange data with one another; 2 for a permute.
        groups: Device numbers of each group; for a permute its (source, target) pairs.
        operand_bytes: Bytes of all its operands on one device, for one execution: the shard of
            what is gathered, the whole of what is reduced, scattered or exchanged.
        wire_bytes: Bytes that one device sends in one execution under the ring algorithm,
            rounded down. In a permute a device that is nobody's source sends nothing.
        op_name: Where it comes from, in JAX's words ("jit(f)/shard_map/psum"), or "".
        trip_known: Whether every trip count in `count` is known; an unknown one counts as 1.
    """

    kind: str
    count: int
    group_size: int
    groups: Groups
    operand_bytes: int
    wire_bytes: int
    op_name: str
    trip_known: bool


def compiled_collectives(text: str) -> tuple[CompiledCollective, ...]:
    """Lists the collectives that a compiled program executes.

    Groups of a single device communicate nothing, so a collective of such groups is left out.
    What a computation holds is listed once for each place that calls it.

    Args:
        text: The program, `compiled.as_text()`.

    Returns:
        The collectives in the order of the text, those of a callee at its call.

    Raises:
        ValueError: If `text` is no HLO module, or holds a collective that cannot be read.
    """
    module = parse(text)
    return tuple(_walk(module, module.entry, count=1, trip_known=True))


def bytes_by_kind(collectives: Iterable[CompiledCollective]) -> dict[str, int]:
    """Sums operand bytes per device times count by kind, kinds in order of appearance."""
    total: dict[str, int] = {}
    for c in collectives:
        total[c.kind] = total.get(c.kind, 0) + c.count * c.operand_bytes
    return total


# --- From the calls of the program to its collectives ---------------------------------------


def _walk(
    module: Module, computation: str, *, count: int, trip_known: bool
) -> Iterator[CompiledCollective]:
    """Yields the collectives of a computation that is executed `count` times."""
    instructions = module.instructions(computation)
    shapes = {i.name: i.shape for i in instructions}
    for instruction in instructions:
        kind = kind_of(instruction)
        if kind is not None:
            collective = collective_of(kind, instruction, shapes, module, count, trip_known)
            if collective is not None:
                yield collective
            continue
        trips = trip_count(instruction)
        for callee in callees(instruction, module):
            yield from _walk(
                module,
                callee,
                count=count * (1 if trips is None else trips),
                trip_known=trip_known and trips is not None,
            )


def collective_of(
    kind: str,
    instruction: Instruction,
    shapes: dict[str, str],
    module: Module,
    count: int = 1,
    trip_known: bool = True,
) -> CompiledCollective | None:
    """Returns what a collective instruction does, None if it only talks to itself.

    Args:
        kind: From `kind_of`.
        instruction: The collective.
        shapes: Shapes of the instructions of its computation.
        module: The program.
        count: How often it is executed.
        trip_known: Whether that is known.

    Raises:
        ValueError: If the collective cannot be read.
    """
    groups = _groups(kind, instruction, module)
    if all(len(set(group)) < 2 for group in groups):
        return None
    operand_bytes = _operand_bytes(kind, instruction, shapes)
    group_size = max(len(group) for group in groups)
    return CompiledCollective(
        kind=kind,
        count=count,
        group_size=group_size,
        groups=groups,
        operand_bytes=operand_bytes,
        wire_bytes=_wire_bytes(kind, operand_bytes, group_size),
        op_name=op_name(instruction),
        trip_known=trip_known,
    )


def kind_of(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, None for anything else.

    A `-done` is something else: its `-start` is counted. So is a `-start` that names a wrapped
    computation: the collective is in there.
    """
    kind = instruction.opcode.removesuffix("-start")
    wraps = kind != instruction.opcode and re.search(r"\bcalls=", instruction.attributes)
    return kind if kind in KINDS and not wraps else None


# --- Bytes ----------------------------------------------------------------------------------


def _operand_bytes(kind: str, instruction: Instruction, shapes: dict[str, str]) -> int:
    operands = instruction.operands
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the others are the output buffer, offsets and sizes
    missing = [name for name in operands if name not in shapes]
    if missing or not operands:
        raise ValueError(f"{instruction.opcode} %{instruction.name}: no shape of {missing}")
    return sum(shape_bytes(shapes[name]) for name in operands)


def _wire_bytes(kind: str, operand_bytes: int, group_size: int) -> int:
    """Returns the bytes that one device sends under the ring algorithm, rounded down."""
    match kind:
        case "collective-permute" | "collective-broadcast":
            return operand_bytes
        case "all-gather":
            return operand_bytes * (group_size - 1)
        case "all-reduce":
            return 2 * operand_bytes * (group_size - 1) // group_size
        case _:
            return operand_bytes * (group_size - 1) // group_size


# --- Device groups --------------------------------------------------------------------------

_IOTA = r"\[(?P<shape>[\d,]+)\]<=\[(?P<reshape>[\d,]+)\](?:T\((?P<transpose>[\d,]+)\))?"
_MESH = r"mesh\[(?P<axes>[^\]]*)\](?:,\s*device_ids=\((?P<ids>(?:[^()]|\([^)]*\))*)\))?"
_PAIRS_OR_LISTS = r"\{(?:\s*\{[\d,\s]*\}\s*,?)*\s*\}"


def _groups(kind: str, instruction: Instruction, module: Module) -> Groups:
    """Returns the devices that talk to one another, numbered replica * partitions + partition."""
    attributes = instruction.attributes
    if kind == "collective-permute":
        pairs = re.search(rf"source_target_pairs=({_PAIRS_OR_LISTS})", attributes)
        if pairs is None:
            raise ValueError(f"%{instruction.name}: cannot read source_target_pairs: {attributes}")
        return _listed_groups(pairs.group(1))
    groups = _replica_groups(attributes)
    if groups is None:
        raise ValueError(f"%{instruction.name}: cannot read replica_groups: {attributes}")
    if not groups:  # `{}`, or nothing said: everybody
        return (tuple(range(module.num_replicas * module.num_partitions)),)
    if _ids_are_whole_replicas(kind, attributes):
        parts = range(module.num_partitions)
        return tuple(tuple(r * len(parts) + p for r in group for p in parts) for group in groups)
    return groups


def _ids_are_whole_replicas(kind: str, attributes: str) -> bool:
    """Whether each id of a group stands for all partitions of that replica.

    So it is for the kinds that know `use_global_device_ids`, with a channel but without that flag.
    Elsewhere an id is a partition (with a channel) or a replica (without); JAX's programs have
    many of one of the two at most, so that it is the device's number as well.
    """
    return (
        kind in ("all-reduce", "all-gather", "reduce-scatter")
        and "channel_id=" in attributes
        and "use_global_device_ids=true" not in attributes
    )


def _replica_groups(attributes: str) -> Groups | None:
    """Returns the ids of each group; () if none are listed, None if they cannot be read."""
    if "replica_groups=" not in attributes:
        return ()
    if found := re.search(rf"replica_groups={_IOTA}", attributes):
        ids = _iota(found["reshape"], found["transpose"])
        return _as_groups(ids.reshape(_ints(found["shape"])))
    if found := re.search(rf"replica_groups={_MESH}\s*\{{(?P<over>[^}}]*)\}}", attributes):
        return _mesh_groups(found["axes"], found["ids"], found["over"])
    if found := re.search(rf"replica_groups=({_PAIRS_OR_LISTS})", attributes):
        return _listed_groups(found.group(1))
    return None


def _listed_groups(text: str) -> Groups:
    """Reads `{{0,1},{2,3}}`."""
    return tuple(_ints(group) for group in re.findall(r"\{([\d,\s]+)\}", text))


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> Groups:
    """Reads `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b','a':(1)2}`."""
    sizes = {name: int(size) for name, size in re.findall(r"([^=,\s]+)=(\d+)", axes)}
    split: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"([^:,\s]+)(?::\((\d+)\)(\d+))?", over):
        split[name].append((int(before), int(size)) if before else (1, sizes[name]))

    shape: list[int] = []  # of the mesh, its axes cut at the ends of the sub-axes
    grouped: list[int] = []  # positions in `shape`
    for name, axis_size in sizes.items():
        parts = split[name]
        ends = sorted({1, axis_size, *(end for p, s in parts for end in (p, p * s))})
        for low, high in itertools.pairwise(ends):
            if any(p <= low and high <= p * s for p, s in parts):
                grouped.append(len(shape))
            shape.append(high // low)

    ids = _mesh_device_ids(device_ids, math.prod(sizes.values())).reshape(shape)
    rest = [i for i in range(len(shape)) if i not in grouped]
    group_size = math.prod(shape[i] for i in grouped)
    return _as_groups(ids.transpose(rest + grouped).reshape(-1, group_size))


def _mesh_device_ids(text: str | None, count: int) -> np.ndarray:
    """Reads the devices of a mesh in the order of its axes: nothing, `0,2,1,3`, `[2,2]T(1,0)`."""
    if text is None:
        return np.arange(count)
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota.group(1), iota.group(2))
    return np.array(_ints(text))


def _iota(shape: str, transpose: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... laid out in `shape`, transposed and flattened again."""
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (ids.transpose(_ints(transpose)) if transpose else ids).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _as_groups(ids: np.ndarray) -> Groups:
    return tuple(tuple(group) for group in ids.tolist())
