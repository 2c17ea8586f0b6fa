"""Rates of the devices at hand, by a short measurement; cached on disk.

All devices run at once, since simulated devices share cores and real ones share power and links.
Everything is measured inside compiled programs, as the median of several runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.devices._device_graph import (
    BUCKET_BYTES,
    EXPOSED_SHARE,
    DeviceGraph,
    LinkFit,
    MeshAxis,
)
from jaxlwp.devices._links import axis_levels, host_numbers
from jaxlwp.devices._processes import from_first, local_devices, spans_processes
from jaxlwp.mesh import (
    AnyMesh,
    all_gather,
    all_reduce,
    all_to_all,
    auto_mesh,
    permute,
    reduce_scatter,
    vary,
)
from jaxlwp.space import COLLECTIVES, wire_share

FORMAT_VERSION = 10
REPEATS = 5


def link_levels(mesh: AnyMesh) -> dict[str, int]:
    """Link level of each axis: 0 where moving along it changes the host, else 1."""
    return axis_levels(mesh.axis_names, host_numbers(mesh))


def schedule(mesh: AnyMesh) -> dict[str, Any]:
    """What XLA does with collectives on these devices: on processors, one after the other."""
    if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
        return {}
    return {"bucket_bytes": BUCKET_BYTES, "exposed_share": EXPOSED_SHARE}


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
    """Array with one block of `shape` per device, of the same random values on all."""
    spec = PartitionSpec(tuple(mesh.axis_names))
    full = (mesh.size * shape[0], *shape[1:])
    # One block for all: the whole array of many devices may be more than a host has memory for.
    block = np.random.default_rng(0).standard_normal(shape, np.float32)
    # device_put would compare the values across processes.
    return jax.make_array_from_callback(full, NamedSharding(mesh, spec), lambda _: block)


def _on_every_device(mesh: Mesh, body: Callable[..., Any], count: int) -> Any:
    spec = PartitionSpec(tuple(mesh.axis_names))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec,) * count, out_specs=spec))


def _conv_rate(mesh: Mesh) -> float:
    """Operations per second, forward and both backward 3x3 convolutions of 4 x 28 x 28 x 64."""
    x, w = _spread(mesh, (4, 28, 28, 64)), _spread(mesh, (3, 3, 64, 64))

    def step(x: jax.Array, w: jax.Array) -> Any:
        def conv(x: jax.Array, w: jax.Array) -> Any:
            return lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        y, vjp = jax.vjp(conv, x, w)
        return vjp(y)

    run = _on_every_device(mesh, step, 2)
    return 3 * 2 * 4 * 28 * 28 * 64 * 9 * 64 / median_s(lambda: run(x, w), 3 * REPEATS)


def _dense_rate(mesh: Mesh) -> float:
    """Operations per second, forward and both backward products, 32 x 1024 x 1024."""
    x, w = _spread(mesh, (32, 1024)), _spread(mesh, (1024, 1024))

    def step(x: jax.Array, w: jax.Array) -> Any:
        y, vjp = jax.vjp(jnp.dot, x, w)
        return vjp(y)

    run = _on_every_device(mesh, step, 2)
    return 3 * 2 * 32 * 1024 * 1024 / median_s(lambda: run(x, w))


def _memory_rate(mesh: Mesh) -> float:
    """Bytes per second read and written by elementwise passes over 16 MB per device, in place."""
    x = _spread(mesh, (1 << 22,))

    def body(copies: int) -> Callable[[jax.Array], jax.Array]:
        def passes(x: jax.Array) -> jax.Array:
            for _ in range(copies):
                x = x + 1e-30 * jnp.sum(x)  # the sum keeps the passes apart: three accesses each
            return x

        return passes

    return 3 * 4 * (1 << 22) / _in_place_s(mesh, body, x, (2, 6))


def _in_place_s(
    mesh: Mesh,
    body: Callable[[int], Callable[..., Any]],
    x: jax.Array,
    copies: tuple[int, int],
    repeats: int = REPEATS,
) -> float:
    """Seconds of one copy of an operation, unrolled inside a program that works in place."""
    spec = PartitionSpec(tuple(mesh.axis_names))
    programs = [
        jax.jit(
            jax.shard_map(body(count), mesh=mesh, in_specs=spec, out_specs=spec), donate_argnums=0
        )
        .lower(x)
        .compile()
        for count in copies
    ]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for taken, program in zip(times, programs, strict=True):
            start = time.perf_counter()
            x = jax.block_until_ready(program(x))
            taken.append(time.perf_counter() - start)
    few, many = (taken[1:] for taken in times)
    typical_s = statistics.median(b - a for a, b in zip(few, many, strict=True))
    if typical_s <= 0:  # noise hides the difference: the whole is an upper bound
        return min(many) / copies[1]
    return typical_s / (copies[1] - copies[0])


FIRST_TOUCH_BYTES = 1 << 25, 96 << 20
"""Bytes of temporaries from which on they are new memory in every step; bytes that show its rate.

The C library gets blocks larger than 32 MiB from the operating system every time and hands them
back after use, unless it happens to have up to twice as much in store: hence the second size.
Smaller ones it keeps.
"""


def _first_touch(mesh: Mesh) -> tuple[tuple[float, float], ...]:
    """(bytes, seconds per byte) of writing to new memory instead of memory in use."""
    least_bytes, num_bytes = FIRST_TOUCH_BYTES
    x = _spread(mesh, (num_bytes // 4,))
    in_place, anew = (
        jax.jit(lambda x: x * 1.5 + 1.0, donate_argnums=donated).lower(x).compile()
        for donated in ((0,), ())
    )
    extra = []
    for _ in range(2 * REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(anew(x))
        middle = time.perf_counter()
        x = jax.block_until_ready(in_place(x))
        extra.append(2 * middle - start - time.perf_counter())
    # At first a virtual machine gets from its host what it hands out: later steps do not wait.
    typical_s = statistics.median(extra[REPEATS // 2 :])
    return ((float(least_bytes), max(typical_s, 0.0) / num_bytes),)


def _step_overhead(mesh: Mesh) -> tuple[float, float]:
    """Seconds of a step that does next to nothing, and more for each array that it reads."""
    few, many = 8, 136

    def runner(count: int) -> Callable[[], Any]:
        arrays = [_spread(mesh, (8,)) for _ in range(count)]
        run = _on_every_device(mesh, lambda *xs: tuple(x + 1.0 for x in xs), count)
        return lambda: run(*arrays)

    runs = runner(few), runner(many)
    times = [[median_s(run, 1) for run in runs] for _ in range(2 * REPEATS)]
    few_s, many_s = (statistics.median(taken) for taken in zip(*times, strict=True))
    leaf_s = max(many_s - few_s, 0.0) / (many - few)
    return max(few_s - few * leaf_s, 0.0), leaf_s


def _input_rate(mesh: Mesh) -> float:
    """Seconds for each byte that a device receives of a batch of 4 MB per device."""
    local = auto_mesh(local_devices(mesh), ("device",))
    values = np.ones((local.size << 20,), np.float32)
    sharding = NamedSharding(local, PartitionSpec("device"))
    return median_s(lambda: jax.device_put(values, sharding)) / (4 << 20)


LINK_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
"""Bytes of a device's operand in the sweep of collectives, about."""

SLOW_S, LONGEST_S = 0.1, 1.0
"""Seconds of a collective that is run fewer times, and of one that is not run: where links are so
slow, their noise is small, and smaller operands show their rate."""

CHANNELS = 64
"""Size of the operand's last dimension, or the next multiple of the devices.

That is the one that is gathered and scattered, as channels are and, but for their longer rows,
height and width: what is sent must be put together before and taken apart after.
"""


def _collective(kind: str, axes: tuple[str, ...], parts: int) -> Callable[..., Any]:
    """One collective and the least work that makes its result the next one's operand."""

    def run(x: Any) -> Any:
        if kind == "all-reduce":
            return vary(all_reduce(x, axes), axes) * 0.5
        if kind == "all-gather":
            every = all_gather(x, axes, 1, varying=True)
            return every[:, : x.shape[1]] + every[:, -x.shape[1] :]
        if kind == "reduce-scatter":
            mine = reduce_scatter(x, axes, 1)
            return jnp.tile(mine, (1, parts))
        if kind == "all-to-all":
            return all_to_all(x, axes, split_dim=1, concat_dim=0).reshape(x.shape)
        return permute(x, axes, [(i, (i + 1) % parts) for i in range(parts)])

    return run


def _link_fits(mesh: Mesh, levels: dict[str, int]) -> tuple[LinkFit, ...]:
    """Every kind of collective over every set of axes that differs in more than names."""
    unmeasured = [
        MeshAxis(name=str(n), size=s, level=levels[n], latency_s=0.0, bytes_per_s=1.0)
        for n, s in mesh.shape.items()
        if s > 1
    ]
    if not unmeasured:
        return ()
    groups = DeviceGraph(
        axes=tuple(unmeasured), conv_flops_per_s=1.0, dense_flops_per_s=1.0, memory_bytes_per_s=1.0
    ).axis_groups
    fits = []
    for counts in itertools.product(*(range(len(group) + 1) for group in groups)):
        axes = tuple(n for group, c in zip(groups, counts, strict=True) for n in group[:c])
        if axes:
            fits += [_link_fit(mesh, kind, axes, counts) for kind in COLLECTIVES]
    return tuple(fits)


def _link_fit(mesh: Mesh, kind: str, axes: tuple[str, ...], counts: tuple[int, ...]) -> LinkFit:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    one = _collective(kind, axes, parts)

    def body(copies: int) -> Callable[..., Any]:
        def chain(x: jax.Array) -> jax.Array:
            for _ in range(copies):
                x = one(x)
            return x

        return chain

    sizes: list[int] = []
    seconds: list[float] = []
    columns = -(-CHANNELS // parts) * parts
    for num_bytes in LINK_BYTES:
        rows = -(-num_bytes // (4 * columns))
        copies, repeats = ((2, 10) if num_bytes <= 1 << 16 else (1, 4)), 2 * REPEATS
        expected_s = seconds[-1] * num_bytes / sizes[-1] if len(sizes) > 1 else 0.0
        if expected_s > LONGEST_S:
            break
        if expected_s > SLOW_S:
            copies, repeats = (1, 2), 2
        x = _spread(mesh, (rows, columns))
        sizes.append(4 * rows * columns)
        taken_s = _in_place_s(mesh, body, x, copies, repeats)
        seconds.append(from_first(taken_s, mesh) if spans_processes(mesh) else taken_s)
    return fit_link(kind, counts, sizes, seconds)


WAIT_SHAPES = ((1, 14, 14, 64), (1, 28, 28, 64), (2, 28, 28, 64), (4, 28, 28, 64), (8, 28, 28, 64))
"""Operands of the pieces of work behind which devices meet: fractions of a millisecond to some tens
on a core that several devices share."""


def _wait(mesh: Mesh, fits: Sequence[LinkFit]) -> tuple[float, float]:
    """Seconds that an all-reduce of next to nothing adds to work beyond its latency: `fit_wait`.

    A device that is done with its piece waits for the others. Where simulated devices share cores,
    and take turns on them, that is much longer than the exchange itself. It grows with the work,
    but hardly beyond the time that the operating system leaves a core to one of them.
    """
    sums = [fit for fit in fits if fit.kind == "all-reduce"]
    if not sums:
        return 0.0, 0.0
    latency_s = max(sums, key=lambda fit: sum(fit.axes_per_group)).latency_s
    axes, copies = tuple(mesh.axis_names), 6
    w = _spread(mesh, (3, 3, 64, 64))
    spec = PartitionSpec(axes)

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        window = (1, 2, 2, 1)
        pooled: jax.Array = lax.reduce_window(y, -jnp.inf, lax.max, window, (1, 1, 1, 1), "SAME")
        return 0.1 * pooled

    def program(x: jax.Array, meets: bool) -> Any:
        def chain(x: jax.Array, w: jax.Array) -> jax.Array:
            for _ in range(copies):
                x = layer(x, w)
                part = x[:1, :1]
                if meets:
                    part = vary(all_reduce(part, axes), axes)
                x = x + 1e-6 * part
            return x

        mapped = jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.jit(mapped).lower(x, w).compile()

    operands = [_spread(mesh, shape) for shape in WAIT_SHAPES]
    programs = [(x, program(x, False), program(x, True)) for x in operands]
    taken = np.empty((4 * REPEATS + 1, len(programs), 2))
    for times in taken:
        for pair, (x, *runs) in zip(times, programs, strict=True):
            for n, run in enumerate(runs):
                start = time.perf_counter()
                jax.block_until_ready(run(x, w))
                pair[n] = (time.perf_counter() - start) / copies
    alone, together = np.moveaxis(taken[1:], -1, 0)
    waits_s = np.median(together - alone, axis=0) - latency_s
    return fit_wait(np.median(alone, axis=0), waits_s)


def fit_wait(work_s: np.ndarray, waits_s: np.ndarray) -> tuple[float, float]:
    """The curve `wait * work / (work + half)` of least squared distance through what was measured.

    Args:
      work_s: seconds of the pieces of work.
      waits_s: seconds waited behind each.

    Returns:
      `wait` and `half`, seconds, neither negative.
    """
    best = (math.inf, 0.0, 0.0)
    # Half of the wait is within what was measured: no more than twice the longest is made up.
    for half_s in np.geomspace(0.1 * work_s.min(), work_s.max(), 100):
        share = work_s / (work_s + half_s)
        wait_s = max(float(share @ waits_s / (share @ share)), 0.0)
        error = float(np.sum((wait_s * share - waits_s) ** 2))
        best = min(best, (error, wait_s, float(half_s)))
    return best[1:]


def fit_link(
    kind: str, axes_per_group: tuple[int, ...], sizes: Sequence[float], seconds: Sequence[float]
) -> LinkFit:
    """The line of least relative squared distance through the sweep, with positive terms.

    Args:
      kind: as in `Collective`.
      axes_per_group: see `LinkFit`.
      sizes: bytes of a device's operand.
      seconds: measured.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    weighted = np.stack([1 / y, x / y], axis=1)
    latency_s, byte_s = np.linalg.lstsq(weighted, np.ones(len(y)), rcond=None)[0]
    if latency_s < 0:
        latency_s, byte_s = 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))
    if byte_s < 0:
        latency_s, byte_s = float(np.sum(1 / y) / np.sum(1 / y**2)), 0.0
    residual = float(np.median(np.abs(latency_s + byte_s * x - y) / y))
    return LinkFit(
        kind=kind,
        axes_per_group=axes_per_group,
        latency_s=float(latency_s),
        byte_s=float(byte_s),
        residual=residual,
    )


def _ring(fits: Sequence[LinkFit], number: int, parts: int) -> tuple[float, float]:
    """Seconds of a small all-reduce and bytes per second along one axis."""
    for fit in fits:
        if fit.kind == "all-reduce" and sum(fit.axes_per_group) == fit.axes_per_group[number] == 1:
            byte_s = max(fit.byte_s, 1e-12)  # noise may hide that bytes take time at all
            return fit.latency_s, wire_share("all-reduce", parts) / byte_s
    return 0.0, 1e12


# A plan may be made while a training step is traced: without this, nothing would run.
@jax.ensure_compile_time_eval()
def measure(mesh: Mesh) -> DeviceGraph:
    """Measure the rates of a mesh's devices and links now, all devices at once.

    Takes 30 to 60 seconds, some minutes over slow links.
    Axes of one level and size are measured once.
    """
    levels = link_levels(mesh)
    fits = _link_fits(mesh, levels)
    kinds = sorted({(levels[n], -s) for n, s in mesh.shape.items() if s > 1})
    axes = []
    for name, size in mesh.shape.items():
        latency_s, bytes_per_s = 0.0, 1e12
        if size > 1:
            latency_s, bytes_per_s = _ring(fits, kinds.index((levels[name], -size)), size)
        axes.append(
            MeshAxis(
                name=str(name),
                size=size,
                level=levels[name],
                latency_s=latency_s,
                bytes_per_s=bytes_per_s,
            )
        )
    memory_bytes_per_s = _memory_rate(mesh)
    step_s, leaf_s = _step_overhead(mesh)
    wait_s, wait_work_s = _wait(mesh, fits)
    return DeviceGraph(
        axes=tuple(axes),
        conv_flops_per_s=_conv_rate(mesh),
        dense_flops_per_s=_dense_rate(mesh),
        memory_bytes_per_s=memory_bytes_per_s,
        links=fits,
        first_touch_byte_s=_first_touch(mesh),
        update_pass_byte_s=1 / memory_bytes_per_s,
        wait_s=wait_s,
        wait_work_s=wait_work_s,
        step_s=step_s,
        leaf_s=leaf_s,
        input_byte_s=_input_rate(mesh),
        **schedule(mesh),
        device_kind=mesh.devices.flat[0].device_kind,
        source="measured",
    )
