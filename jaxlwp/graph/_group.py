"""Which layer each equation of the flat program belongs to, and what its dimensions are called.

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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from jaxlwp.graph._samples import Samples
from jaxlwp.ops import RULES, Labels, Rule, Signature, default_names, rule_of, spatial_names
from jaxlwp.program import Equation, Program

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
    made = signature.results[position]
    # Nobody splits a dimension of size 1, and elementwise operators have no name for it.
    sizes = eqn.result_values[position].shape
    asked = tuple(
        None if own is None and size == 1 else label
        for own, size, label in zip(made, sizes, labels, strict=True)
    )
    matched = match_labels([made], [asked])
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


# --- grouping ----------------------------------------------------------------------------------


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


@dataclass
class Draft:
    """A layer under construction."""

    kind: str
    scope: str
    reduce: bool
    has_rule: bool
    members: list[tuple[int, Signature]] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)


class Grouping:
    """Assigns the equations of a program to layers, in one pass."""

    def __init__(self, program: Program, num_parameters: int) -> None:
        self.program = program
        self.of_parameters = set(program.inputs[:num_parameters]) | set(program.constants)
        self.outputs = frozenset(program.outputs)
        self.of_arguments = set(program.inputs)
        self.samples = Samples(program, num_parameters)
        self.drafts: list[Draft] = []
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
        if not self.of_arguments.isdisjoint(eqn.operands):
            self.of_arguments.update(eqn.results)
        if self.of_parameters.issuperset(eqn.operands):
            self.of_parameters.update(eqn.results)
        if rule is None or signature is None:
            self.open(position, eqn, whole(eqn), eqn.name, has_rule=False)
        elif (
            not rule.once
            and not self.returned(eqn)
            and (signature.role == "lazy" or (signature.role == "follow" and not placed))
        ):
            self.lazy.update(dict.fromkeys(eqn.results, position))
        elif position in self.for_reduction:
            self.waiting.update(dict.fromkeys(eqn.results, position))
        else:
            self.place(position, eqn, rule, signature)

    def returned(self, eqn: Equation) -> bool:
        """Whether the function returns an array that the equation makes of its arguments.

        Such an array needs a layer, which says how it is split. A single number does not, nor what
        every device can make whole.
        """
        values = self.program.values
        return self.of_arguments.issuperset(eqn.results) and any(
            i in self.outputs and math.prod(values[i].shape) > 1 for i in eqn.results
        )

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
        an image stays the height through transposes and reshapes. What comes from the batch's
        leading dimension is the sample, wherever it is; other names go by position.
        """
        turned = RULES[eqn.name].weight_first
        if turned is not None and self.weight_is_first(eqn, signature):
            signature = turned(eqn)
        names = {n: n for n in sorted(signature.names) if not n.startswith("#")}

        def give(letters: Labels, labels: Labels) -> None:
            for letter, label in zip(letters, labels, strict=True):
                if letter and label and letter not in names and label not in names.values():
                    names[letter] = label

        for operand, letters in zip(eqn.operands, signature.operands, strict=True):
            give(letters, self.names_of(operand))
        tensors = (*signature.operands, *signature.results)
        values = (*eqn.operands, *eqn.results)
        ranks = [
            (rank, letter)
            for value, letters in zip(values, tensors, strict=True)
            for dim, letter in enumerate(letters)
            if letter and (rank := self.samples.rank(value, dim)) is not None
        ]
        for _, letter in sorted(ranks, key=lambda pair: pair[0]):
            give((letter,), ("sample",))
        penalty = self.of_parameters.issuperset(eqn.results) and not any(signature.results)
        likely = signature.likely or (None,) * len(tensors)
        for value, letters, labels in zip(values, tensors, likely, strict=True):
            if not penalty:  # the sum over a kernel, whose first dimension is no sample
                known = [names.get(x or "") for x in letters]
                give(letters, labels if labels else self.default_names(value, known))
        for letters in tensors:
            give(letters, tuple(f"dim{dim}" for dim in range(len(letters))))
        return rename(signature, names)

    def weight_is_first(self, eqn: Equation, signature: Signature) -> bool:
        """Whether of a contraction's operands the first has the channels that it makes.

        That is the one of parameters; between two activations, as in attention, the one whose own
        dimensions, those that are in the result alone with it, are channels already.
        """
        weights = tuple(self.of_parameters.issuperset([i]) for i in eqn.operands)
        if any(weights):
            return weights[0] and not weights[1]
        shared = set(signature.operands[0]).intersection(signature.operands[1])

        def own(side: int) -> set[str | None]:
            labels = zip(self.names_of(eqn.operands[side]), signature.operands[side], strict=True)
            return {name for name, letter in labels if letter not in shared}

        first, second = own(0), own(1)
        return "channel" in first and "channel" not in second

    def default_names(self, value: int, known: list[str | None]) -> Labels:
        """Names of an activation's dimensions by their position, given those that are known."""
        rank = len(known)
        if "sample" in known:
            others = iter(default_names(rank)[1:])
            return tuple("sample" if name == "sample" else next(others) for name in known)
        if rank and self.samples.excluded(value, 0):
            return (*spatial_names(rank - 1), "channel")
        return default_names(rank)

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
        self.drafts.append(Draft(kind=kind, scope=eqn.scope, reduce=reduce, has_rule=has_rule))
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
