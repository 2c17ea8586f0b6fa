"""HLO text as data: the computations of a compiled program, their instructions and shapes.

`compiled.as_text()` of JAX for CPUs, GPUs and TPUs is read. The text of a large network has some
megabytes, most of it inside fusions, so a computation is read when it is first asked for.

Source: OpenXLA's page "HLO text" (xla/hlo/parser), and the text that JAX 0.10.2 gives.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(operands), attributes`.

    Attributes:
      name: unique in the program, without `%`.
      shape: of its result, as text: an array, or a tuple in parentheses.
      opcode: as in "fusion".
      operands: names of instructions of the same computation.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Array(NamedTuple):
    """An array of a shape.

    Attributes:
      dtype: XLA's name of the element type, as in "bf16".
      dims: its sizes.
      num_bytes: of all elements, layouts and padding ignored.
    """

    dtype: str
    dims: tuple[int, ...]
    num_bytes: int

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)


@dataclass(frozen=True, kw_only=True)
class Module:
    """A program: its computations by name, and how many devices run it.

    Attributes:
      lines: text of every computation.
      entry: name of the computation that runs.
      num_replicas: as in the header.
      num_partitions: as in the header.
      is_scheduled: whether instructions run in the order of the text.
    """

    lines: dict[str, list[str]] = field(repr=False)
    entry: str
    num_replicas: int
    num_partitions: int
    is_scheduled: bool
    _read: dict[str, tuple[Instruction, ...]] = field(default_factory=dict, repr=False)

    def __contains__(self, computation: str) -> bool:
        """Whether there is a computation of that name."""
        return computation in self.lines

    def instructions(self, computation: str) -> tuple[Instruction, ...]:
        """The instructions of a computation, in the order of the text."""
        if computation not in self._read:
            read = map(_instruction, self.lines[computation])
            self._read[computation] = tuple(i for i in read if i is not None)
        return self._read[computation]

    def text(self, computation: str) -> str:
        """The text of a computation."""
        return "\n".join(self.lines[computation])


def parse(text: str) -> Module:
    """Read a program.

    Raises:
      ValueError: the text is no HLO module.
    """
    header = re.search(r"^HloModule.*$", text, re.MULTILINE)
    if header is None:
        raise ValueError(f"not an HLO module: {text[:80]!r}")
    computations: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text[header.end() :].splitlines():
        if current is None:
            if start := _COMPUTATION.match(line):
                current = computations[start["name"]] = []
                entry = start["name"] if start["entry"] else entry
        elif _END.match(line):
            current = None
        else:
            current.append(line)
    if entry is None:
        raise ValueError("an HLO module without an ENTRY computation")
    return Module(
        lines=computations,
        entry=entry,
        num_replicas=_header_count("replica_count", header.group(0)),
        num_partitions=_header_count("num_partitions", header.group(0)),
        is_scheduled="is_scheduled=true" in header.group(0),
    )


def callees(instruction: Instruction, module: Module) -> list[str]:
    """The computations that an instruction executes, each once."""
    if instruction.opcode.endswith(("-update", "-done")):
        return []  # they name what their -start has executed
    named = _CALLEE.findall(instruction.attributes)
    for several in _CALLEES.findall(instruction.attributes):
        named += re.findall(r"[\w.\-]+", several)
    return [name for name in dict.fromkeys(named) if name in module]


def trip_count(instruction: Instruction) -> int | None:
    """How often an instruction executes its callees, None if that is unknown."""
    if instruction.opcode != "while":
        return 1
    known = re.search(r"known_trip_count\W+n\W+(\d+)", instruction.attributes)
    return int(known.group(1)) if known else None


def op_name(instruction: Instruction) -> str:
    """Where an instruction comes from, in JAX's words ("jit(f)/shard_map/psum"), or ""."""
    found = _OP_NAME.search(instruction.attributes)
    return found.group(1) if found else ""


@functools.lru_cache(maxsize=1 << 16)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape: of `f32[2,3]{1,0}` one, of a tuple all, tokens without bytes.

    Raises:
      ValueError: an unknown element type.
    """
    found = []
    for dtype, text in _ARRAY.findall(shape):
        dims = tuple(int(size) for size in re.findall(r"\d+", text))
        found.append(Array(dtype, dims, -(-math.prod(dims) * _dtype_bits(dtype) // 8)))
    return tuple(found)


@functools.lru_cache(maxsize=1 << 16)
def shape_bytes(shape: str) -> int:
    """The bytes of an array, or of all arrays of a tuple."""
    return sum(array.num_bytes for array in arrays(shape))


def _dtype_bits(dtype: str) -> int:
    """The bits of an element: those in its name (f32, bf16, s4, f8e4m3fn), or known."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    named = re.match(r"[a-z]+(\d+)", dtype)
    if named is None:
        raise ValueError(f"unknown element type {dtype!r} in HLO text")
    return int(named.group(1))


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<= ]*)\]")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLEE = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLEES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")

_COMPUTATION = re.compile(r"(?P<entry>ENTRY\s+)?%?(?P<name>[\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{\s*$")
_END = re.compile(r"\s*\}\s*(?:,.*|//.*)?$")  # the lines of a long constant may begin with `}`
_NAME = re.compile(r"\s*(?P<root>ROOT\s+)?%?(?P<name>[\w.\-]+)\s*=\s*")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][a-z0-9\-]*)\(")
_PLAIN = re.compile(  # most lines: a shape of at most one tuple, operands that are names
    r"\s*(?P<root>ROOT\s+)?%?(?P<name>[\w.\-]+)\s*=\s*"
    r"(?P<shape>[a-z]\S*|\((?:[^()]++|\([^()]*+\))*+\))\s+"
    r'(?P<opcode>[a-z][a-z0-9\-]*)\((?P<operands>[^()"]*)\)'
)


def _header_count(name: str, header: str) -> int:
    """A number of the module's header, which leaves it out when it is 1."""
    found = re.search(rf"\b{name}=(\d+)", header)
    return int(found.group(1)) if found else 1


def _instruction(line: str) -> Instruction | None:
    """Read one line of a computation, None if it is no instruction."""
    if "/*" in line:
        line = re.sub(r"/\*.*?\*/", "", line)  # `/*index=5*/` in long tuples
    if plain := _PLAIN.match(line):
        root, name, shape, opcode, operands = plain.groups()
        return Instruction(
            name, shape, opcode, _operands(operands), line[plain.end() :], root is not None
        )
    start = _NAME.match(line)
    if start is None:
        return None
    is_tuple = line.startswith("(", start.end())
    shape_end = _after_parenthesis(line, start.end()) if is_tuple else line.find(" ", start.end())
    found = _OPCODE.match(line, shape_end) if shape_end >= 0 else None
    if found is None:
        return None
    end = _after_parenthesis(line, found.end() - 1)
    return Instruction(
        name=start["name"],
        shape=line[start.end() : shape_end],
        opcode=found["opcode"],
        operands=_operands(line[found.end() : end - 1]),
        attributes=line[end:],
        is_root=start["root"] is not None,
    )


def _operands(text: str) -> tuple[str, ...]:
    """Read the names in `%x, %y`, in `f32[2] %x` where shapes are printed, and in `x, y`."""
    if "%" in text:
        return tuple(_OPERAND.findall(text))
    return tuple(part.strip() for part in text.split(",") if part.strip())


_OPERAND = re.compile(r"%([\w.\-]+)")


def _after_parenthesis(line: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', line[start:]):
        depth += {"(": 1, ")": -1}.get(token.group(0), 0)
        if depth == 0:
            return start + token.end()
    raise ValueError(f"unbalanced parentheses in HLO text: {line[:200]}")
