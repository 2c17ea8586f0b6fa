"""Constraints of the user's own: pinned layers, forbidden dimensions, replicated parameters.

They narrow the space before it is priced, so that the optimum is one under them, proven as ever.
Names are those of the plan table and of the graph's arguments; shell patterns (`fnmatch`) stand for
several, as in "Conv_*".
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxlwp.graph import ComputationGraph, LayerOutline, Outlined, Use
from jaxlwp.ops import OUTPUT
from jaxlwp.space._config import DIMENSIONS, Config, Layout
from jaxlwp.space._layout import degree, even_layout
from jaxlwp.space._moves import plan_moves

Split = Config | Mapping[str, int | str | Sequence[str]]
"""A config, or for each split dimension its degree or its mesh axes."""


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a strategy must keep to.

    Examples:
        >>> Constraints(
        ...     pin={"Dense_0": {"channel": 8}, "Conv_0": {"sample": ("hosts", "gpus")}},
        ...     forbid={"*": ("height", "width")},
        ...     replicated=("*embedding*",),
        ... )  # doctest: +ELLIPSIS
        Constraints(pin=...

    Attributes:
      pin: layer name or pattern -> the split that the layer has: a `Config`, or for each split
        dimension its degree or the mesh axes that split it; dimensions that are left out are not
        split. `{}` is the replicated layer.
      forbid: dimensions that no layer is split by; or layer name or pattern -> dimensions.
      replicated: names or patterns of parameters, such as `params['Conv_0']['kernel']`, that every
        device holds whole.
      stored: names or patterns of parameters -> the layout in which each is stored, for each
        dimension the mesh axes that split it. All layers read it without moving it.
    """

    pin: Mapping[str, Split] = field(default_factory=dict)
    forbid: Mapping[str, Sequence[str]] | Sequence[str] = ()
    replicated: Sequence[str] = ()
    stored: Mapping[str, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the form.

        Raises:
          ValueError: a text in place of a list, or a dimension that there is not.
        """
        for name in ("forbid", "replicated"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"Constraints.{name} is {getattr(self, name)!r}; give a list of names, as in "
                    f"({getattr(self, name)!r},)"
                )
        for dimension in (d for _, listed in self.forbidden() for d in listed):
            _check_dimension("forbid", dimension)
        for split in self.pin.values():
            if not isinstance(split, Config):
                for dimension in split:
                    _check_dimension("pin", dimension)

    def forbidden(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Layer names or patterns, each with the dimensions that such layers are not split by."""
        if isinstance(self.forbid, Mapping):
            return self.forbid.items()
        return (("*", self.forbid),)

    def apply(
        self,
        graph: Outlined,
        configs: Sequence[Sequence[Config]],
        axis_sizes: Mapping[str, int],
    ) -> tuple[tuple[Config, ...], ...]:
        """The configs that are left to each layer.

        Args:
          graph: the computation graph.
          configs: the configs of each layer.
          axis_sizes: devices along each mesh axis.

        Raises:
          ValueError: a name or pattern matches nothing, or a layer is left without a config.
        """
        checks: list[list[tuple[str, Callable[[Config], bool]]]] = [[] for _ in graph.layers]
        names = [layer.name for layer in graph.layers]
        possible = [tuple(choices) for choices in configs]
        for pattern, split in self.pin.items():
            text = f"pin[{pattern!r}]"
            for n in _matching(text, pattern, names, "layer"):
                named = _named(split, graph.layers[n], axis_sizes)
                possible[n] = tuple(dict.fromkeys((*possible[n], *named)))
                checks[n].append((text, functools.partial(_has_split, split, axis_sizes)))
        for pattern, dimensions in self.forbidden():
            text = f"forbid {', '.join(dimensions)}"
            for n in _matching(text, pattern, names, "layer") if dimensions else ():
                checks[n].append((text, functools.partial(_leaves_whole, tuple(dimensions))))
        for n, text, check in self._stored(graph, axis_sizes):
            checks[n].append((text, check))
        return tuple(
            _kept(layer, choices, required, axis_sizes)
            for layer, choices, required in zip(graph.layers, possible, checks, strict=True)
        )

    def pinned(
        self,
        graph: Outlined,
        layer: LayerOutline,
        axis_groups: Sequence[Sequence[str]],
        axis_sizes: Mapping[str, int],
    ) -> list[Config]:
        """The configs with the splits that a layer is pinned to, or that its parameters ask for.

        Args:
          graph: the computation graph.
          layer: the layer.
          axis_groups: mesh axes in groups that are interchangeable, slowest link level first.
          axis_sizes: devices along each mesh axis.
        """
        found: list[Config] = []
        for pattern, split in self.pin.items():
            if layer.name == pattern or fnmatch.fnmatchcase(layer.name, pattern):
                found += _named(split, layer, axis_sizes)
                if not isinstance(split, Config):
                    found += _of_degrees(split, axis_groups, axis_sizes)
        for _, n, layout in self._layouts(graph):
            if graph.parameters[n].layer == layer.index:
                named = zip(graph.parameters[n].labels, layout, strict=True)
                splits = {name: axes for name, axes in named if name}
                found.append(Config.of(splits).splitting(axis_sizes))
        return found

    def _layouts(self, graph: Outlined) -> Iterable[tuple[str, int, Layout]]:
        """Parameters whose layout is given: where that is said, which parameter, and the layout."""
        names = [parameter.name for parameter in graph.parameters]
        for pattern in self.replicated:
            for n in _matching(f"replicated {pattern!r}", pattern, names, "parameter"):
                yield f"replicated {names[n]}", n, ((),) * len(graph.parameters[n].shape)
        for pattern, layout in self.stored.items():
            for n in _matching(f"stored {pattern!r}", pattern, names, "parameter"):
                yield f"stored {names[n]} as {layout}", n, layout

    def _stored(
        self, graph: Outlined, axis_sizes: Mapping[str, int]
    ) -> Iterable[tuple[int, str, Callable[[Config], bool]]]:
        parameters = graph.parameters
        for text, n, layout in self._layouts(graph):
            owner, labels, shape = parameters[n].layer, parameters[n].labels, parameters[n].shape
            if owner is None:
                continue  # nothing reads it: it is replicated anyway
            yield owner, text, functools.partial(_stores, shape, labels, layout, axis_sizes)
            if any(layout):  # of what is whole every reader takes its part
                for reader, use in _readers(text, graph, n):
                    yield reader, text, functools.partial(_reads, use, layout, axis_sizes)


def _readers(place: str, graph: Outlined, parameter: int) -> Iterable[tuple[int, Use]]:
    """The layers that read a parameter, and how.

    Raises:
      ValueError: the graph has no program, which alone knows that.
    """
    if not isinstance(graph, ComputationGraph):
        raise ValueError(
            f"constraints: {place}: a saved problem does not know which layers read a parameter; "
            "give this constraint to parallelize or price"
        )
    value = graph.program.inputs[parameter]
    return (
        (layer.index, use) for layer in graph.layers for use in layer.uses if use.value == value
    )


def _stores(
    shape: Sequence[int],
    labels: Sequence[str | None],
    layout: Layout,
    axis_sizes: Mapping[str, int],
    config: Config,
) -> bool:
    """Whether a layer under a config stores an argument that it owns in a layout."""
    return even_layout(shape, config.layout(labels), axis_sizes) == layout


def _reads(use: Use, layout: Layout, axis_sizes: Mapping[str, int], config: Config) -> bool:
    """Whether a layer under a config reads what is stored in a layout without moving it."""
    moves = plan_moves(
        shape=use.info.shape,
        source=layout,
        target=config.layout(use.labels),
        active=frozenset(axis for name in use.active for axis in config.axes(name)),
        axis_sizes=axis_sizes,
    )
    return all(move.kind in ("slice", "cast") for move in moves)


def outputs_kept(
    graph: ComputationGraph, constraints: Constraints | None, axis_sizes: Mapping[str, int]
) -> Constraints | None:
    """The constraints, and that outputs are where they are wanted (`trace(outputs=...)`).

    Args:
      graph: the computation graph.
      constraints: the user's own.
      axis_sizes: devices along each mesh axis.

    Raises:
      ValueError: an output is wanted split by axes that the mesh does not have, or unevenly.
    """
    pins = {}
    for layer in graph.layers:
        if layer.kind != OUTPUT:
            continue
        member = layer.members[-1]
        layout, shape = member.equation.params["layout"], layer.output.shape
        for dim, (size, axes) in enumerate(zip(shape, layout, strict=True)):
            _check_output(dim, size, axes, axis_sizes)
        if not any(layout):
            continue  # it cannot be split anyway
        labels = member.signature.results[0]
        splits = {name: axes for name, axes in zip(labels, layout, strict=True) if name}
        pins[layer.name] = Config.of(splits).splitting(axis_sizes)
    if not pins:
        return constraints
    constraints = constraints or Constraints()
    return replace(constraints, pin={**constraints.pin, **pins})


def _check_output(dim: int, size: int, axes: Sequence[str], axis_sizes: Mapping[str, int]) -> None:
    unknown = [axis for axis in axes if axis not in axis_sizes]
    if unknown:
        raise ValueError(
            f"outputs: dimension {dim} is to be split over mesh axis {unknown[0]!r}; there are "
            f"{', '.join(axis_sizes)}"
        )
    parts = degree(axes, axis_sizes)
    if size % parts:
        raise ValueError(
            f"outputs: dimension {dim} of size {size} is to be split over {parts} devices "
            f"({', '.join(axes)}), which do not divide it; JAX returns even parts only: leave out "
            "an axis"
        )


def _check_dimension(place: str, dimension: str) -> None:
    if dimension not in DIMENSIONS:
        raise ValueError(
            f"Constraints.{place}: {dimension!r} is no dimension; give some of {DIMENSIONS}"
        )


def _matching(place: str, pattern: str, names: Sequence[str], kind: str) -> list[int]:
    """Positions of the names that a pattern stands for: the very name, or all that match."""
    if pattern in names:  # names of parameters contain brackets, which patterns read otherwise
        return [n for n, name in enumerate(names) if name == pattern]
    found = [n for n, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"constraints: {place} matches no {kind}; there are {listed}")
    return found


def _named(split: Split, layer: LayerOutline, axis_sizes: Mapping[str, int]) -> tuple[Config, ...]:
    """The config that a split names axis by axis, if the layer can have it.

    The space itself holds one order of the axes only.
    """
    if not isinstance(split, Config):
        listed = {d: _axes(value) for d, value in split.items() if not isinstance(value, int)}
        if not split or len(listed) < len(split):
            return ()
        split = Config.of(listed)
    unknown = sorted(split.used_axes.difference(axis_sizes))
    if unknown:
        raise ValueError(
            f"constraints: layer {layer.name} is pinned to mesh axis {unknown[0]!r}; there are "
            f"{', '.join(axis_sizes)}"
        )
    split = split.splitting(axis_sizes)
    possible = split.within(layer.dimensions, layer.even, axis_sizes)
    return (split,) if possible == split else ()


def _of_degrees(
    split: Mapping[str, int | str | Sequence[str]],
    axis_groups: Sequence[Sequence[str]],
    axis_sizes: Mapping[str, int],
) -> list[Config]:
    """Every way to reach degrees with axes of each group in order."""
    degrees = {name: value for name, value in split.items() if isinstance(value, int)}
    if len(degrees) < len(split):
        return []
    sizes = [axis_sizes[group[0]] for group in axis_groups]
    counts = list(itertools.product(*(range(len(group) + 1) for group in axis_groups)))
    options = [
        [c for c in counts if math.prod(map(operator.pow, sizes, c)) == value]
        for value in degrees.values()
    ]
    found = []
    for choice in itertools.product(*options):
        splits: dict[str, list[str]] = {name: [] for name in degrees}
        for number, group in enumerate(axis_groups):
            rest = iter(group)
            for name, c in zip(degrees, choice, strict=True):
                splits[name] += itertools.islice(rest, c[number])
        if all(
            len(group) >= sum(c[number] for c in choice) for number, group in enumerate(axis_groups)
        ):
            found.append(Config.of(splits))
    return found


def _axes(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _has_split(split: Split, axis_sizes: Mapping[str, int], config: Config) -> bool:
    if isinstance(split, Config):
        return config == split.splitting(axis_sizes)

    def agrees(axes: tuple[str, ...], value: int | str | Sequence[str]) -> bool:
        if isinstance(value, int):
            return degree(axes, axis_sizes) == value
        return axes == splitting(value)

    def splitting(value: str | Sequence[str]) -> tuple[str, ...]:
        return tuple(axis for axis in _axes(value) if axis_sizes[axis] > 1)

    wanted = {
        name: value
        for name, value in split.items()
        if (value != 1 if isinstance(value, int) else splitting(value))
    }
    return set(wanted) == {name for name, _ in config.splits} and all(
        agrees(config.axes(name), value) for name, value in wanted.items()
    )


def _leaves_whole(dimensions: Sequence[str], config: Config) -> bool:
    return not any(config.axes(dimension) for dimension in dimensions)


def _kept(
    layer: LayerOutline,
    choices: Sequence[Config],
    required: Sequence[tuple[str, Callable[[Config], bool]]],
    axis_sizes: Mapping[str, int],
) -> tuple[Config, ...]:
    kept = tuple(choices)
    for text, check in required:
        left = tuple(config for config in kept if check(config))
        if not left:
            some = "; ".join(config.describe(axis_sizes) for config in kept[:6])
            raise ValueError(
                f"constraints: {text} leaves layer {layer.name} without a config; "
                f"{len(kept)} are possible there, such as {some}"
            )
        kept = left
    return kept
