"""Parallelization configs: which mesh axis splits which dimension of a layer.

A `Config` sends every mesh axis to one dimension of the layer or to none (the layer is then
replicated over that axis). It is the paper's parallelization configuration c_i, with a degree for
each parallelizable dimension, and at the same time a PartitionSpec for each of the layer's tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

DIMENSIONS = ("sample", "depth", "height", "width", "length", "channel", "reduction")
"""Names of the parallelizable dimensions, in the order in which configs assign mesh axes."""

Layout = tuple[tuple[str, ...], ...]
"""For each dimension of an array, the mesh axes that split it, major to minor."""


def dimension_order(name: str) -> tuple[int, str]:
    """Sort key of a dimension name: the known names first, in the order of `DIMENSIONS`."""
    known = DIMENSIONS.index(name) if name in DIMENSIONS else len(DIMENSIONS)
    return known, name


@dataclass(frozen=True)
class Config:
    """A parallelization configuration: for each split dimension, the mesh axes that split it.

    Attributes:
      splits: pairs (dimension name, mesh axes major to minor), sorted by dimension; dimensions
        that are not split do not appear.
    """

    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        """Check the form.

        Raises:
          ValueError: a dimension or a mesh axis appears twice, or a split has no axis.
        """
        dimensions = [dimension for dimension, _ in self.splits]
        axes = [axis for _, split in self.splits for axis in split]
        if len(set(dimensions)) != len(dimensions) or len(set(axes)) != len(axes):
            raise ValueError(
                f"Config: {self.splits!r} names a dimension or a mesh axis twice; a mesh axis "
                "splits one dimension: remove the duplicate"
            )
        if any(not split for _, split in self.splits):
            raise ValueError(
                f"Config: {self.splits!r} has a dimension without mesh axes; leave out "
                "dimensions that are not split"
            )
        ordered = tuple(sorted(self.splits, key=lambda item: dimension_order(item[0])))
        object.__setattr__(self, "splits", ordered)

    @classmethod
    def of(cls, splits: Mapping[str, Iterable[str]]) -> Config:
        """Config from a mapping dimension -> mesh axes; empty entries are left out."""
        pairs = ((name, tuple(axes)) for name, axes in splits.items())
        return cls(tuple((name, axes) for name, axes in pairs if axes))

    def axes(self, dimension: str | None) -> tuple[str, ...]:
        """Mesh axes that split `dimension`, major to minor; () if it is not split."""
        for name, axes in self.splits:
            if name == dimension:
                return axes
        return ()

    @property
    def used_axes(self) -> frozenset[str]:
        """All mesh axes over which the layer is split."""
        return frozenset(axis for _, axes in self.splits for axis in axes)

    def splitting(self, axis_sizes: Mapping[str, int]) -> Config:
        """The config without mesh axes of size 1, which split nothing."""
        return Config.of({n: [a for a in axes if axis_sizes[a] > 1] for n, axes in self.splits})

    def layout(self, labels: Sequence[str | None]) -> Layout:
        """Layout of an array whose dimensions carry the given dimension names."""
        return tuple(self.axes(label) for label in labels)

    def within(
        self,
        sizes: Mapping[str, tuple[int, ...]],
        even: Mapping[str, int],
        axis_sizes: Mapping[str, int],
    ) -> Config:
        """The config without the splits that a layer of other sizes does not allow.

        Args:
          sizes: for each dimension all sizes that it has in the layer; others cannot be split.
          even: dimension -> a size that its degree must divide.
          axis_sizes: devices along each mesh axis.
        """
        splits = {}
        for name, axes in self.splits:
            while axes and not _allowed(name, axes, sizes, even, axis_sizes):
                axes = axes[:-1]
            splits[name] = axes
        return Config.of(splits)

    def describe(self, axis_sizes: Mapping[str, int]) -> str:
        """Short text such as "sample=4 channel=2"; "replicated" where nothing is split."""
        parts = [f"{name}={math.prod(axis_sizes[a] for a in axes)}" for name, axes in self.splits]
        return " ".join(parts) or "replicated"


def _assign(
    degrees: Sequence[Sequence[int]], groups: Sequence[Sequence[str]], dimensions: int
) -> list[list[str]]:
    """Mesh axes per dimension: each group's axes are handed out in order, by count."""
    result: list[list[str]] = [[] for _ in range(dimensions)]
    for counts, group in zip(degrees, groups, strict=True):
        start = 0
        for index, count in enumerate(counts):
            result[index].extend(group[start : start + count])
            start += count
    return result


def _counts(length: int, total: int) -> list[tuple[int, ...]]:
    """All tuples of `length` counts whose sum is at most `total`, largest first entries first."""
    every = itertools.product(range(total, -1, -1), repeat=length)
    return [counts for counts in every if sum(counts) <= total]


def _allowed(
    dimension: str,
    axes: Sequence[str],
    sizes: Mapping[str, tuple[int, ...]],
    even: Mapping[str, int],
    axis_sizes: Mapping[str, int],
) -> bool:
    """Whether the mesh axes may split the dimension."""
    degree = math.prod(axis_sizes[a] for a in axes)
    if degree == 1:
        return True
    fits = all(degree <= size for size in sizes.get(dimension, (1,)))
    return fits and even.get(dimension, 0) % degree == 0


def enumerate_configs(
    *,
    sizes: Mapping[str, tuple[int, ...]],
    even: Mapping[str, int] | None = None,
    axis_groups: Sequence[Sequence[str]],
    axis_sizes: Mapping[str, int],
    interchangeable: bool = True,
) -> tuple[Config, ...]:
    """All configs of a layer.

    Axes of one group (same link level, same size) are interchangeable: only the number of axes
    that each dimension gets is enumerated, and axes are handed out in the order of `DIMENSIONS`,
    which keeps the layouts of neighbouring layers aligned.

    Args:
      sizes: for each parallelizable dimension, all sizes it has in the layer's tensors (a
        convolution's height has two); a degree may exceed none of them.
      even: dimension -> a size that its degree must divide.
      axis_groups: mesh axes in groups that are interchangeable, slowest link level first.
      axis_sizes: devices along each mesh axis.
      interchangeable: False enumerates every assignment of axes (the full space).

    Returns:
      Configs, the ones that use most devices first; the replicated config is always present.
    """
    names = sorted(sizes, key=dimension_order)
    groups = [tuple(g) for g in axis_groups]
    if not interchangeable:
        groups = [(axis,) for group in groups for axis in group]
    configs = []
    for counts in itertools.product(*(_counts(len(names), len(group)) for group in groups)):
        per_dimension = _assign(counts, groups, len(names))
        if all(
            _allowed(name, axes, sizes, even or {}, axis_sizes)
            for name, axes in zip(names, per_dimension, strict=True)
        ):
            configs.append(Config.of(dict(zip(names, per_dimension, strict=True))))
    return tuple(configs)
