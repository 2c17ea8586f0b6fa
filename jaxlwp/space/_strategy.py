"""Strategies: one config per layer, and what is known of where they are from; files of them."""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from jaxlwp._version import __version__
from jaxlwp.files import Read, check_format, read_json, read_text, write_file
from jaxlwp.graph import Outlined
from jaxlwp.mesh import is_first_process
from jaxlwp.space._config import Config

FORMAT, VERSION = "jaxlwp strategy", 2
"""Of files. Version 1, of `format_version` 1, had no more than name, fingerprint, mesh, configs."""


CAUSES = ("compute_s", "transfer_s", "sync_s", "overhead_s")
"""Of what a step takes; those of `Cost`."""


def made_here() -> dict[str, str]:
    """The versions at work, by name."""
    return {"jaxlwp": __version__, "jax": jax.__version__}


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where a strategy is from, and what it was predicted to take there.

    Attributes:
      digest: of the traced program (`ComputationGraph.digest`); empty if not known.
      versions: of jaxlwp and JAX that it was made by.
      predicted_s: predicted seconds of a step by cause ("compute_s", "transfer_s", "sync_s",
        "overhead_s"); empty if not known.
      memory_bytes: predicted bytes of each device at the worst moment; None if not known.
      rates: what the prices are of, such as "8 x NVIDIA H100, system dgx-h100".
    """

    digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    predicted_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    rates: str = ""

    @property
    def step_s(self) -> float | None:
        """Predicted seconds of a step; None if not known."""
        # As `Cost.total_s` adds: from Python 3.12 on, `sum` rounds otherwise.
        return (
            functools.reduce(operator.add, self.predicted_s.values()) if self.predicted_s else None
        )


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One config per layer (the paper's S), for one computation graph and mesh.

    Attributes:
      name: "search", "data", "model", "owt", "spatial", or the user's.
      configs: layer name -> config.
      axis_sizes: mesh axis name -> devices along it.
      fingerprint: of the computation graph it is for.
      record: where it is from; not part of what it is.
    """

    name: str
    configs: dict[str, Config]
    axis_sizes: dict[str, int]
    fingerprint: str
    record: Record = field(default=Record(), compare=False, repr=False)

    def for_graph(self, graph: Outlined) -> tuple[Config, ...]:
        """The configs in the order of the graph's layers, without mesh axes of size 1.

        Raises:
          ValueError: the strategy is for another model or other shapes.
        """
        names = [layer.name for layer in graph.layers]
        missing = [name for name in names if name not in self.configs]
        surplus = [name for name in self.configs if name not in names]
        if missing or surplus:
            raise ValueError(
                f"Strategy {self.name!r} is for another model: it lacks layers {missing[:3]} and "
                f"names unknown layers {surplus[:3]}; search again for this model"
            )
        if self.fingerprint != graph.fingerprint:
            raise ValueError(
                f"Strategy {self.name!r} is for fingerprint {self.fingerprint}, the traced "
                f"function has {graph.fingerprint}: same layer names, other shapes or kinds; "
                "search again for these shapes"
            )
        return tuple(self.configs[name].splitting(self.axis_sizes) for name in names)

    def unlike(self, graph: Outlined) -> str | None:
        """That the strategy is from another program, whose layers are the same, in one line."""
        digest = self.record.digest
        if not digest or not graph.digest or digest == graph.digest:
            return None
        made, here = self.record.versions.get("jax", "unknown"), jax.__version__
        return (
            f"Strategy {self.name!r} is from a program of digest {digest} (JAX {made}), the traced "
            f"function has {graph.digest} (JAX {here}): the layers are the same, so its configs "
            "are kept, but another strategy may be better; search again to find out"
        )

    def to_json(self) -> str:
        """As JSON text, by the schema `strategy_schema`."""
        return json.dumps(_data(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Strategy:
        """From what `to_json` wrote, of this or an older version of the format.

        Raises:
          ValueError: the text is not a strategy, or of a newer version.
        """
        return _read(text, "Strategy.from_json: the text")

    def save(self, path: str | Path) -> None:
        """Write as a JSON file, replacing it in one step; of several processes, the first does.

        Raises:
          OSError: it cannot be written there.
        """
        if is_first_process():
            write_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Strategy:
        """Read a file that `save` wrote.

        Raises:
          ValueError: the file is not a strategy, or of a newer version.
          OSError: the file cannot be read.
        """
        wanted = "one that `jaxlwp plan --save` or Strategy.save wrote"
        return _read(read_text(Path(path), wanted), str(path))


def make_strategy(
    name: str,
    graph: Outlined,
    configs: Sequence[Config],
    axis_sizes: Mapping[str, int],
) -> Strategy:
    """A strategy from configs in the order of the graph's layers."""
    by_name = {layer.name: c for layer, c in zip(graph.layers, configs, strict=True)}
    return Strategy(
        name=name,
        configs=by_name,
        axis_sizes=dict(axis_sizes),
        fingerprint=graph.fingerprint,
        record=Record(digest=graph.digest, versions=made_here()),
    )


@functools.cache
def strategy_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the files that `Strategy.save` writes."""
    file = resources.files("jaxlwp.space").joinpath("strategy.schema.json")
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema


# --- files -----------------------------------------------------------------------------------


def _data(strategy: Strategy) -> dict[str, Any]:
    record, step_s = strategy.record, strategy.record.step_s
    predicted: dict[str, Any] = {}
    if step_s is not None and math.isfinite(step_s):
        predicted = {"step_s": step_s, **record.predicted_s}
    if record.memory_bytes is not None:
        predicted["memory_bytes"] = record.memory_bytes
    if record.rates:
        predicted["rates"] = record.rates
    digest = {"digest": record.digest} if record.digest else {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": strategy.name,
        "model": {"fingerprint": strategy.fingerprint, **digest},
        "mesh": strategy.axis_sizes,
        "configs": {name: dict(config.splits) for name, config in strategy.configs.items()},
        **({"predicted": predicted} if predicted else {}),
        "made_by": dict(record.versions),
    }


def _read(text: str | bytes, place: str) -> Strategy:
    try:
        content = read_json(text)
        if content.find("format_version") is not None:
            return _version_1(content)
        check_format(content, FORMAT, VERSION, __version__)
        return _version_2(content)
    except ValueError as error:
        raise ValueError(
            f"{place} is not a strategy file: {error}; give one that `Strategy.save` or "
            "`jaxlwp plan --save` wrote"
        ) from error


def _version_1(content: Read) -> Strategy:
    if content.get("format_version").whole() != 1:
        content.get("format_version").refuse('1, beside no "format"')
    axis_sizes = _mesh(content.get("axis_sizes"))
    return Strategy(
        name=content.get("name").text(),
        configs=_configs(content.get("configs"), axis_sizes),
        axis_sizes=axis_sizes,
        fingerprint=content.get("fingerprint").text(),
    )


def _version_2(content: Read) -> Strategy:
    axis_sizes, model = _mesh(content.get("mesh")), content.get("model")
    digest = model.find("digest")
    record = Record(
        digest=digest.text() if digest else "",
        versions={name: entry.text() for name, entry in content.get("made_by").entries().items()},
    )
    return Strategy(
        name=content.get("name").text(),
        configs=_configs(content.get("configs"), axis_sizes),
        axis_sizes=axis_sizes,
        fingerprint=model.get("fingerprint").text(),
        record=_predicted(record, content.find("predicted")),
    )


def _predicted(record: Record, told: Read | None) -> Record:
    if told is None:
        return record
    memory, rates = told.find("memory_bytes"), told.find("rates")
    known = CAUSES if told.find("step_s") else ()
    return replace(
        record,
        predicted_s={cause: told.get(cause).number() for cause in known},
        memory_bytes=memory.whole() if memory else None,
        rates=rates.text() if rates else "",
    )


def _mesh(told: Read) -> dict[str, int]:
    return {axis: size.whole(least=1) for axis, size in told.entries().items()}


def _configs(told: Read, axis_sizes: Mapping[str, int]) -> dict[str, Config]:
    return {name: read_config(entry, axis_sizes) for name, entry in told.entries().items()}


def read_config(told: Read, axis_sizes: Mapping[str, int]) -> Config:
    """A config from a file: dimension -> mesh axes, major to minor.

    Raises:
      ValueError: it is none, or names an axis that the mesh lacks.
    """
    splits = {}
    for dimension, axes in told.entries().items():
        splits[dimension] = [axis.text() for axis in axes.each()]
        if not set(splits[dimension]).issubset(axis_sizes):
            axes.refuse(f"mesh axes, of which there are {', '.join(axis_sizes) or 'none'}")
    return Config.of(splits)
