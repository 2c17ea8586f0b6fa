"""The file of a saved problem: a zip archive of one JSON text and numpy arrays, and no code.

`problem.json` says what there is: layers, configs, edges, parameters, rates. Beside it is an array
for each kind of cost, of all layers (or edges) one after the other. The digest in the JSON is of
all of it, so that a damaged file is told from a whole one before any figure is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlwp._version import __version__
from jaxlwp.cost._tables import MovedTables
from jaxlwp.devices import DeviceGraph
from jaxlwp.files import Read, check_format, read_json
from jaxlwp.graph import LayerOutline, Outline, Parameter
from jaxlwp.memory import MemoryCosts, MemoryTables
from jaxlwp.solver import CostTables
from jaxlwp.space import Config, Constraints, Split, made_here, read_config

if TYPE_CHECKING:
    from jaxlwp.cost._problem import Problem

FORMAT, VERSION = "jaxlwp problem", 1
_TEXT = "problem.json"

Arrays = dict[str, NDArray[Any]]

_COSTS = ("compute_s", "exchange_s", "overhead_s", "sync_s")
"""Of every layer under every config, beside those that only some problems have."""
_BYTES = ("parameter_bytes", "gradient_bytes", "kept_bytes", "temporary_bytes")
_DTYPES = {"measured": np.dtype(bool), "copied_bytes": np.dtype(np.int64)} | {
    name: np.dtype(np.int64) for name in _BYTES
}
"""Of arrays; all others are float64."""
_OF_EDGES = ("transfer_s", "copied_bytes", "moved_edge_bytes")


# --- writing ---------------------------------------------------------------------------------


def problem_bytes(problem: Problem) -> bytes:
    """A problem as the content of a file."""
    texts = {f"{name}.npy": _npy(array) for name, array in _arrays(problem).items()}
    content = _content(problem)
    content["digest"] = _digest(content, texts)
    texts[_TEXT] = json.dumps(content, allow_nan=False).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (_TEXT, *sorted(texts.keys() - {_TEXT})):  # without a date: the same bytes
            archive.writestr(zipfile.ZipInfo(name), texts[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _digest(content: Mapping[str, Any], texts: Mapping[str, bytes]) -> str:
    """Of the JSON without its digest, and of every array."""
    told = {name: value for name, value in content.items() if name != "digest"}
    total = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(texts):
        total.update(f"\n{name} {hashlib.sha256(texts[name]).hexdigest()}".encode())
    return total.hexdigest()


def _arrays(problem: Problem) -> Arrays:
    tables, memory, moved = problem.tables, problem.memory_tables(), problem.moved_tables()
    parts: dict[str, Sequence[NDArray[Any]]] = {name: getattr(tables, name) for name in _COSTS}
    parts |= {name: [getattr(cost, name) for cost in memory.layers] for name in _BYTES}
    parts |= {
        "moved_bytes": moved.layers,
        "transfer_s": tables.transfer_s,
        "copied_bytes": memory.copied_bytes,
        "moved_edge_bytes": moved.edges,
    }
    if problem.measured:
        parts |= {"measured": problem.measured, "analytic_s": problem.analytic_s}
    return {
        name: np.concatenate([np.ravel(a) for a in arrays] or [np.zeros(0)]).astype(_dtype(name))
        for name, arrays in parts.items()
    }


def _dtype(name: str) -> np.dtype[Any]:
    return _DTYPES.get(name, np.dtype(np.float64))


def _content(problem: Problem) -> dict[str, Any]:
    configs = {config: n for n, config in enumerate(dict.fromkeys(sum(problem.configs, ())))}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_here(),
        "model_digest": problem.graph.digest,
        "devices": problem.devices.to_json(),
        "configs": [dict(config.splits) for config in configs],
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "dimensions": layer.dimensions,
                "even": layer.even,
                "has_rule": layer.has_rule,
                "configs": [configs[config] for config in known],
            }
            for layer, known in zip(problem.graph.layers, problem.configs, strict=True)
        ],
        "parameters": [vars(parameter) for parameter in problem.graph.parameters],
        "edges": problem.tables.edges,
        "step_s": problem.tables.step_s,
        "measured": bool(problem.measured),
        "constraints": _constraints_data(problem.constraints),
        "whole": problem.whole,
        "floor_s": problem.floor_s,
    }


def _constraints_data(constraints: Constraints | None) -> dict[str, Any] | None:
    if constraints is None:
        return None
    return {
        "pin": {pattern: _split_data(split) for pattern, split in constraints.pin.items()},
        "forbid": {pattern: list(names) for pattern, names in constraints.forbidden() if names},
        "replicated": list(constraints.replicated),
        "stored": {pattern: list(map(list, axes)) for pattern, axes in constraints.stored.items()},
    }


def _split_data(split: Split) -> dict[str, Any]:
    """For each dimension its degree, or its mesh axes."""
    given = dict(split.splits) if isinstance(split, Config) else split
    return {
        name: value if isinstance(value, int) else [value] if isinstance(value, str) else [*value]
        for name, value in given.items()
    }


# --- reading ---------------------------------------------------------------------------------

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
    *(EOFError, KeyError, IndexError, TypeError, SyntaxError, ValueError, OverflowError),
    *(OSError, RuntimeError, MemoryError),  # of encrypted and of unknown ways to compress
)
"""What zipfile and numpy say of files that are damaged, or no zip archives of arrays."""


def problem_contents(data: bytes) -> dict[str, Any]:
    """The fields of a `SavedProblem` from the content of a file.

    Raises:
      ValueError: it is no saved problem, damaged, or of a newer version.
    """
    texts = _texts(data)
    if _TEXT not in texts:
        raise ValueError(f"it has no {_TEXT}")
    content = read_json(texts.pop(_TEXT))
    check_format(content, FORMAT, VERSION, __version__)
    if content.get("digest").value != _digest(content.value, texts):
        raise ValueError("it is damaged: its content is not that of its digest")
    devices = _devices(content.get("devices"))
    layers, configs = _layers(content, devices)
    edges = tuple(_edge(edge, len(layers)) for edge in content.get("edges").each())
    arrays = _read_arrays(texts, [len(known) for known in configs], edges)
    if measured := content.get("measured").flag():
        _check_there(arrays, ("measured", "analytic_s"))
    return {
        "graph": Outline(
            layers=layers,
            parameters=tuple(
                _parameter(told, len(layers)) for told in content.get("parameters").each()
            ),
            digest=content.get("model_digest").text(),
        ),
        "devices": devices,
        "configs": configs,
        **_tables(content, layers, edges, arrays),
        "measured": arrays["measured"] if measured else (),
        "analytic_s": arrays["analytic_s"] if measured else (),
        "constraints": _constraints(content.find("constraints")),
        "whole": content.get("whole").flag(),
        "floor_s": content.get("floor_s").number(),
        "versions": {n: told.text() for n, told in content.get("made_by").entries().items()},
    }


def _texts(data: bytes) -> dict[str, bytes]:
    """The files of a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except _DAMAGE as error:
        raise ValueError(f"it is damaged, or no zip archive ({error})") from error


def _layers(
    content: Read, devices: DeviceGraph
) -> tuple[tuple[LayerOutline, ...], tuple[tuple[Config, ...], ...]]:
    known = [read_config(told, devices.axis_sizes) for told in content.get("configs").each()]
    layers, configs = [], []
    for index, told in enumerate(content.get("layers").each()):
        layers.append(
            LayerOutline(
                index=index,
                name=told.get("name").text(),
                kind=told.get("kind").text(),
                dimensions={
                    name: tuple(size.whole() for size in sizes.each())
                    for name, sizes in told.get("dimensions").entries().items()
                },
                even={name: size.whole() for name, size in told.get("even").entries().items()},
                has_rule=told.get("has_rule").flag(),
            )
        )
        numbers = told.get("configs").each()
        if not numbers:
            told.get("configs").refuse("a list of at least one config")
        configs.append(tuple(known[number.whole(most=len(known) - 1)] for number in numbers))
    if len({layer.name for layer in layers}) < len(layers):
        raise ValueError("two of its layers have one name")
    return tuple(layers), tuple(configs)


def _edge(told: Read, count: int) -> tuple[int, int]:
    ends = [end.whole(most=count - 1) for end in told.each()]
    if len(ends) != 2:
        told.refuse("a pair of layers")
    return ends[0], ends[1]


def _parameter(told: Read, count: int) -> Parameter:
    shape = tuple(size.whole() for size in told.get("shape").each())
    layer = told.find("layer")
    labels = tuple(None if e.value is None else e.text() for e in told.get("labels").each())
    if layer and len(labels) != len(shape):
        told.get("labels").refuse(f"a list of {len(shape)} names, one for each dimension")
    return Parameter(
        name=told.get("name").text(),
        shape=shape,
        layer=layer.whole(most=count - 1) if layer else None,
        labels=labels,
    )


def _constraints(told: Read | None) -> Constraints | None:
    if told is None:
        return None
    pins: dict[str, Split] = {
        pattern: {
            name: value.whole(least=1)
            if isinstance(value.value, int)
            else tuple(axis.text() for axis in value.each())
            for name, value in split.entries().items()
        }
        for pattern, split in told.get("pin").entries().items()
    }
    return Constraints(
        pin=pins,
        forbid={
            pattern: tuple(name.text() for name in names.each())
            for pattern, names in told.get("forbid").entries().items()
        },
        replicated=tuple(name.text() for name in told.get("replicated").each()),
        stored={
            pattern: tuple(tuple(axis.text() for axis in axes.each()) for axes in layout.each())
            for pattern, layout in told.get("stored").entries().items()
        },
    )


def _devices(told: Read) -> DeviceGraph:
    """The device graph, its fields of the types that they have."""
    for axis in told.get("axes").each():
        axis.get("name").text()
        axis.get("size").whole(least=1)
        axis.get("level").whole()
        axis.get("latency_s").number(), axis.get("bytes_per_s").number()
    for link in told.get("links").each():
        link.get("kind").text()
        [count.whole() for count in link.get("axes_per_group").each()]
        link.get("latency_s").number(), link.get("byte_s").number()
    for name, kinds in (
        ("first_touch_byte_s", (Read.number, Read.number)),
        ("dtype_flops_per_s", (Read.text, Read.number)),
    ):
        for pair in told.get(name).each():
            [kind(value) for kind, value in zip(kinds, pair.each(), strict=True)]
    for field in fields(DeviceGraph):
        if field.type == "float":
            told.get(field.name).number()
        elif field.type == "str":
            told.get(field.name).text()
    told.get("fuses").flag(), told.get("adapter_sharers").whole(least=1)
    return DeviceGraph.from_json(told.value)


# --- arrays ----------------------------------------------------------------------------------


def _read_arrays(
    texts: Mapping[str, bytes], counts: Sequence[int], edges: Sequence[tuple[int, int]]
) -> dict[str, tuple[NDArray[Any], ...]]:
    """Arrays of layers, shape (configs,), and of edges, shape (configs, configs), by name."""
    pairs = [(counts[i], counts[j]) for i, j in edges]
    result = {}
    for file, text in texts.items():
        name = file.removesuffix(".npy")
        shapes = pairs if name in _OF_EDGES else [(count,) for count in counts]
        sizes = [int(np.prod(shape)) for shape in shapes]
        flat = _read_array(name, text, sum(sizes))
        parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
        result[name] = tuple(p.reshape(shape) for p, shape in zip(parts, shapes, strict=True))
    _check_there(result, (*_COSTS, *_BYTES, "moved_bytes", *_OF_EDGES))
    return result


def _read_array(name: str, text: bytes, size: int) -> NDArray[Any]:
    try:
        array = np.lib.format.read_array(io.BytesIO(text), allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{name} is no array of numbers ({error})") from error
    if array.dtype != _dtype(name) or array.shape != (size,):
        raise ValueError(f"{name} must be {size} numbers of dtype {_dtype(name)}")
    if array.size and not array.min() >= 0:
        raise ValueError(f"{name} has a number that is negative or NaN")
    return array


def _check_there(arrays: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in arrays:
            raise ValueError(f"it lacks the array {name}")


def _tables(
    content: Read,
    layers: Sequence[LayerOutline],
    edges: tuple[tuple[int, int], ...],
    arrays: Mapping[str, tuple[NDArray[Any], ...]],
) -> dict[str, Any]:
    costs = zip(*(arrays[name] for name in _BYTES), strict=True)
    return {
        "tables": CostTables(
            **{name: arrays[name] for name in (*_COSTS, "transfer_s")},
            edges=edges,
            step_s=content.get("step_s").number(),
            names=tuple(layer.name for layer in layers),
        ),
        "memory": MemoryTables(
            layers=tuple(
                MemoryCosts(**dict(zip(_BYTES, cost, strict=True)), optimizer_bytes=cost[0])
                for cost in costs
            ),
            edges=edges,
            copied_bytes=arrays["copied_bytes"],
        ),
        "moved": MovedTables(arrays["moved_bytes"], arrays["moved_edge_bytes"]),
    }
