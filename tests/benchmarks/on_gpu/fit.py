"""Ceilings of a GPU from times of small programs, in the fields of `jaxlwp.devices.Gpu`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlwp.check import Forecast
from jaxlwp.devices import Gpu
from jaxlwp.devices._systems import TENSOR_DTYPES

LARGE_BYTES = 1 << 27
"""That an elementwise kernel moves, for caches to be no help."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One program that was timed, and what its kernels do.

    Attributes:
      name: what it is, for people.
      group: "start", "memory", "arithmetic".
      seconds: of the whole program.
      kernels: how many it has.
      num_bytes: that all of them move.
      copies: of these kernels, those that move data only: layouts.
      copy_bytes: that these move.
      flops: of convolutions and products.
      dtype: as the arithmetic units take it, as in "tensorfloat32"; "" without any.
      winograd: whether it is 3x3 convolutions of stride 1.
      forecast_s: by the preset; None where the program could not be read.
    """

    name: str
    group: str
    seconds: float
    kernels: int
    num_bytes: int
    copies: int = 0
    copy_bytes: int = 0
    flops: float = 0.0
    dtype: str = ""
    winograd: bool = False
    forecast_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """With the rates that it comes to."""
        rates = {
            "kernel_s": self.seconds / max(self.kernels, 1),
            "bytes_per_s": self.num_bytes / self.seconds,
            "flops_per_s": self.flops / self.seconds,
        }
        return dataclasses.asdict(self) | {k: float(f"{v:.4g}") for k, v in rates.items()}


def timed(name: str, group: str, seconds: float, made: Forecast, **others: Any) -> Timed:
    """What a program's forecast tells of it."""
    arithmetic = max(made.events, key=lambda event: event.flops)
    copies = made.kernels.get("copy")
    return Timed(
        name=name,
        group=group,
        seconds=seconds,
        kernels=made.num_kernels,
        num_bytes=made.num_bytes,
        copies=copies.count if copies and made.flops else 0,
        copy_bytes=copies.num_bytes if copies and made.flops else 0,
        flops=made.flops,
        dtype=arithmetic.dtype,
        forecast_s=made.total_s,
        **others,
    )


def fit(rows: Sequence[Timed], gpu: Gpu) -> dict[str, float]:
    """The fields of a GPU that what was timed comes to.

    Args:
      rows: programs that were timed.
      gpu: peaks, and figures for what no row tells.

    Returns:
      Of "kernel_s", "memory_share", "tensor_share", "vector_share" and "winograd" those that rows
      tell.
    """
    found: dict[str, float] = {}
    start = _kernel_s([row for row in rows if row.group == "start"])
    if start is not None:
        found["kernel_s"] = start
    kernel_s = found.get("kernel_s", gpu.kernel_s)
    rates = [
        row.num_bytes / max(row.seconds - row.kernels * kernel_s, 1e-9)
        for row in rows
        if row.group == "memory" and row.num_bytes >= LARGE_BYTES * row.kernels
    ]
    if rates:
        found["memory_share"] = statistics.median(rates) / gpu.peak_memory_bytes_per_s
    peaks = shares(rows, gpu, found)
    tensor = [share for dtype, each in peaks.items() if dtype[0] in TENSOR_DTYPES for share in each]
    vector = peaks.get(("float32", False))
    winograd = peaks.get(("float32", True))
    if tensor:
        found["tensor_share"] = statistics.median(tensor)
    if vector:
        found["vector_share"] = statistics.median(vector)
    if winograd:
        vector_share = found.get("vector_share", gpu.vector_share)
        found["winograd"] = statistics.median(winograd) / vector_share
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def shares(
    rows: Sequence[Timed], gpu: Gpu, found: Mapping[str, float]
) -> dict[tuple[str, bool], list[float]]:
    """Shares of the peak that arithmetic reaches, of programs that take their time for it.

    Args:
      rows: programs that were timed.
      gpu: peaks, and figures for what was not found.
      found: "kernel_s" and "memory_share", without which time is not of arithmetic.

    Returns:
      (dtype as the units take it, whether it is 3x3 convolutions of stride 1) -> shares.
    """
    kernel_s = found.get("kernel_s", gpu.kernel_s)
    memory = found.get("memory_share", gpu.memory_share) * gpu.peak_memory_bytes_per_s
    result: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        peak = gpu.peak_flops_per_s.get(row.dtype)
        if row.group != "arithmetic" or peak is None:
            continue
        moved_s = (row.num_bytes - row.copy_bytes) / memory
        took_s = row.seconds - row.kernels * kernel_s - row.copy_bytes / memory
        if took_s > 0.5 * row.seconds and row.flops / peak > moved_s:
            result.setdefault((row.dtype, row.winograd), []).append(row.flops / took_s / peak)
    return result


def _kernel_s(chains: Sequence[Timed]) -> float | None:
    """Seconds that one kernel more of a chain takes, by the least and the most kernels."""
    if len({row.kernels for row in chains}) < 2:
        return None
    first, last = (f(chains, key=lambda row: row.kernels) for f in (min, max))
    slope = (last.seconds - first.seconds) / (last.kernels - first.kernels)
    return slope if slope > 0 else None


def fitted_gpu(gpu: Gpu, found: Mapping[str, float]) -> Gpu:
    """The GPU with what was found in place of its own figures; shares above 1 are left at 1."""
    whole = {name: min(value, 1.0) for name, value in found.items() if name.endswith("_share")}
    return dataclasses.replace(gpu, **(dict(found) | whole))
