"""The schedule of a compiled GPU program: kernels and collectives in the order in which they start.

A scheduled module runs its instructions in the order of the text. What it calls is put in its
place: bodies of loops with their trip counts, branches, called computations (command buffers
among them), and what is wrapped in an asynchronous call. A collective in two halves begins at its
start and is waited for at its done; one that is whole, or marked `is_sync`, is waited for at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxlwp.check._hlo import KINDS, Groups, collective_of, kind_of
from jaxlwp.check._kernels import Kernel, KernelReader
from jaxlwp.check._module import Instruction, Module, callees, trip_count


@dataclass(frozen=True, kw_only=True)
class Start:
    """A collective begins.

    Attributes:
      name: of the instruction that `Done` names.
      kind: as in "all-reduce".
      num_bytes: of all its operands on one device.
      groups: devices that exchange data; pairs for a permute.
      is_sync: whether nothing else runs until it has ended.
      op_name: where it comes from, in JAX's words.
    """

    name: str
    kind: str
    num_bytes: int
    groups: Groups
    is_sync: bool
    op_name: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of the collective that has this name is waited for."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Steps that are repeated.

    Attributes:
      name: of the instruction.
      body: what one iteration does.
      trips: how many iterations; 1 if that is not known.
    """

    name: str
    body: tuple[Step, ...]
    trips: int


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One of several runs."""

    name: str
    bodies: tuple[tuple[Step, ...], ...]


Step = Kernel | Start | Done | Loop | Branches

_POINT_TO_POINT = ("recv", "send")
_SYNC = '"is_sync":true'


def schedule(module: Module, reader: KernelReader) -> tuple[Step, ...]:
    """The steps of a program, loops and branches as such.

    Args:
      module: the program; it must be scheduled.
      reader: of its kernels; what cannot be known is added to its notes.

    Raises:
      ValueError: an instruction that cannot be read.
    """
    return tuple(_Walk(module, reader).steps(module.entry))


@dataclass(frozen=True)
class _Walk:
    module: Module
    reader: KernelReader

    def steps(self, computation: str) -> Iterator[Step]:
        """The steps of a computation and of all that it calls."""
        instructions = self.module.instructions(computation)
        shapes = {i.name: i.shape for i in instructions}
        started: dict[str, str] = {}  # instruction -> the collective that it stands for
        for i in instructions:
            if i.opcode.endswith(("-update", "-done")):
                name = started.get(i.operands[0])
                if name is not None:
                    started[i.name] = name
                    if i.opcode.endswith("-done"):
                        yield Done(name=name)
                continue
            for step in self._of(i, shapes):
                if isinstance(step, Start) and not step.is_sync:
                    started[i.name] = step.name
                yield step

    def _of(self, i: Instruction, shapes: dict[str, str]) -> Iterator[Step]:
        """The steps of one instruction."""
        kind = kind_of(i)
        if kind is not None:
            collective = collective_of(kind, i, shapes, self.module)
            if collective is not None:
                yield Start(
                    name=i.name,
                    kind=kind,
                    num_bytes=collective.operand_bytes,
                    groups=collective.groups,
                    is_sync=not i.opcode.endswith("-start") or _SYNC in i.attributes,
                    op_name=collective.op_name,
                )
        elif i.opcode == "while":
            yield self._loop(i)
        elif i.opcode == "conditional":
            self.reader.notes["conditionals: the longest branch"] = None
            bodies = [tuple(self.steps(name)) for name in callees(i, self.module)]
            yield Branches(name=i.name, bodies=tuple(bodies))
        elif i.opcode == "call":
            for name in callees(i, self.module):
                yield from self.steps(name)
        elif i.opcode.endswith("-start") and i.opcode != "copy-start":
            yield from self._wrapped(i)
        elif i.opcode == "fusion" and any(
            _exchanges(self.module, c) for c in callees(i, self.module)
        ):
            yield from self._fused(i)
        elif i.opcode in _POINT_TO_POINT:
            self.reader.notes["send and recv: not charged"] = None
        else:
            kernel = self.reader.kernel(i, shapes)
            if kernel is not None:
                yield kernel

    def _loop(self, i: Instruction) -> Loop:
        trips = trip_count(i)
        names = callees(i, self.module)
        if trips is None:
            self.reader.notes[f"loop {i.name}: trip count unknown, one iteration"] = None
        else:  # XLA counts, and evaluates no condition
            names = [name for name in names if not _is_condition(name, i)]
        body = [step for name in names for step in self.steps(name)]
        return Loop(name=i.name, body=tuple(body), trips=1 if trips is None else trips)

    def _fused(self, i: Instruction) -> Iterator[Step]:
        """A fusion of a collective and the slice or update of what it works on."""
        for name in callees(i, self.module):
            for step in self.steps(name):
                if isinstance(step, Start):
                    yield replace(step, name=i.name, is_sync=True)

    def _wrapped(self, i: Instruction) -> Iterator[Step]:
        """An asynchronous call: a collective goes by the name of the call, kernels run here."""
        for name in callees(i, self.module):
            for step in self.steps(name):
                if isinstance(step, Start):
                    yield replace(step, name=i.name, is_sync=_SYNC in i.attributes)
                elif not isinstance(step, Done):
                    yield step


def _is_condition(name: str, loop: Instruction) -> bool:
    return re.search(rf"condition=%?{re.escape(name)}(?![\w.\-])", loop.attributes) is not None


def _exchanges(module: Module, computation: str) -> bool:
    return _COLLECTIVE.search(module.text(computation)) is not None


_COLLECTIVE = re.compile(rf" (?:{'|'.join(sorted(KINDS))})\(")
