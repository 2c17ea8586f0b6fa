"""Systems from files: those in `systems/`, with a source beside every figure, or one's own.

Both have the same fields. `rates="h200"` and the like come through `system_for`.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxlwp.devices._links import device_kind, host_numbers
from jaxlwp.devices._systems import Gpu, Level, System
from jaxlwp.devices._toml import Table, is_positive, read_toml
from jaxlwp.mesh import AnyMesh

SYSTEMS = (
    "dgx-1-p100",
    "dgx-1-v100",
    "dgx-2",
    "dgx-a100-40gb",
    "dgx-a100",
    "dgx-h100",
    "dgx-h200",
)
"""Systems that are known by name, oldest first."""

BOARDS = {"hgx-a100": "dgx-a100", "hgx-h100": "dgx-h100", "hgx-h200": "dgx-h200"}
"""The same boards in other makers' hosts, with an adapter for every GPU."""

NEWEST = {
    "p100": "dgx-1-p100",
    "v100": "dgx-2",
    "v100-16gb": "dgx-1-v100",
    "v100-32gb": "dgx-2",
    "a100": "dgx-a100",
    "a100-40gb": "dgx-a100-40gb",
    "a100-80gb": "dgx-a100",
    "h100": "dgx-h100",
    "h200": "dgx-h200",
}
"""The newest system of each GPU model, which the model's name stands for."""


def preset(name: str | os.PathLike[str], *, hosts: int = 1, gpus: int | None = None) -> System:
    """A system by name, with rates from published figures.

    Args:
      name: a system ("dgx-1-p100", "dgx-1-v100", "dgx-2", "dgx-a100", "dgx-h100", "dgx-h200"), a
        GPU ("p100", "v100", "a100", "h100", "h200") for its newest system, or the path of a TOML
        file; see `load_system`. Numbers may follow: "dgx-h100:4" and "cluster.toml:4" have four
        hosts, "h100:32" 32 GPUs on as many hosts as they fill, "h100:4x2" four hosts with two each.
      hosts: how many hosts.
      gpus: how many GPUs of each host are used; all by default.

    Raises:
      ValueError: an unknown name, a file with a wrong field, more GPUs than a host has, several
        hosts of a system that has no links between them, numbers in both ways.
    """
    found = _COUNTED.fullmatch(os.fspath(name))
    if found is None:
        return _part(_file(name), hosts, gpus)
    if (hosts, gpus) != (1, None):
        raise ValueError(
            f"system: {os.fspath(name)!r} says how many, and hosts or gpus are given beside it; "
            "give one of both"
        )
    if found["hosts"]:
        return _part(_file(found["name"]), int(found["hosts"]), int(found["count"]))
    if found["name"].lower() in NEWEST:
        return filled(found["name"], int(found["count"]))
    return _part(_file(found["name"]), int(found["count"]), None)


_COUNTED = re.compile(r"(?P<name>.+):(?:(?P<hosts>\d+)x)?(?P<count>\d+)", re.ASCII)
"""A system with numbers: of hosts or, for a GPU's name, of GPUs; or of both."""


def filled(name: str | os.PathLike[str], num_devices: int) -> System:
    """So many devices of a system, on as many hosts as they fill.

    Raises:
      ValueError: they fill no whole number of hosts.
    """
    one = preset(name)
    hosts = math.ceil(num_devices / one.inside.devices)
    if hosts < 1 or num_devices % hosts or (hosts > 1 and num_devices % one.inside.devices):
        raise ValueError(
            f"system: {one.name} has {one.inside.devices} GPUs in a host, which {num_devices} "
            "devices do not fill; use a multiple of them, or give the hosts: "
            f"jaxlwp.devices.preset({os.fspath(name)!r}, hosts=..., gpus=...)"
        )
    return preset(name, hosts=hosts, gpus=num_devices // hosts)


def load_system(path: str | os.PathLike[str], *, hosts: int = 1, gpus: int | None = None) -> System:
    """A system of one's own, from a TOML file.

    Its fields: `name`; `gpu`, the name of a known one, or a table with the attributes of `Gpu`,
    whose shares, `winograd` and `kernel_s` may be left out; `[inside]` with `devices`,
    `bytes_per_s` (a rate, or a table of rates by number of GPUs) and `start_s`; for several hosts
    `[across]` with `adapters` of a host, `adapter_bytes_per_s` of each, `start_s` for two hosts,
    and `doubling_s`, what twice the hosts take more (0 by default). Bytes per second and seconds
    are those that programs reach, as NCCL's tests show them.

    Args:
      path: the file.
      hosts: how many hosts.
      gpus: how many GPUs of each host are used; all by default.

    Raises:
      ValueError: the file cannot be read, a field is missing, wrong or unknown; else as `preset`.
    """
    return _part(read_toml(Path(path)), hosts, gpus)


def system_for(mesh: AnyMesh, rates: str | os.PathLike[str] | System) -> System:
    """The system of a mesh's devices.

    Args:
      mesh: the mesh.
      rates: a system, which is left as it is, or what `preset` takes. A name without numbers has
        the hosts of the mesh, or as many as its devices fill where the mesh names none, such as
        simulated devices.

    Raises:
      ValueError: as `preset`; a mesh whose devices fill no whole number of hosts.
    """
    if isinstance(rates, System):
        return rates
    if _COUNTED.fullmatch(os.fspath(rates)):
        return preset(rates)
    counts = np.unique(host_numbers(mesh), return_counts=True)[1]
    one = preset(rates)
    if len(counts) > 1:
        most = int(counts.max())
        if most > one.inside.devices:
            raise ValueError(
                f"rates: {one.name} has {one.inside.devices} GPUs in a host, the mesh {most}; use "
                "a mesh of more hosts with fewer devices each, or a system file of your own"
            )
        return preset(rates, hosts=len(counts), gpus=most)
    return filled(rates, mesh.size)


def system_of(mesh: AnyMesh) -> System:
    """The newest system that has the GPUs of a mesh.

    Raises:
      ValueError: no GPUs, or of a kind that is not known by name.
    """
    kind = device_kind(mesh)
    for name in sorted(NEWEST, key=len, reverse=True):
        if name.partition("-")[0] in kind.lower():
            return system_for(mesh, name.partition("-")[0])
    raise ValueError(
        f"rates: {kind} is none of the GPUs with published rates ({', '.join(NEWEST)}); give a "
        "system, as in rates=jaxlwp.devices.preset(name) or rates='system.toml'"
    )


def _file(name: str | os.PathLike[str]) -> Table:
    """The file that a name or a path stands for."""
    text = os.fspath(name)
    known = BOARDS.get(text.lower(), NEWEST.get(text.lower(), text.lower()))
    if known in SYSTEMS:
        return _packaged(known)
    if isinstance(name, os.PathLike) or text.endswith(".toml"):
        return read_toml(Path(text))
    raise ValueError(
        f"system: {text!r} is unknown; give one of {', '.join((*SYSTEMS, *BOARDS))}, a GPU of "
        f"{', '.join(NEWEST)}, or a TOML file"
    )


def _packaged(name: str) -> Table:
    folder = importlib.resources.files("jaxlwp.devices").joinpath("systems")
    with importlib.resources.as_file(folder.joinpath(f"{name}.toml")) as path:
        return read_toml(path)


def _part(table: Table, hosts: int, gpus: int | None) -> System:
    """So many hosts of a system, and so many GPUs of each."""
    name = table.text("name", "the system's name, as in 'cluster'")
    gpu = _gpu(table)
    inside = _inside(table.table("inside", "a table of the links inside a host"))
    across = None
    if table.has("across"):
        links = table.table("across", "a table of the adapters between hosts")
        across = _across(links, inside.devices, max(hosts, 1))
    table.done()
    used = inside.devices if gpus is None else gpus
    for what, number, most in (("hosts", hosts, math.inf), ("gpus", used, inside.devices)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            rule = f"1 to {most}" if most < math.inf else "at least 1"
            raise ValueError(f"{what}: {number!r} given for {name}; give a number of {rule}")
    if hosts > 1 and across is None:
        raise ValueError(
            f"hosts: {hosts} given for {name}, which has no [across]; give one host, or add the "
            "adapters to its file"
        )
    inside = replace(inside, devices=used)
    return System(name=name, gpu=gpu, inside=inside, across=across if hosts > 1 else None)


def _inside(table: Table) -> Level:
    devices = table.count("devices", "how many GPUs a host has")
    wanted = "the bytes per second that each GPU sends, or a table of them by number of GPUs"
    rates = table.value("bytes_per_s", wanted)
    if isinstance(rates, dict):
        good = rates and all(
            key.isdecimal() and 2 <= int(key) <= devices and is_positive(rate)
            for key, rate in rates.items()
        )
        if not good:
            raise table.wrong("bytes_per_s", f"rates for numbers of 2 to {devices} GPUs")
        rates = {int(key): float(rate) for key, rate in rates.items()}
    else:
        rates = table.number("bytes_per_s", wanted)
    start_s = table.number("start_s", "the seconds of a small all-reduce", zero=True)
    table.done()
    return Level(devices=devices, bytes_per_s=rates, start_s=start_s)


def _across(table: Table, gpus: int, hosts: int) -> Level:
    adapters = table.count("adapters", "how many adapters a host has")
    rate = table.number("adapter_bytes_per_s", "the bytes per second that an adapter sends")
    start_s = table.number("start_s", "the seconds of a small all-reduce of two hosts", zero=True)
    more_s = table.number(
        "doubling_s", "the seconds that twice the hosts take more", default=0.0, zero=True
    )
    table.done()
    # All GPUs of a host send at once: each has its share of the adapters.
    return Level(
        devices=hosts,
        bytes_per_s=rate * adapters / gpus,
        start_s=start_s + more_s * max(math.log2(hosts) - 1, 0.0),
        shared_by=math.ceil(gpus / adapters),
    )


SHARES = {
    "tensor_share": ("the share of the tensor cores' peak that kernels reach", 0.55, 1.0),
    "vector_share": ("the share of the other peaks that kernels reach", 0.75, 1.0),
    "memory_share": ("the share of the memory's peak that kernels reach", 0.82, 1.0),
    "winograd": ("how many times faster float32's 3x3 convolutions run", 1.6, math.inf),
    "kernel_s": ("the seconds that a kernel takes to start", 2.5e-6, math.inf),
}
"""What kernels reach of a GPU: meaning, value where a file does not say (see gpus.toml), most."""


def _gpu(table: Table) -> Gpu:
    """A known GPU by its name, or one with figures of its own."""
    wanted = "a table of its figures, or a GPU of " + ", ".join(_known_gpus().values)
    value = table.value("gpu", wanted)
    if isinstance(value, dict):
        own = table.table("gpu", wanted)
        return _gpu_of(own, own.text("name", "the GPU's name"))
    newest = {"v100": "v100-32gb", "a100": "a100-80gb"}
    known = newest.get(value, value) if isinstance(value, str) else ""
    if not _known_gpus().has(known):
        raise table.wrong("gpu", wanted)
    return _gpu_of(_known_gpus().table(known, wanted), known)


@functools.cache
def _known_gpus() -> Table:
    return _packaged("gpus")


def _gpu_of(table: Table, name: str) -> Gpu:
    peaks = table.table("peak_flops_per_s", "a table of operations per second by dtype")
    rates = {d: peaks.number(d, "the operations per second") for d in peaks.values}
    if "float32" not in rates:
        peaks.number("float32", "the operations per second without tensor cores")
    gpu = Gpu(
        name=name,
        peak_flops_per_s=rates,
        peak_memory_bytes_per_s=table.number(
            "peak_memory_bytes_per_s", "the peak of bytes per second read and written"
        ),
        memory_bytes=table.number("memory_bytes", "the bytes of device memory"),
        **{
            field: table.number(field, text, default=value, most=most, zero=field == "kernel_s")
            for field, (text, value, most) in SHARES.items()
        },
    )
    table.done()
    return gpu
