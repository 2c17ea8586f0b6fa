"""From a traced function to its computation graph.

The function is traced to a jaxpr and flattened to a program; its equations are grouped into layers
(`_group`); then every layer collects what it reads, in which dimensions, and where that is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlwp.graph._constants import KnownValues, with_constants
from jaxlwp.graph._graph import ComputationGraph, Layer, Member, Use
from jaxlwp.graph._group import Draft, Grouping, pull, whole
from jaxlwp.graph._outputs import wanted_layouts
from jaxlwp.mesh import no_mesh
from jaxlwp.ops import (
    LINEAR,
    PARTS,
    RECOGNISED,
    ZERO_DERIVATIVE,
    Labels,
    Signature,
    unread_results,
    with_borders,
    with_placed_outputs,
)
from jaxlwp.program import MOVE, Equation, Program, Value, argument_name, flatten, without_dead_code


def trace(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    keywords: Mapping[str, Any] | None = None,
    differentiated: bool | None = True,
    sum_dtype: Any = None,
    outputs: Any = None,
) -> ComputationGraph:
    """Trace a training function into its computation graph.

    Args:
      fn: called as `fn(params, *args, **keywords)`; its first output (or first element of a tuple)
        is the loss.
      params: pytree of arrays or `jax.ShapeDtypeStruct`: what gradients are taken of.
      *args: the batch and whatever else `fn` takes, likewise.
      keywords: arguments that are passed by name, likewise.
      differentiated: gradients of the loss will be taken; False for evaluation, None where that
        depends on whether the first output is a loss.
      sum_dtype: the least dtype in which gradients of parameters are added up over devices; by
        default that in which the layer computes.
      outputs: "replicated" brings all outputs whole to every device; a pytree of `PartitionSpec`
        and None, like the function's output or the first levels of it, into these layouts; by
        default, and where None is given, they stay as the layers that make them have them.

    Returns:
      The graph; see `ComputationGraph`.

    Raises:
      ValueError: `fn` has side effects, an argument holds something that is no array,
        `sum_dtype` is no floating-point dtype, or `outputs` is none of these.
    """
    given = (params, *args), dict(keywords or {})
    sum_dtype = _float_dtype(sum_dtype)
    _check_leaves(given)
    shapes = jax.tree.map(_shape_of, given)
    leaves, tree = jax.tree.flatten(shapes)
    changed: list[int] = []
    results: list[Any] = []

    def flat_fn(*flat: Any) -> Any:
        arguments = jax.tree.unflatten(tree, flat)
        out = fn(*arguments[0], **arguments[1])
        # Flax NNX modules keep random counts and statistics by changing themselves.
        after = jax.tree.leaves(arguments)
        pairs = enumerate(zip(flat, after, strict=True))
        changed[:] = [i for i, (old, new) in pairs if new is not old]
        results[:] = [jax.tree.map(_shape_of, out)]
        return *jax.tree.leaves(out), *(after[i] for i in changed)

    with no_mesh():  # the plan's mesh is another matter than the one that is set
        program = in_parts(recognised(flatten(jax.make_jaxpr(flat_fn)(*leaves))))
    paths = jax.tree_util.tree_flatten_with_path(given)[0]
    names = tuple(argument_name(path) for path, _ in paths)
    if outputs is not None:
        program = with_placed_outputs(program, wanted_layouts(outputs, results[0]))
    count = len(jax.tree.leaves(params))
    if differentiated is None:
        differentiated = is_loss(results[0])
    gradients = values_with_cotangent(program, count) if differentiated else frozenset()
    graph = build_graph(program, names, count, tuple(changed), gradients, sum_dtype)
    return replace(graph, results=results[0])


def is_loss(results: Any) -> bool:
    """Whether the (first) output is one floating-point scalar.

    Args:
      results: shapes and dtypes of what a function returns.
    """
    leaves = jax.tree.leaves(results[0] if isinstance(results, tuple) and results else results)
    return (
        len(leaves) == 1 and leaves[0].shape == () and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    )


def recognised(program: Program) -> Program:
    """The program with what only several equations, or known values, reveal.

    Operators of our own take the place of those that only known operands tell from others, or that
    are written as several equations, and constants that of what makes them.
    """
    known = KnownValues(program)
    equations = []
    for eqn in program.equations:
        recognise = RECOGNISED.get(eqn.name)
        found = recognise(eqn, [known(i) for i in eqn.operands]) if recognise else None
        equations.append(found or eqn)
    program = without_dead_code(replace(program, equations=tuple(equations)))
    return without_dead_code(with_borders(with_constants(program, known)))


def in_parts(program: Program) -> Program:
    """The program with what nothing reads left out of its scans, and what they make whole apart."""
    values = list(program.values)
    read = set(program.outputs)
    equations: list[Equation] = []

    def new(value: Value) -> int:
        values.append(value)
        return len(values) - 1

    for eqn in reversed(program.equations):
        parts = PARTS[eqn.name](eqn, read, new) if eqn.name in PARTS else [eqn]
        for part in parts:
            equations.append(part)
            read.update(part.operands)
    program = replace(program, values=tuple(values), equations=tuple(reversed(equations)))
    return without_dead_code(program)


def _check_leaves(arguments: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        try:
            _shape_of(leaf)
        except TypeError as error:
            raise ValueError(
                f"trace: {argument_name(path)} is a {type(leaf).__name__} ({leaf!r:.60}), which is "
                "no array; pass arrays only: close over everything else, or split the model into "
                "arrays and the rest (as equinox.partition does)"
            ) from error


def _float_dtype(dtype: Any) -> str | None:
    try:
        if dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        pass
    raise ValueError(
        f"sum_dtype: {dtype!r} is no floating-point dtype; give one, as in sum_dtype=jnp.float32, "
        "or None to add up gradients in the dtype in which each layer computes"
    )


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


# --- building the graph ------------------------------------------------------------------------


def build_graph(
    program: Program,
    argument_names: tuple[str, ...],
    num_parameters: int,
    changed: tuple[int, ...],
    gradients: frozenset[int],
    sum_dtype: str | None = None,
) -> ComputationGraph:
    """Group a program's equations into layers and find what each layer reads.

    Args:
      program: the flat program; its first output is the loss.
      argument_names: a name for each program input.
      num_parameters: how many inputs, from the first, are parameters.
      changed: positions of the inputs that the function replaces; their new values are the
        program's last outputs.
      gradients: values that have a cotangent.
      sum_dtype: see `ComputationGraph`.
    """
    grouping = Grouping(program, num_parameters)
    casts = _casts(grouping, sum_dtype)
    owners: dict[int, tuple[int, Labels]] = {}
    awaited = _awaited(program, gradients)
    parameters = frozenset(program.inputs[:num_parameters])
    found = [
        _Reader(grouping, casts, gradients, awaited, owners, parameters, i)
        for i in range(len(grouping.drafts))
    ]
    # The first reader of an argument says how it is stored: a layer of the network, rather than
    # a weight penalty that happens to come first.
    for reader in sorted(found, key=lambda reader: grouping.reads_parameters_only(reader.layer)):
        for position, signature in grouping.drafts[reader.layer].members:
            reader.read(program.equations[position], signature)
    names = _layer_names(grouping.drafts, found, argument_names, num_parameters)
    read = set(program.outputs).union(*({use.value for use in r.uses.values()} for r in found))
    layers = tuple(
        replace(
            _layer(index, names[index], draft, reader),
            outputs=tuple(
                (program.values[value], grouping.homes[value][1])
                for position, _ in draft.members
                for value in program.equations[position].results
                if value in read and value in grouping.homes
            ),
        )
        for index, (draft, reader) in enumerate(zip(grouping.drafts, found, strict=True))
    )
    return ComputationGraph(
        layers=layers,
        program=program,
        assigned={p: (i, s) for i, d in enumerate(grouping.drafts) for p, s in d.members},
        homes=grouping.homes,
        lazy=grouping.lazy,
        casts=casts,
        owners=owners,
        gradients=gradients,
        argument_names=argument_names,
        num_parameters=num_parameters,
        changed=changed,
        sum_dtype=sum_dtype,
    )


class _Cast(NamedTuple):
    """An argument, or what casts make of it: how it is moved.

    `moved` is the one of them that is moved, `itemsize` the least on the way from that one.
    """

    argument: int
    moved: int
    itemsize: int


def _casts(grouping: Grouping, sum_dtype: str | None) -> dict[int, int]:
    """Arguments in another floating-point dtype that is better moved, and added up, than their own.

    The narrower is better, if it is not narrower than `sum_dtype` nor than two bytes: devices do
    not add up in eight bits. What is rounded on its way to the layer, as where fewer bits are
    simulated, is added up in the dtype in which the layer computes, before that rounding's
    transpose. See `ComputationGraph.casts`.
    """
    program = grouping.program
    least = max(2, jnp.dtype(sum_dtype).itemsize if sum_dtype is not None else 0)
    sizes = {i: value.itemsize for i, value in enumerate(program.values)}
    made = {value: _Cast(value, value, sizes[value]) for value in program.inputs}
    first: dict[tuple[int, str], int] = {}
    same: dict[int, int] = {}
    found: dict[int, int] = {}
    for eqn in program.equations:
        if eqn.name != "convert_element_type" or eqn.results[0] not in grouping.lazy:
            continue
        before, after = eqn.operand_values[0], eqn.result_values[0]
        floats = all(jnp.issubdtype(value.dtype, jnp.floating) for value in (before, after))
        if not floats or eqn.operands[0] not in made:
            continue
        value, known = eqn.results[0], made[eqn.operands[0]]
        key = same.get(eqn.operands[0], eqn.operands[0]), str(after.dtype)
        same[value] = first.setdefault(key, value)
        old, new = ((sizes[v] < least, sizes[v]) for v in (known.moved, value))
        rounded = known.itemsize < min(sizes[value], sizes[known.argument])
        if new < old or (rounded and new[0] <= old[0]):
            made[value] = _Cast(known.argument, value, sizes[value])
            found[value] = same[value]
        else:
            made[value] = known._replace(itemsize=min(known.itemsize, sizes[value]))
    return found


def _awaited(program: Program, gradients: frozenset[int]) -> frozenset[int]:
    """Values from which work goes on: not those of which only scalars are made, as of the loss.

    A scalar that the derivative of another one needs is waited for, too.
    """
    found: set[int] = set()
    for eqn in reversed(program.equations):
        differentiated = [operand for operand in eqn.operands if operand in gradients]
        waits = any(result in found for result in eqn.results)
        waits |= any(math.prod(value.shape) > 1 for value in eqn.result_values)
        if not waits and any(result in gradients for result in eqn.results):
            scales = eqn.name == "mul" or (eqn.name == "div" and eqn.operands[1] not in gradients)
            if scales and len(differentiated) == 1:
                found.update(set(eqn.operands).difference(differentiated))
            else:
                waits = eqn.name not in LINEAR
        if waits:
            found.update(eqn.operands)
    return frozenset(found)


class _Want(NamedTuple):
    """A value as an operator reads it: see `Use` for the fields."""

    value: int
    labels: Labels
    active: frozenset[str]
    moved: int | None


class _Reader:
    """Collects a layer's members and uses, following lazy values back to what they are made of."""

    def __init__(
        self,
        grouping: Grouping,
        casts: dict[int, int],
        gradients: frozenset[int],
        awaited: frozenset[int],
        owners: dict[int, tuple[int, Labels]],
        parameters: frozenset[int],
        layer: int,
    ) -> None:
        self.grouping, self.gradients, self.owners, self.layer = grouping, gradients, owners, layer
        self.parameters = parameters
        self.casts, self.awaited = casts, awaited
        self.recomputed = False  # the operator at hand, and what it pulls
        self.members: list[Member] = []
        self.uses: dict[_Want, Use] = {}
        self.made: dict[_Want, bool] = {}

    def read(
        self,
        eqn: Equation,
        signature: Signature,
        active: frozenset[str] | None = None,
        moved: int | None = None,
    ) -> None:
        """Read an operator's operands.

        Args:
          eqn: the operator.
          signature: its signature.
          active: its own dimensions, unless it is pulled.
          moved: the cast as which its operand is moved, if it is one (`_casts`).
        """
        if active is None:
            kept = any(call.keeps(MOVE, eqn.operand_values, {}) for call in eqn.checkpoints)
            self.recomputed = bool(eqn.checkpoints) and not kept
        driven = {*unread_results(eqn), *(r for r in eqn.results if r in self.gradients)}
        gradient = tuple(bool(driven) and operand in self.gradients for operand in eqn.operands)
        names = signature.names if active is None else active
        for operand, labels, flows in zip(eqn.operands, signature.operands, gradient, strict=True):
            self.want(_Want(operand, labels, names, moved), flows)
        self.members.append(
            Member(
                equation=eqn,
                signature=signature,
                gradient=gradient,
                recomputed=self.recomputed and any(gradient),
                awaited=any(result in self.awaited for result in eqn.results),
            )
        )

    def want(self, key: _Want, gradient: bool) -> None:
        value, labels, active, moved = key
        program = self.grouping.program
        if value in program.constants or self.made.get(key) == gradient:
            return
        gradient = gradient or self.made.get(key, False)
        known, self.made[key] = key in self.made, gradient
        if value in self.grouping.lazy:
            if known:
                return
            eqn = program.equations[self.grouping.lazy[value]]
            signature = pull(eqn, eqn.results.index(value), labels)
            if moved is None:
                moved = self.casts.get(value)
            self.read(eqn, signature or whole(eqn), active if signature else frozenset(), moved)
            return
        argument = value not in self.grouping.homes
        if argument:
            self.owners.setdefault(value, (self.layer, labels))
        source, source_labels = (self.owners if argument else self.grouping.homes)[value]
        same = (source, source_labels, frozenset(filter(None, labels))) == (
            self.layer, labels, active,
        )  # fmt: skip
        if same and not argument:
            return
        self.uses[key] = Use(
            value=value,
            info=program.values[value],
            moved=program.values[value if moved is None else moved],
            labels=labels,
            active=active,
            source=source,
            source_labels=source_labels,
            argument=argument,
            gradient=gradient,
            recomputed=self.recomputed and gradient,
            fed=argument and value not in self.parameters,
        )


def _layer(index: int, name: str, draft: Draft, reader: _Reader) -> Layer:
    sizes: dict[str, set[int]] = {}
    even: dict[str, int] = {}
    for member in reader.members:
        eqn, signature = member.equation, member.signature
        for dimension, size in signature.even.items():
            even[dimension] = math.gcd(even.get(dimension, 0), size)
        tensors = zip(
            signature.operands + signature.results,
            eqn.operand_values + eqn.result_values,
            strict=True,
        )
        for labels, value in tensors:
            for label, size in zip(labels, value.shape, strict=True):
                if label is not None:
                    sizes.setdefault(label, set()).add(size)
    return Layer(
        index=index,
        name=name,
        kind=draft.kind,
        dimensions={
            n: tuple(sorted(s)) for n, s in sizes.items() if n not in draft.blocked and min(s) > 1
        },
        even=even,
        members=tuple(reader.members),
        uses=tuple(reader.uses.values()),
        has_rule=draft.has_rule,
    )


def values_with_cotangent(program: Program, num_parameters: int) -> frozenset[int]:
    """Values whose cotangent is wanted.

    They depend on the parameters, and the loss depends on them, both differentiably.
    """

    def flows(eqn: Equation) -> bool:
        return eqn.name not in ZERO_DERIVATIVE

    values = program.values
    forward = {i for i in program.inputs[:num_parameters] if values[i].differentiable}
    for eqn in program.equations:
        if flows(eqn) and forward.intersection(eqn.operands):
            read = set(eqn.results).difference(unread_results(eqn))
            forward.update(i for i in read if values[i].differentiable)
    backward = set(program.outputs[:1])
    for eqn in reversed(program.equations):
        if flows(eqn) and backward.intersection(eqn.results):
            backward.update(i for i in eqn.operands if values[i].differentiable)
    return frozenset(forward & backward)


# --- names -------------------------------------------------------------------------------------


def _layer_names(
    drafts: list[Draft],
    readers: list[_Reader],
    argument_names: tuple[str, ...],
    num_parameters: int,
) -> list[str]:
    """Module path, else path of the parameter that the layer reads, else kind; made unique."""
    scopes = [draft.scope.split("/") for draft in drafts]
    roots = {scope[0] for scope in scopes if scope[0]}
    program = readers[0].grouping.program if readers else None
    taken: dict[str, int] = {}
    names = []
    for draft, reader, scope in zip(drafts, readers, scopes, strict=True):
        path = scope[1:] if len(roots) == 1 else scope
        parameters = [
            argument_names[program.inputs.index(use.value)]
            for use in reader.uses.values()
            if program and use.argument and use.value in program.inputs[:num_parameters]
        ]
        base = "/".join(path) or (_parameter_module(parameters[0]) if parameters else "")
        anchored = draft.kind in ("conv", "dense") and base
        name = base if anchored else "/".join(p for p in (base, draft.kind) if p)
        count = taken.get(name, 0)
        taken[name] = count + 1
        names.append(name if anchored and count == 0 else f"{name}_{count}")
    return names


def _parameter_module(name: str) -> str:
    """Module path of a parameter: "params['conv1']['kernel'].value" gives "conv1"."""
    cleaned = name.removeprefix("params").replace("['", "/").replace("']", "").replace("[", "/")
    parts = [p for p in cleaned.replace("]", "").replace(".", "/").split("/") if p]
    parts = [p for p in parts if p not in ("value", "raw_value", "params")]
    return "/".join(parts[:-1] or parts)
