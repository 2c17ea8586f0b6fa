"""One layer's work on one device: the layer's own lowering, forward and backward, alone.

The layer is lowered as in the whole program, differentiated, and its collectives are taken out:
what is left runs on one device, for a mesh of any size, and is what the layer costs there besides
its communication.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlwp.graph import ComputationGraph, Layer
from jaxlwp.lower import build_layer, read_elsewhere, run
from jaxlwp.mesh import OnBlocks, trace_on_blocks
from jaxlwp.program import SCAN, Equation, Program, Value, flatten, scan_of, text_of
from jaxlwp.space import Config, Layout, degree, local_shape

COLLECTIVES = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "pbroadcast",
    "pvary",
    "pcast",
    "ppermute",
    "all_gather",
    "all_gather_invariant",
    "all_gather_reduced",
    "all_to_all",
    "reduce_scatter",
    "unreduced_psum",
)
"""Primitives that talk to other devices, or only say over which mesh axes a value varies."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalStep:
    """A layer's forward and backward pass on one device's blocks, without collectives.

    Its operands are, in this order, the blocks that have a gradient, the cotangents of the outputs,
    and the other blocks; its results are the gradients, and the outputs that have a cotangent. So
    its results have the shapes of its first operands: run it again on them.

    Attributes:
      program: the program.
      carried: how many operands are replaced by results.
      key: hash of the program: equal for layers and configs whose local work is the same.
    """

    program: Program = field(repr=False)
    carried: int
    key: str

    @property
    def operands(self) -> tuple[Value, ...]:
        """Shapes and dtypes of the operands."""
        return tuple(self.program.values[i] for i in self.program.inputs)

    def __call__(self, *operands: Any) -> tuple[Any, ...]:
        """Evaluate once."""
        return tuple(map(jnp.asarray, _run(self.program, operands)))


def _run(program: Program, operands: Sequence[Any]) -> tuple[Any, ...]:
    made: dict[int, Any] = dict(zip(program.inputs, operands, strict=True))
    made.update(program.constants)
    for eqn in program.equations:
        results = _evaluate(eqn, [made[i] for i in eqn.operands])
        made.update(zip(eqn.results, results, strict=True))
    return tuple(made[i] for i in program.outputs)


def _evaluate(eqn: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    if eqn.name == "axis_index":
        return (jnp.zeros((), jnp.int32),)
    if eqn.name == SCAN:
        scan = scan_of(eqn)
        return scan.run(lambda *given: _run(scan.body, given), operands)
    if eqn.name not in COLLECTIVES:
        return eqn.bind(*operands)
    return [
        _resized(operand, value.shape)
        for operand, value in zip(operands, eqn.result_values, strict=True)
    ]


def _resized(x: Any, shape: tuple[int, ...]) -> Any:
    """An array of the wanted shape, made of `x`: what a collective would leave."""
    if x.shape == shape:
        return x
    if math.prod(x.shape) == math.prod(shape):
        return x.reshape(shape)
    for dim, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if have < want:
            copies = -(-want // have)
            x = jnp.concatenate([x] * copies, axis=dim)
        x = jax.lax.slice_in_dim(x, 0, want, axis=dim)
    return x


def local_step(
    graph: ComputationGraph, layer: Layer, config: Config, axis_sizes: dict[str, int]
) -> LocalStep:
    """The local work of a layer under a config.

    Args:
      graph: the graph that the layer is of.
      layer: the layer.
      config: one of its configs.
      axis_sizes: devices along each mesh axis; the devices need not exist.
    """
    configs = tuple(config if other is layer else Config() for other in graph.layers)
    positions = [p for p, (owner, _) in graph.assigned.items() if owner == layer.index]
    uses = [use for use in layer.uses if use.source != layer.index or use.argument]
    outputs = read_elsewhere(graph, positions)
    reads = [(use.info, config.layout(use.labels), use.gradient) for use in uses]
    makes = [
        (graph.program.values[v], config.layout(graph.homes[v][1]), v in graph.gradients)
        for v in outputs
    ]

    program = build_layer(
        graph,
        configs,
        axis_sizes,
        [
            (use.value, layout, frozenset(a for name in use.active for a in config.axes(name)))
            for use, (_, layout, _) in zip(uses, reads, strict=True)
        ],
        positions,
        outputs,
    )

    moved = [n for n, (_, _, gradient) in enumerate(reads) if gradient]
    fixed = [n for n, (_, _, gradient) in enumerate(reads) if not gradient]
    driven = [n for n, (_, _, gradient) in enumerate(makes) if gradient]
    undriven = [n for n, (_, _, gradient) in enumerate(makes) if not gradient]

    def step(*operands: Any) -> tuple[Any, ...]:
        inputs = operands[: len(moved)]
        cotangents = operands[len(moved) : len(moved) + len(driven)]
        others = operands[len(moved) + len(driven) :]

        def differentiated(*inputs: Any) -> tuple[list[Any], list[Any]]:
            blocks = dict(zip(moved, inputs, strict=True)) | dict(zip(fixed, others, strict=True))
            made = run(program, [blocks[n] for n in range(len(reads))])
            return [made[n] for n in driven], [made[n] for n in undriven]

        made, back, rest = jax.vjp(differentiated, *inputs, has_aux=True)
        gradients = back(list(cotangents)) if driven else inputs
        return (*gradients, *made, *rest)

    ends = [reads[n] for n in moved] + [makes[n] for n in driven]
    arguments = ends + [reads[n] for n in fixed]
    results = ends + [makes[n] for n in undriven]
    traced = trace_on_blocks(
        step,
        [_padded(info, layout, axis_sizes) for info, layout, _ in arguments],
        [layout for _, layout, _ in arguments],
        [layout for _, layout, _ in results],
        axis_sizes,
    )
    local = _local_program(traced)
    return LocalStep(program=local, carried=len(ends), key=_hash(local))


def _padded(info: Value, layout: Layout, axis_sizes: dict[str, int]) -> jax.ShapeDtypeStruct:
    """Shape of an array whose blocks are all full."""
    blocks = local_shape(info.shape, layout, axis_sizes)
    shape = [n * degree(axes, axis_sizes) for n, axes in zip(blocks, layout, strict=True)]
    return jax.ShapeDtypeStruct(tuple(shape), info.dtype)


def _local_program(traced: OnBlocks) -> Program:
    """The program of one device, its operands in the order of the arguments."""
    program = flatten(traced.jaxpr, derivatives=False, unroll=False)
    inputs = [-1] * len(traced.positions)
    constants = dict(program.constants)
    for n, value in enumerate(program.inputs):
        if n in traced.positions:
            inputs[traced.positions[n]] = value
        else:
            constants[value] = traced.constants[n]
    return _plain(dataclasses.replace(program, constants=constants, inputs=tuple(inputs)))


def _plain(program: Program) -> Program:
    """The program without the mesh that it was traced for."""
    # Constants remember that mesh, too; as plain arrays they do not. Weak types are lost, but every
    # equation's operands have been promoted already.
    constants = {
        value: np.asarray(constant, program.values[value].dtype)
        if isinstance(program.values[value].dtype, np.dtype)
        else constant
        for value, constant in program.constants.items()
    }
    equations = tuple(map(_plain_equation, program.equations))
    return dataclasses.replace(program, constants=constants, equations=equations)


def _plain_equation(eqn: Equation) -> Equation:
    if eqn.name == SCAN:
        scan = scan_of(eqn)
        return dataclasses.replace(
            eqn, notes={SCAN: dataclasses.replace(scan, body=_plain(scan.body))}
        )
    if "sharding" in eqn.params:
        return dataclasses.replace(eqn, params={**eqn.params, "sharding": None})
    return eqn


def _hash(program: Program) -> str:
    """Equal for programs that do the same on blocks of the same shapes."""
    number = {v: n for n, v in enumerate(dict.fromkeys(program.inputs))}
    lines = [str([_type(program.values[v]) for v in program.inputs])]
    for eqn in program.equations:
        for value in (*eqn.operands, *eqn.results):
            number.setdefault(value, len(number))
        operands = [
            f"{number[v]}:{_type(program.values[v])}" + _constant(program.constants.get(v))
            for v in eqn.operands
        ]
        results = [f"{number[v]}:{_type(program.values[v])}" for v in eqn.results]
        talks = eqn.name in COLLECTIVES or eqn.name == "axis_index"
        params = [] if talks else sorted((k, text_of(v)) for k, v in eqn.params.items())
        if eqn.name == SCAN:
            scan = scan_of(eqn)
            params = [(key, str(eqn.params[key])) for key in ("length", "reverse", "unroll")]
            params += [("body", _hash(scan.body)), ("num_consts", str(scan.num_consts))]
        lines.append(f"{results} = {eqn.name}{params} {operands}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _type(value: Value) -> str:
    return f"{value.dtype}{list(value.shape)}"


def _constant(constant: Any) -> str:
    """A scalar's value; of larger constants only that they are known."""
    if constant is None:
        return ""
    return f"={constant}" if np.ndim(constant) == 0 else "="
