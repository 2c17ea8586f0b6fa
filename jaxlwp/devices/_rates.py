"""Meshes and their device graphs: rates by hand, of a system, kept on disk, or measured now."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlwp.devices._calibrate import FORMAT_VERSION, link_levels, measure, schedule
from jaxlwp.devices._device_graph import (
    DeviceGraph,
    MeshAxis,
    axis_shape,
)
from jaxlwp.devices._environment import Measurement, environment_of, now
from jaxlwp.devices._links import device_kind
from jaxlwp.devices._presets import system_for
from jaxlwp.devices._processes import from_first, spans_processes
from jaxlwp.devices._store import Store
from jaxlwp.devices._systems import System
from jaxlwp.mesh import (
    AnyMesh,
    auto_mesh,
    on_mesh,
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates given by hand, in place of a measurement.

    Attributes:
      flops_per_s: floating-point operations per second of one device.
      memory_bytes_per_s: bytes per second that one device reads and writes.
      latency_s: seconds of a small all-reduce over the devices of a link level, as NCCL's tests
        show it, per link level, slowest first; other collectives start alike.
      link_bytes_per_s: bytes per second that a device sends, all devices at once, per link level,
        slowest first; between hosts its share of the adapters.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    latency_s: tuple[float, ...] = (15e-6,)
    link_bytes_per_s: tuple[float, ...] = (1e11,)


GivenRates = Rates | System | str | os.PathLike[str]
"""Rates by hand; a system; what `preset` takes, for the hosts of a mesh."""


GivenDevices = Sequence[Any] | int | System | DeviceGraph | str | os.PathLike[str]
"""Devices or how many; or a system, what `preset` takes, or a device graph, of any that need not be
there."""


def choose_devices(devices: Sequence[Any] | int | None) -> Sequence[Any]:
    """The devices to use: all, the first so many, or the ones given.

    Raises:
      ValueError: none, more devices than exist, or what is no device.
    """
    if devices is None:
        return jax.devices()
    if isinstance(devices, (int, np.integer)):
        present = jax.devices()
        if devices < 1:
            raise ValueError(f"devices: {devices} asked for; give a number of at least 1")
        if devices > len(present):
            raise ValueError(
                f"devices: {devices} asked for, {len(present)} exist ({present[0].device_kind}); "
                "ask for fewer, or simulate with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
            )
        return present[:devices]
    listed = list(devices)
    if not listed or not all(hasattr(each, "device_kind") for each in listed):
        raise ValueError(
            f"devices: {listed!r:.80} given; give some of jax.devices(), or how many of them"
        )
    return listed


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh with axes of prime size, hosts first.

    Args:
      devices: of `jax.devices()`, or compile-only ones; of each host equally many.

    Returns:
      The mesh. Axes that count hosts are called "host0", "host1", ..., those inside one "device0",
      "device1", ...; 12 devices on one host are a mesh of 3 x 2 x 2.

    Raises:
      ValueError: hosts hold different numbers of devices.
    """
    hosts: dict[int, list[Any]] = {}
    for device in devices:
        hosts.setdefault(getattr(device, "process_index", 0), []).append(device)
    counts = {len(group) for group in hosts.values()}
    if len(counts) != 1:
        raise ValueError(
            f"devices: hosts hold {sorted(counts)} devices; a mesh needs the same number on each: "
            "pass devices=... with an equal share of every host"
        )
    levels = (counts.pop(),) if len(hosts) == 1 else (len(hosts), counts.pop())
    axes = axis_shape(levels)
    ordered = np.array([device for group in hosts.values() for device in group], dtype=object)
    shape = tuple(size for _, size, _ in axes) or (1,)
    names = tuple(name for name, _, _ in axes) or ("device0",)
    return auto_mesh(ordered.reshape(shape), names)


def device_graph(
    mesh: AnyMesh,
    *,
    rates: GivenRates | None = None,
    again: bool = False,
) -> DeviceGraph:
    """The device graph of a mesh, with rates given, cached, or measured now.

    Args:
      mesh: any mesh; its axes keep their names and order. One of axes alone needs rates.
      rates: rates by hand; a system, or what `preset` takes for the mesh's hosts: "h200",
        "dgx-a100", a TOML file; None measures (30 to 60 s) and caches. Several processes use what
        the first one has.
      again: measure even if there are cached rates: they were taken while the machine was busy.

    Raises:
      ValueError: a rate is not allowed, a system is unknown or has other devices than the mesh, no
        rates of devices that are not there.
    """
    if isinstance(rates, Rates):
        return _given(mesh, rates, link_levels(mesh))
    if rates is not None:
        return system_for(mesh, rates).device_graph(mesh)
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"rates: the {mesh.size} devices are not there to be measured; give their rates: a "
            "system such as 'dgx-h100', or jaxlwp.Rates"
        )
    key, environment = rates_key(mesh), environment_of(list(mesh.devices.flat))
    with Store() as store:
        cached = None if again else _cached(store.get(environment, KIND, key))
        together = spans_processes(mesh)
        if together:  # all measure, or none
            found = from_first(None if cached is None else cached.to_json(), mesh)
            cached = None if found is None else DeviceGraph.from_json(found)
        if cached is not None:
            return cached
        start = time.perf_counter()
        with on_mesh(mesh):
            measured = measure(mesh)
        taken_s = time.perf_counter() - start
        if together:
            measured = DeviceGraph.from_json(from_first(measured.to_json(), mesh))
        entry = Measurement(seconds=taken_s, date=now(), data=measured.to_json())
        store.put(environment, KIND, {key: entry})
    return measured


def _given(mesh: AnyMesh, rates: Rates, levels: dict[str, int]) -> DeviceGraph:
    def at(values: tuple[float, ...], level: int) -> float:
        return values[min(level, len(values) - 1)]

    return DeviceGraph(
        axes=tuple(
            MeshAxis(
                name=str(name),
                size=size,
                level=levels[name],
                latency_s=at(rates.latency_s, levels[name]),
                bytes_per_s=at(rates.link_bytes_per_s, levels[name]),
            )
            for name, size in mesh.shape.items()
        ),
        conv_flops_per_s=rates.flops_per_s,
        dense_flops_per_s=rates.flops_per_s,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        **schedule(mesh),
        device_kind=device_kind(mesh),
        source="given",
    )


KIND = "rates"
"""Kind under which measured rates are kept in a `Store`."""


def rates_key(mesh: AnyMesh) -> str:
    """Under which the rates of this kind of mesh are kept."""
    levels = link_levels(mesh)
    axes = [(str(name), size, levels[name]) for name, size in mesh.shape.items()]
    return f"format {FORMAT_VERSION}: {axes}"


def _cached(measurement: Measurement | None) -> DeviceGraph | None:
    if measurement is None:
        return None
    try:
        return DeviceGraph.from_json(measurement.data)
    except ValueError:  # another version of jaxlwp wrote it
        return None
