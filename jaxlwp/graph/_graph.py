"""The computation graph: layers, and the tensors that flow between them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxlwp.graph._outline import LayerOutline, Parameter, fingerprint
from jaxlwp.ops import RULES, Labels, Signature
from jaxlwp.program import Equation, Program, Value, program_lines

FUSED = (
    "elementwise",
    "broadcast",
    "iota",
    "output",
    "pad",
    "random",
    "reshape",
    "slice",
    "transpose",
)
"""Kinds of operators that compilers merge into other operators' loops."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One operator of a layer, its tensors' dimensions named by the layer's dimensions.

    Attributes:
      equation: the operator.
      signature: its signature, in the layer's dimension names.
      gradient: for each operand, whether it has a cotangent.
      recomputed: it is evaluated again in the backward pass (`jax.checkpoint`), unless the policy
        keeps whatever any operator makes.
      awaited: work goes on from its results; not so of the loss, which is only returned.
    """

    equation: Equation
    signature: Signature
    gradient: tuple[bool, ...]
    recomputed: bool = False
    awaited: bool = True


@dataclass(frozen=True, kw_only=True)
class Use:
    """A layer reads a value that is not laid out for it already.

    Attributes:
      value: index of the value.
      info: its shape and dtype.
      moved: the same as it is brought to the reader, and as its gradients are added up: a parameter
        that is cast to the dtype of the computation is cast first.
      labels: the reader's dimension names of the value's dimensions.
      active: dimension names over which the reading operator's work is split.
      source: index of the layer that holds the value; for arguments of the function the first
        layer that reads it, since it decides how the argument is stored.
      source_labels: dimension names of the value in the source layer.
      argument: the value is an argument of the function (parameter or batch).
      gradient: the value has a cotangent.
      recomputed: it is brought here again in the backward pass (`jax.checkpoint`).
      fed: it is an argument that is no parameter, and comes anew with every call.
    """

    value: int
    info: Value
    moved: Value
    labels: Labels
    active: frozenset[str]
    source: int
    source_labels: Labels
    argument: bool
    gradient: bool
    recomputed: bool = False
    fed: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for uses that move the same, from and to layers that name dimensions alike."""
        active = tuple(sorted(self.active))
        own = self.info, self.moved, self.labels, active, self.source_labels
        return *own, self.argument, self.gradient, self.recomputed, self.fed


@dataclass(frozen=True, kw_only=True)
class Layer(LayerOutline):
    """A node of the computation graph.

    Attributes:
      members: the layer's operators in order of evaluation, operators pulled in by uses included.
      uses: the values that it reads.
      outputs: values it makes that something else reads, and the names of their dimensions.
    """

    members: tuple[Member, ...] = field(repr=False)
    uses: tuple[Use, ...] = field(repr=False)
    outputs: tuple[tuple[Value, Labels], ...] = field(default=(), repr=False)

    @property
    def fused(self) -> bool:
        """Whether compilers merge all of the layer's operators into loops of its neighbours."""
        rules = [RULES.get(member.equation.name) for member in self.members]
        return all(rule is not None and rule.kind in FUSED for rule in rules)

    @functools.cached_property
    def key(self) -> str:
        """Equal for layers that do the same to values of the same shapes: networks repeat blocks.

        It says which operators read one value, but not which value of the program that is.
        """
        numbers: dict[int, int] = {}

        def numbered(values: Iterable[int]) -> list[int]:
            return [numbers.setdefault(value, len(numbers)) for value in values]

        members = [
            (
                m.equation.name,
                sorted((name, str(value)) for name, value in m.equation.params.items()),
                m.equation.operand_values,
                m.equation.result_values,
                numbered((*m.equation.operands, *m.equation.results)),
                m.signature,
                m.gradient,
                m.recomputed,
                m.awaited,
            )
            for m in self.members
        ]
        own = [(numbered([use.value]), use.key) for use in self.uses if use.source == self.index]
        return repr((members, own, self.outputs))

    @property
    def output(self) -> Value:
        """Shape and dtype of the layer's last result."""
        return self.members[-1].equation.result_values[0]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A tensor that one layer makes (or stores) and another reads; parallel edges are legal."""

    source: int
    target: int
    use: Use


@dataclass(frozen=True, kw_only=True)
class ComputationGraph:
    """Layers and edges of a traced function, and the program they stand for.

    Attributes:
      layers: in order of their first operator.
      program: the flat program.
      assigned: equation position in the program -> (layer index, signature in the layer's
        dimension names). Equations that are not here are evaluated where they are used.
      homes: value -> (layer index, dimension names) for values made by a layer.
      lazy: value -> position of the equation that makes it, for values evaluated where used.
      casts: those of the lazy values that are arguments in another dtype, in which they are moved
        and their gradients added up: made where the argument is stored. Each stands beside the
        first of the values that are the same cast.
      owners: argument value -> (layer index, dimension names) of its first use.
      gradients: values that have a cotangent when the loss is differentiated by the parameters;
        none if the function is only evaluated.
      argument_names: name of each program input, such as `params['Conv_0']['kernel']`.
      num_parameters: how many of the program's inputs are leaves of the first argument.
      changed: positions of the inputs that the function replaces (state of NNX modules); their
        new values are the program's last outputs.
      sum_dtype: the least dtype in which gradients are added up, if one was asked for.
      results: shapes and dtypes of what the function returns, structured as it returns them.
    """

    layers: tuple[Layer, ...]
    program: Program = field(repr=False)
    assigned: dict[int, tuple[int, Signature]] = field(repr=False)
    homes: dict[int, tuple[int, Labels]] = field(repr=False)
    lazy: dict[int, int] = field(repr=False)
    casts: dict[int, int] = field(repr=False)
    owners: dict[int, tuple[int, Labels]] = field(repr=False)
    gradients: frozenset[int] = field(repr=False)
    argument_names: tuple[str, ...] = field(repr=False)
    num_parameters: int
    changed: tuple[int, ...] = ()
    sum_dtype: str | None = None
    results: Any = field(repr=False, default=None)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All tensors that cross from one layer to another."""
        return tuple(
            Edge(source=use.source, target=layer.index, use=use)
            for layer in self.layers
            for use in layer.uses
            if use.source != layer.index
        )

    @property
    def constants(self) -> tuple[Value, ...]:
        """The arrays that depend on no argument: each is whole on every device, and moved by none.

        Numbers do not count, and an array that is read in several places counts once.
        """
        found = {id(c): self.program.values[i] for i, c in self.program.constants.items()}
        return tuple(value for value in found.values() if value.shape)

    @property
    def fingerprint(self) -> str:
        """Hash of layer names, kinds and tensor shapes; a strategy is for one fingerprint."""
        return fingerprint(self.layers)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the traced program: equations, constants, arguments and which are trained."""
        lines = (
            *program_lines(self.program),
            *self.argument_names,
            f"{self.num_parameters} {sorted(self.gradients)} {self.sum_dtype}",
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The leaves of the first argument."""
        inputs = self.program.inputs[: self.num_parameters]
        owners = [self.owners.get(value, (None, ())) for value in inputs]
        return tuple(
            Parameter(name=name, shape=self.program.values[i].shape, layer=layer, labels=labels)
            for name, i, (layer, labels) in zip(self.argument_names, inputs, owners, strict=False)
        )

    def unknown(self) -> tuple[Layer, ...]:
        """Layers whose operator has no rule."""
        return tuple(layer for layer in self.layers if not layer.has_rule)
