"""Rates of the devices at hand, by a short measurement; cached on disk.

All devices run at once, since simulated devices share cores and real ones share power and links.
Everything is measured inside compiled programs, as the median of several runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp._devices import DeviceGraph, MeshAxis, axis_shape

FORMAT_VERSION = 2
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates given by hand, in place of a measurement.

    Attributes:
      flops_per_s: floating-point operations per second of one device.
      memory_bytes_per_s: bytes per second that one device reads and writes.
      latency_s: seconds per step of a collective, per link level, slowest first.
      link_bytes_per_s: bytes per second that a device sends, per link level, slowest first.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    latency_s: tuple[float, ...] = (5e-6,)
    link_bytes_per_s: tuple[float, ...] = (1e11,)


def choose_devices(devices: Sequence[Any] | int | None) -> Sequence[Any]:
    """The devices to use: all, the first so many, or the ones given.

    Raises:
      ValueError: more devices than exist.
    """
    if devices is None:
        return jax.devices()
    if isinstance(devices, int):
        present = jax.devices()
        if not 1 <= devices <= len(present):
            raise ValueError(
                f"devices: {devices} asked for, {len(present)} exist ({present[0].device_kind}); "
                "ask for fewer, or simulate with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
            )
        return present[:devices]
    return devices


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh with axes of prime size, hosts first.

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
    return Mesh(ordered.reshape(shape), names)


def device_graph(mesh: Mesh, *, rates: Rates | None = None) -> DeviceGraph:
    """The device graph of a mesh, with rates given by hand, cached, or measured now.

    Args:
      mesh: any mesh; its axes keep their names and order.
      rates: rates by hand; None measures (under 20 s) and caches.

    Raises:
      ValueError: a rate is not allowed.
    """
    levels = _levels(mesh)
    if rates is not None:
        return _given(mesh, rates, levels)
    path = cache_path(mesh)
    cached = _read(path)
    if cached is not None:
        return cached
    measured = measure(mesh)
    _write(path, measured)
    return measured


def _levels(mesh: Mesh) -> dict[str, int]:
    """Link level of each axis: 0 where moving along it changes the host, else 1."""
    hosts = np.vectorize(lambda d: getattr(d, "process_index", 0))(mesh.devices)
    if len(set(hosts.reshape(-1))) == 1:
        return dict.fromkeys(mesh.axis_names, 0)
    return {
        name: int(np.all(hosts == np.take(hosts, [0], axis=i)))
        for i, name in enumerate(mesh.axis_names)
    }


def _given(mesh: Mesh, rates: Rates, levels: dict[str, int]) -> DeviceGraph:
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
        device_kind=mesh.devices.flat[0].device_kind,
        source="given",
    )


# --- measuring -----------------------------------------------------------------------------------


def median_s(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of a call, after one to warm up; waits for the results."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _spread(mesh: Mesh, shape: tuple[int, ...]) -> jax.Array:
    """Random array with one block of `shape` per device."""
    spec = PartitionSpec(tuple(mesh.axis_names))
    full = (mesh.size * shape[0], *shape[1:])
    values = np.random.default_rng(0).normal(size=full).astype(np.float32)
    placed: jax.Array = jax.device_put(values, NamedSharding(mesh, spec))
    return placed


def _on_every_device(mesh: Mesh, body: Callable[..., Any], count: int) -> Callable[..., Any]:
    spec = PartitionSpec(tuple(mesh.axis_names))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec,) * count, out_specs=spec))


def _conv_rate(mesh: Mesh) -> float:
    """Operations per second, forward and both backward convolutions, 3x3 on 28x28x64."""
    x, w = _spread(mesh, (4, 28, 28, 64)), _spread(mesh, (3, 3, 64, 64))

    def step(x: jax.Array, w: jax.Array) -> Any:
        def conv(x: jax.Array, w: jax.Array) -> Any:
            return lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        y, vjp = jax.vjp(conv, x, w)
        return vjp(y)

    run = _on_every_device(mesh, step, 2)
    seconds = median_s(lambda: run(x, w))
    return 3 * 2 * 4 * 28 * 28 * 64 * 9 * 64 / seconds


def _dense_rate(mesh: Mesh) -> float:
    """Operations per second, forward and both backward products, 32 x 1024 x 1024."""
    x, w = _spread(mesh, (32, 1024)), _spread(mesh, (1024, 1024))

    def step(x: jax.Array, w: jax.Array) -> Any:
        y, vjp = jax.vjp(jnp.dot, x, w)
        return vjp(y)

    run = _on_every_device(mesh, step, 2)
    return 3 * 2 * 32 * 1024 * 1024 / median_s(lambda: run(x, w))


def _memory_rate(mesh: Mesh) -> float:
    """Bytes per second read and written by an elementwise pass over 16 MB per device."""
    x = _spread(mesh, (1 << 22,))
    run = _on_every_device(mesh, lambda x: x * 1.5 + 1.0, 1)
    return 2 * 4 * (1 << 22) / median_s(lambda: run(x))


def _link(mesh: Mesh, axis: str) -> tuple[float, float]:
    """Latency per ring step and bytes per second of all-reduces along one axis."""

    def runner(elements: int, copies: int) -> Callable[[], Any]:
        x = _spread(mesh, (elements,))

        def body(x: jax.Array) -> jax.Array:
            for _ in range(copies):
                x = lax.pcast(lax.psum(x, axis), (axis,), to="varying") * 0.5
            return x

        run = _on_every_device(mesh, body, 1)
        return lambda: run(x)

    parts = mesh.shape[axis]
    small, large = 256, 1 << 20
    short_s = _each_s(runner(small, 1), runner(small, 9), 8)
    long_s = _each_s(runner(large, 1), runner(large, 4), 3)
    wire = 2 * (parts - 1) / parts * 4 * large
    return short_s / (2 * (parts - 1)), wire / max(long_s - short_s, 0.1 * long_s)


def _each_s(short: Callable[[], Any], long: Callable[[], Any], more: int) -> float:
    """Seconds of one of the `more` operations that `long` has beyond `short`.

    The difference leaves out the cost of the call. Runs take turns; where noise hides the
    difference, the whole of the longer run is an upper bound.
    """
    pairs = [(median_s(short, 1), median_s(long, 1)) for _ in range(REPEATS)]
    differences = [b - a for a, b in pairs]
    typical_s = statistics.median(differences)
    if typical_s <= 0:
        typical_s = min(b for _, b in pairs)
    return typical_s / more


# A plan may be made while a training step is traced: without this, nothing would run.
@jax.ensure_compile_time_eval()
def measure(mesh: Mesh) -> DeviceGraph:
    """Measure the rates of a mesh's devices and links now, all devices at once.

    Takes a few seconds. Axes of one level and size are measured once.
    """
    levels = _levels(mesh)
    links: dict[tuple[int, int], tuple[float, float]] = {}
    axes = []
    for name, size in mesh.shape.items():
        key = (levels[name], size)
        if key not in links:
            links[key] = _link(mesh, str(name)) if size > 1 else (0.0, 1e12)
        latency_s, bytes_per_s = links[key]
        axes.append(
            MeshAxis(
                name=str(name),
                size=size,
                level=levels[name],
                latency_s=latency_s,
                bytes_per_s=bytes_per_s,
            )
        )
    return DeviceGraph(
        axes=tuple(axes),
        conv_flops_per_s=_conv_rate(mesh),
        dense_flops_per_s=_dense_rate(mesh),
        memory_bytes_per_s=_memory_rate(mesh),
        device_kind=mesh.devices.flat[0].device_kind,
        source="measured",
    )


# --- the cache -----------------------------------------------------------------------------------


def cache_path(mesh: Mesh) -> Path:
    """Where the rates of this kind of mesh are kept; JAXLWP_CACHE_DIR overrides the folder."""
    folder = os.environ.get("JAXLWP_CACHE_DIR") or platformdirs.user_cache_dir("jaxlwp")
    kind = mesh.devices.flat[0].device_kind.replace(" ", "-").replace("/", "-")
    shape = "_".join(f"{name}{size}" for name, size in mesh.shape.items())
    name = f"rates-{kind}-{platform.node()}-{os.cpu_count()}-{shape}-jax{jax.__version__}.json"
    return Path(folder) / name


def _read(path: Path) -> DeviceGraph | None:
    """The cached device graph; a file that is not one is set aside."""
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError("another format version")
        return DeviceGraph.from_json(data["devices"])
    except (ValueError, KeyError, TypeError):
        path.replace(path.with_suffix(".unreadable"))
        return None


def _write(path: Path, devices: DeviceGraph) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    content = {"format_version": FORMAT_VERSION, "devices": devices.to_json()}
    partial.write_text(json.dumps(content, indent=2))
    partial.replace(path)
