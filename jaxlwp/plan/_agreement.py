"""Several processes that make one plan are given the same, and end with the same plan.

What they were given is compared after each has traced the function, before any of them measures or
runs anything with the others. A process that cannot even trace tells the others, which then end
with an error, too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from jaxlwp._version import __version__
from jaxlwp.devices import DeviceGraph, check_same, check_short, spans_processes
from jaxlwp.graph import ComputationGraph
from jaxlwp.measure import Profile
from jaxlwp.mesh import AnyMesh
from jaxlwp.program import program_lines, text_of
from jaxlwp.space import Strategy

_WHERE = "parallelize"
_SAME = "give all processes the same function, shapes and options (load files that are the same)"
_OUTCOMES = "outcomes"


def shared(mesh: AnyMesh) -> Mesh | None:
    """The mesh, if its devices belong to several processes."""
    return mesh if isinstance(mesh, Mesh) and spans_processes(mesh) else None


def check_versions(mesh: Mesh) -> None:
    """Check that all processes run the same jaxlwp, JAX and jaxlib.

    Raises:
      ValueError: they do not, in every process.
    """
    names = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    text = ", ".join(f"{name} {v}" for name, v in {"jaxlwp": __version__, **names}.items())
    check_short(_WHERE, "versions", text, mesh, "install the same versions for all processes")


@contextlib.contextmanager
def agreeing(mesh: Mesh | None) -> Iterator[dict[str, list[str]]]:
    """Context in which a process finds out what it was given, without the others.

    Args:
      mesh: whose processes take part; None for one process alone, for which nothing is compared.

    Yields:
      What is to be compared when the context ends, to be filled: name of a part -> lines.

    Raises:
      ValueError: a part differs between processes, or another process failed, in every process that
        has not failed itself.
    """
    parts: dict[str, list[str]] = {_OUTCOMES: ["traced"]}
    try:
        yield parts
    except Exception as error:
        if mesh is not None:
            # What the others make of it is theirs: this process has an error of its own.
            with contextlib.suppress(ValueError):
                text = " ".join(f"{type(error).__name__}: {error}".split())
                check_same(_WHERE, {_OUTCOMES: [text]}, mesh, _SAME)
        raise
    if mesh is not None:
        check_same(_WHERE, parts, mesh, _SAME)


def given_parts(
    mesh: Mesh,
    graph: ComputationGraph,
    rated: DeviceGraph | None,
    profile: Profile | None,
    options: dict[str, Any],
) -> dict[str, list[str]]:
    """What a plan is made from, as lines to be compared.

    Args:
      mesh: the mesh.
      graph: the traced function.
      rated: the rates given; None if they are to be measured.
      profile: the profile given, if any.
      options: of the search, by name.
    """
    values = [graph.program.values[index] for index in graph.program.inputs]
    devices = [device.id for device in mesh.devices.flat]
    axes = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return {
        "meshes": [f"{name}={size} {kind}" for (name, size), kind in axes] + [f"devices {devices}"],
        "arguments": [
            f"{name}: {value.dtype}{list(value.shape)}"
            for name, value in zip(graph.argument_names, values, strict=True)
        ],
        "options": [f"{name}={_option_text(value)}" for name, value in options.items()],
        "rates": ["measured"] if rated is None else _json_lines(rated.to_json()),
        "profiles": [] if profile is None else _profile_lines(profile),
        "traced functions": [
            *(f"layer {layer.name}: {layer.kind} {layer.dimensions}" for layer in graph.layers),
            *program_lines(graph.program),
        ],
    }


def check_strategy(mesh: Mesh, strategy: Strategy) -> None:
    """Check that all processes ended with one strategy.

    Raises:
      ValueError: they did not, in every process.
    """
    check_same(
        _WHERE,
        {"strategies found": _strategy_lines(strategy)},
        mesh,
        "save the strategy of one process (plan.strategy.save), and give it to all "
        "(strategy=jaxlwp.Strategy.load(...))",
    )


def _strategy_lines(strategy: Strategy) -> list[str]:
    configs = {name: dict(config.splits) for name, config in strategy.configs.items()}
    return _json_lines({"mesh": strategy.axis_sizes, "layer": configs})


def _option_text(value: Any) -> str:
    return text_of(value.to_json() if isinstance(value, Strategy) else value).replace("\n", " ")


def _json_lines(content: dict[str, Any]) -> list[str]:
    """A line for every entry, that of a mapping for each of its entries."""
    return [
        f"{name}: {json.dumps(value)}" if key is None else f"{name}, {key}: {json.dumps(value)}"
        for name, entry in content.items()
        for key, value in (entry.items() if isinstance(entry, dict) else ((None, entry),))
    ]


def _profile_lines(profile: Profile) -> list[str]:
    layers = sorted(profile.layers.items())
    return [str(profile.environment), *(f"{key}: {entry.seconds}" for key, entry in layers)]
