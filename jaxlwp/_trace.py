"""From a traced function to its computation graph.

Every equation of the flat program either becomes part of a layer or is evaluated where it is used:
- an *anchor* (convolution, pooling, dense, flatten) starts a layer;
- a *reduce* operator starts a layer that later operators on the same operand join, so a softmax
  or a normalisation is one layer;
- a *follow* operator (bias, activation, dropout's select) joins the layer of its operand; if its
  operands come from different layers it starts a layer of its own (a residual add);
- work on arguments alone (casts and reshapes of parameters, scaling of images, random masks) is
  *lazy*: evaluated by the layer that uses it, in the layout that it asks for.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxlwp._graph import ComputationGraph, Layer, Member, Use
from jaxlwp._program import Equation, KnownValues, Program, flatten, without_dead_code
from jaxlwp.ops import RECOGNISED, RULES, Labels, Rule, Signature, default_names, rule_of

ZERO_DERIVATIVE = frozenset("stop_gradient sign floor ceil round nextafter is_finite".split())
"""Operators through which no cotangent flows."""


def trace(
    fn: Callable[..., Any], params: Any, *args: Any, differentiated: bool = True
) -> ComputationGraph:
    """Trace a training function into its computation graph.

    Args:
      fn: called as `fn(params, *args)`; its first output (or first element of a tuple) is the
        loss.
      params: pytree of arrays or `jax.ShapeDtypeStruct`: what gradients are taken of.
      *args: the batch and whatever else `fn` takes, likewise.
      differentiated: gradients of the loss will be taken; False for evaluation.

    Returns:
      The graph; see `ComputationGraph`.

    Raises:
      ValueError: `fn` has side effects, or an argument holds something that is no array.
    """
    _check_leaves((params, *args))
    shapes = jax.tree.map(_shape_of, (params, *args))
    leaves, tree = jax.tree.flatten(shapes)
    changed: list[int] = []

    def flat_fn(*flat: Any) -> Any:
        arguments = jax.tree.unflatten(tree, flat)
        out = fn(*arguments)
        # Flax NNX modules keep random counts and statistics by changing themselves.
        after = jax.tree.leaves(arguments)
        pairs = enumerate(zip(flat, after, strict=True))
        changed[:] = [i for i, (old, new) in pairs if new is not old]
        return *jax.tree.leaves(out), *(after[i] for i in changed)

    program = recognised(flatten(jax.make_jaxpr(flat_fn)(*leaves)))
    paths = jax.tree_util.tree_flatten_with_path((params, *args))[0]
    names = tuple(_path_name(path) for path, _ in paths)
    count = len(jax.tree.leaves(params))
    gradients = values_with_cotangent(program, count) if differentiated else frozenset()
    return build_graph(program, names, count, tuple(changed), gradients)


def recognised(program: Program) -> Program:
    """The program with operators in place of what only their known operands reveal."""
    known = KnownValues(program)
    equations = []
    for eqn in program.equations:
        recognise = RECOGNISED.get(eqn.name)
        found = recognise(eqn, [known(i) for i in eqn.operands]) if recognise else None
        equations.append(found or eqn)
    return without_dead_code(replace(program, equations=tuple(equations)))


def _check_leaves(arguments: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        try:
            _shape_of(leaf)
        except TypeError as error:
            raise ValueError(
                f"trace: {_path_name(path)} is a {type(leaf).__name__} ({leaf!r:.60}), which is no "
                "array; pass arrays only: close over everything else, or split the model into "
                "arrays and the rest (as equinox.partition does)"
            ) from error


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _path_name(path: tuple[Any, ...]) -> str:
    head = "params" if path[0].idx == 0 else f"args[{path[0].idx - 1}]"
    return head + jax.tree_util.keystr(path[1:])


# --- matching a signature against dimension names ----------------------------------------------


def match_labels(
    pattern: Iterable[Labels], actual: Iterable[Labels | None]
) -> tuple[dict[str, str], set[str]] | None:
    """Names for a signature's dimensions, from the known labels of some of its tensors.

    Args:
      pattern: labels of a signature's tensors.
      actual: labels already given to these tensors; None where nothing is known.

    Returns:
      The mapping from the signature's names to the known ones, and the known names that meet a
      dimension that cannot be split; None if the known labels contradict each other.
    """
    names: dict[str, str] = {}
    blocked: set[str] = set()
    for letters, labels in zip(pattern, actual, strict=True):
        if labels is None:
            continue
        for letter, label in zip(letters, labels, strict=True):
            if letter is None and label is not None:
                blocked.add(label)
            elif letter is not None and label is not None:
                if names.setdefault(letter, label) != label:
                    return None
    if len(set(names.values())) != len(names):
        return None
    return names, blocked


def rename(signature: Signature, names: dict[str, str]) -> Signature:
    """The signature with its dimensions renamed; dimensions without a new name become None."""

    def labels(old: Labels) -> Labels:
        return tuple(names.get(label) if label is not None else None for label in old)

    return replace(
        signature,
        operands=tuple(labels(old) for old in signature.operands),
        results=tuple(labels(old) for old in signature.results),
        windows={names[n]: w for n, w in signature.windows.items() if n in names},
        even={names[n]: size for n, size in signature.even.items() if n in names},
    )


def pull(eqn: Equation, position: int, labels: Labels) -> Signature | None:
    """Signature of a lazy equation whose result number `position` is asked for with `labels`.

    Returns:
      The signature in the asker's names; None if the result cannot be made in parts, so that it
      is made whole and then sliced.
    """
    signature = _signature_of(eqn)
    if signature is None:
        return None
    matched = match_labels([signature.results[position]], [labels])
    if matched is None or matched[1]:
        return None
    return rename(signature, matched[0])


def _signature_of(eqn: Equation) -> Signature | None:
    found = rule_of(eqn)
    return found[1] if found else None


def whole(eqn: Equation) -> Signature:
    """The signature of an operator that is not split at all."""
    return Signature(
        role="anchor",
        operands=tuple((None,) * len(v.shape) for v in eqn.operand_values),
        results=tuple((None,) * len(v.shape) for v in eqn.result_values),
    )


def _for_reduction(program: Program) -> frozenset[int]:
    """Positions of the following operators that only reductions read: a square before its mean.

    They belong to the reduction's layer, which would else read their operand and their result. An
    operand that nothing else reads (a bias is added to it) is better left where it is made.
    """
    found: set[int] = set()
    counts = collections.Counter(i for eqn in program.equations for i in eqn.operands)
    readers: dict[int, bool] = dict.fromkeys(program.outputs, False)  # value -> only reductions
    for position, eqn in reversed(list(enumerate(program.equations))):
        signature = _signature_of(eqn)
        role = signature.role if signature else None
        if role == "follow" and all(readers.get(result) for result in eqn.results):
            found.add(position)
        wanted = role == "reduce" or position in found
        for operand in eqn.operands:
            readers[operand] = readers.get(operand, True) and wanted
    waiting: set[int] = set()  # values
    for position, eqn in enumerate(program.equations):
        shared = any(counts[i] > 1 or i in waiting for i in eqn.operands)
        if position in found and shared:
            waiting.update(eqn.results)
        else:
            found.discard(position)
    return frozenset(found)


# --- building the graph ------------------------------------------------------------------------


@dataclass
class _Draft:
    """A layer under construction."""

    kind: str
    scope: str
    reduce: bool
    has_rule: bool
    members: list[tuple[int, Signature]] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)


class _Grouping:
    """Assigns the equations of a program to layers, in one pass."""

    def __init__(self, program: Program, num_parameters: int) -> None:
        self.program = program
        self.of_parameters = set(program.inputs[:num_parameters]) | set(program.constants)
        self.drafts: list[_Draft] = []
        self.known: dict[int, dict[int, Labels]] = {}  # value -> layer -> labels
        self.homes: dict[int, tuple[int, Labels]] = {}
        self.lazy: dict[int, int] = {}
        self.waiting: dict[int, int] = {}  # value -> position of the equation that makes it
        self.for_reduction = _for_reduction(program)
        for position, eqn in enumerate(program.equations):
            self.assign(position, eqn)

    def assign(self, position: int, eqn: Equation) -> None:
        rule, signature = RULES.get(eqn.name), _signature_of(eqn)
        placed = [i for i in eqn.operands if i in self.known or i in self.waiting]
        if self.of_parameters.issuperset(eqn.operands):
            self.of_parameters.update(eqn.results)
        if rule is None or signature is None:
            self.open(position, eqn, whole(eqn), eqn.name, has_rule=False)
        elif signature.role == "lazy" or (signature.role == "follow" and not placed):
            self.lazy.update(dict.fromkeys(eqn.results, position))
        elif position in self.for_reduction:
            self.waiting.update(dict.fromkeys(eqn.results, position))
        else:
            self.place(position, eqn, rule, signature)

    def reads_parameters_only(self, layer: int) -> bool:
        """Whether a layer's results depend on parameters and constants alone."""
        members = (self.program.equations[position] for position, _ in self.drafts[layer].members)
        return all(self.of_parameters.issuperset(eqn.results) for eqn in members)

    def place(self, position: int, eqn: Equation, rule: Rule, signature: Signature) -> None:
        """Let the equation join or start a layer; what waited for it comes first."""
        for operand in eqn.operands:
            if operand in self.waiting:
                before = self.waiting[operand]
                waited = self.program.equations[before]
                for result in waited.results:
                    del self.waiting[result]
                own = _signature_of(waited)
                assert own is not None
                self.place(before, waited, RULES["reduce_sum"], replace(own, role="reduce"))
        placed = [i for i in eqn.operands if i in self.known]
        if signature.role == "anchor" or not self.join(position, eqn, signature, placed):
            self.open(position, eqn, self.named(eqn, signature), rule.kind)

    def join(self, position: int, eqn: Equation, signature: Signature, placed: list[int]) -> bool:
        """Add the equation to the latest layer that knows all its placed operands."""
        shared = set.intersection(*(set(self.known[i]) for i in placed)) if placed else set()
        for layer in sorted(shared, reverse=True):
            draft = self.drafts[layer]
            if signature.role == "reduce" and not draft.reduce:
                continue
            actual = [self.known.get(i, {}).get(layer) for i in eqn.operands]
            matched = match_labels(signature.operands, actual)
            if matched is None:
                continue
            names, blocked = matched
            draft.blocked |= blocked
            self.add(layer, position, eqn, rename(signature, names))
            return True
        return False

    def named(self, eqn: Equation, signature: Signature) -> Signature:
        """The signature of a layer's first operator with proper dimension names.

        An anonymous dimension keeps the name that it has where its operand is made: the height of
        an image stays the height through transposes and reshapes.
        """
        names = {n: n for n in sorted(signature.names) if not n.startswith("#")}

        def give(letters: Labels, labels: Labels) -> None:
            for letter, label in zip(letters, labels, strict=True):
                if letter and label and letter not in names and label not in names.values():
                    names[letter] = label

        for operand, letters in zip(eqn.operands, signature.operands, strict=True):
            give(letters, self.names_of(operand))
        tensors = (*signature.operands, *signature.results)
        penalty = self.of_parameters.issuperset(eqn.results) and not any(signature.results)
        for letters in tensors:
            if not penalty:  # the sum over a kernel, whose first dimension is no sample
                give(letters, default_names(len(letters)))
        for letters in tensors:
            give(letters, tuple(f"dim{dim}" for dim in range(len(letters))))
        return rename(signature, names)

    def names_of(self, value: int) -> Labels:
        """Names that a value's dimensions have already, seen through lazy operators."""
        if value in self.homes:
            return self.homes[value][1]
        rank = len(self.program.values[value].shape)
        if value not in self.lazy:
            return (None,) * rank
        eqn = self.program.equations[self.lazy[value]]
        signature = _signature_of(eqn)
        if signature is None:
            return (None,) * rank
        known: dict[str | None, str | None] = {}
        for operand, letters in zip(eqn.operands, signature.operands, strict=True):
            known.update(zip(letters, self.names_of(operand), strict=True))
        return tuple(
            known.get(letter) if letter is not None else None
            for letter in signature.results[eqn.results.index(value)]
        )

    def open(
        self, position: int, eqn: Equation, signature: Signature, kind: str, has_rule: bool = True
    ) -> None:
        kind = "join" if kind == "elementwise" else kind
        reduce = signature.role == "reduce"
        self.drafts.append(_Draft(kind=kind, scope=eqn.scope, reduce=reduce, has_rule=has_rule))
        layer = len(self.drafts) - 1
        if reduce:
            for operand, labels in zip(eqn.operands, signature.operands, strict=True):
                if operand in self.known:
                    self.known[operand][layer] = labels
        self.add(layer, position, eqn, signature)

    def add(self, layer: int, position: int, eqn: Equation, signature: Signature) -> None:
        self.drafts[layer].members.append((position, signature))
        if self.drafts[layer].reduce:
            for operand, labels in zip(eqn.operands, signature.operands, strict=True):
                if operand in self.known:
                    self.known[operand].setdefault(layer, labels)
        for result, labels in zip(eqn.results, signature.results, strict=True):
            self.known[result] = {layer: labels}
            self.homes[result] = (layer, labels)


def build_graph(
    program: Program,
    argument_names: tuple[str, ...],
    num_parameters: int,
    changed: tuple[int, ...],
    gradients: frozenset[int],
) -> ComputationGraph:
    """Group a program's equations into layers and find what each layer reads.

    Args:
      program: the flat program; its first output is the loss.
      argument_names: a name for each program input.
      num_parameters: how many inputs, from the first, are parameters.
      changed: positions of the inputs that the function replaces; their new values are the
        program's last outputs.
      gradients: values that have a cotangent.
    """
    grouping = _Grouping(program, num_parameters)
    owners: dict[int, tuple[int, Labels]] = {}
    awaited = _awaited(program, gradients)
    found = [_Reader(grouping, gradients, awaited, owners, i) for i in range(len(grouping.drafts))]
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
        owners=owners,
        gradients=gradients,
        argument_names=argument_names,
        num_parameters=num_parameters,
        changed=changed,
    )


_SUMS = ("add", "add_any", "convert_element_type", "neg", "reduce_sum", "reshape", "sub")
"""Operators whose derivative needs no value."""


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
                waits = eqn.name not in _SUMS
        if waits:
            found.update(eqn.operands)
    return frozenset(found)


class _Reader:
    """Collects a layer's members and uses, following lazy values back to what they are made of."""

    def __init__(
        self,
        grouping: _Grouping,
        gradients: frozenset[int],
        awaited: frozenset[int],
        owners: dict[int, tuple[int, Labels]],
        layer: int,
    ) -> None:
        self.grouping, self.gradients, self.owners, self.layer = grouping, gradients, owners, layer
        self.awaited = awaited
        self.recomputed = False  # the operator at hand, and what it pulls
        self.members: list[Member] = []
        self.uses: dict[tuple[int, Labels, frozenset[str]], Use] = {}
        self.made: dict[tuple[int, Labels, frozenset[str]], bool] = {}

    def read(
        self, eqn: Equation, signature: Signature, active: frozenset[str] | None = None
    ) -> None:
        """Read an operator's operands; `active` is its own dimensions unless it is pulled."""
        if active is None:
            self.recomputed = bool(eqn.checkpoints)
        reached = any(result in self.gradients for result in eqn.results)
        gradient = tuple(reached and operand in self.gradients for operand in eqn.operands)
        names = signature.names if active is None else active
        for operand, labels, flows in zip(eqn.operands, signature.operands, gradient, strict=True):
            self.want(operand, labels, names, flows)
        self.members.append(
            Member(
                equation=eqn,
                signature=signature,
                gradient=gradient,
                recomputed=self.recomputed and any(gradient),
                awaited=any(result in self.awaited for result in eqn.results),
            )
        )

    def want(self, value: int, labels: Labels, active: frozenset[str], gradient: bool) -> None:
        program = self.grouping.program
        key = (value, labels, active)
        if value in program.constants or self.made.get(key) == gradient:
            return
        gradient = gradient or self.made.get(key, False)
        known, self.made[key] = key in self.made, gradient
        if value in self.grouping.lazy:
            if known:
                return
            eqn = program.equations[self.grouping.lazy[value]]
            signature = pull(eqn, eqn.results.index(value), labels)
            self.read(eqn, signature or whole(eqn), active if signature else frozenset())
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
        self.uses[value, labels, active] = Use(
            value=value,
            info=program.values[value],
            labels=labels,
            active=active,
            source=source,
            source_labels=source_labels,
            argument=argument,
            gradient=gradient,
            recomputed=self.recomputed and gradient,
        )


def _layer(index: int, name: str, draft: _Draft, reader: _Reader) -> Layer:
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
    """Values that depend on the parameters and on which the loss depends, both differentiably."""

    def flows(eqn: Equation) -> bool:
        return eqn.name not in ZERO_DERIVATIVE

    values = program.values
    forward = {i for i in program.inputs[:num_parameters] if values[i].differentiable}
    for eqn in program.equations:
        if flows(eqn) and forward.intersection(eqn.operands):
            forward.update(i for i in eqn.results if values[i].differentiable)
    backward = set(program.outputs[:1])
    for eqn in reversed(program.equations):
        if flows(eqn) and backward.intersection(eqn.results):
            backward.update(i for i in eqn.operands if values[i].differentiable)
    return frozenset(forward & backward)


# --- names -------------------------------------------------------------------------------------


def _layer_names(
    drafts: list[_Draft],
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
