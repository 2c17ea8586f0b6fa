"""Several processes that make one plan: what one has measured, all must use; what differs is told.

Every process traces, prices and searches on its own. They end with the same plan because they start
with the same numbers: those of the first process. What each was given is compared by digest, before
any of them runs a collective that the others would not join.

Only processes that have devices of the mesh take part, and all of them must call each function.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlwp.mesh import auto_mesh, on_mesh

CONTEXT = 40
"""Characters that are quoted before the first one that differs."""

SHORT_BYTES = 256
"""Of a short text, such as versions. Must stay as it is: releases that differ compare it, too."""


def processes_of(mesh: Mesh) -> list[int]:
    """The processes that have devices of a mesh, in order."""
    return sorted({device.process_index for device in mesh.devices.flat})


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices of a mesh belong to several processes that run.

    Those of devices that are there to be compiled for alone do not.
    """
    return jax.process_count() > 1 and len(processes_of(mesh)) > 1


def local_devices(mesh: Mesh) -> list[Any]:
    """The mesh's devices that this process can run programs on."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def from_first(value: Any, mesh: Mesh) -> Any:
    """The first process's value, in every process.

    Args:
      value: plain JSON data; only the first process's counts.
      mesh: whose processes take part.
    """
    first = jax.process_index() == processes_of(mesh)[0]
    mine = np.frombuffer(json.dumps(value).encode() if first else b"", np.uint8)
    (length,) = _together(mesh, np.array([len(mine)], np.int32), _sum)
    padded = np.zeros(int(length), np.uint8)
    padded[: len(mine)] = mine
    return json.loads(_together(mesh, padded, _sum).tobytes())


def check_short(where: str, what: str, text: str, mesh: Mesh, remedy: str) -> None:
    """Check that a text of one line is the same in every process, even in other releases of ours.

    Args:
      where: who is called, for the error.
      what: the text is, for the error.
      text: at most `SHORT_BYTES` of UTF-8.
      mesh: whose processes take part.
      remedy: for the error.

    Raises:
      ValueError: it differs, in every process.
    """
    mine = np.frombuffer(text.encode()[:SHORT_BYTES].ljust(SHORT_BYTES), np.uint8)
    rows = _together(mesh, mine, _stack)
    texts = [row.tobytes().decode(errors="replace").strip() for row in rows]
    for process, other in zip(processes_of(mesh), texts, strict=True):
        if other != texts[0]:
            first = processes_of(mesh)[0]
            raise _differing(where, what, (first, process), (texts[0], other), remedy)


def check_same(where: str, parts: Mapping[str, Sequence[str]], mesh: Mesh, remedy: str) -> None:
    """Check that named texts are the same in every process, by digest.

    Equal texts cost one all-gather of 32 bytes. Where they differ, some more find the first line
    that does.

    Args:
      where: who is called, for the error.
      parts: what is compared: name -> lines.
      mesh: whose processes take part.
      remedy: for the error.

    Raises:
      ValueError: a part differs, in every process: which one, where, and between which processes.
    """
    digests = {name: _digest("\n".join(lines)) for name, lines in parts.items()}
    rows = _together(mesh, np.frombuffer(_digest(json.dumps(_hex(digests))), np.uint8), _stack)
    if (rows == rows[0]).all():
        return
    listed = [json.loads(text) for text in gather_texts(json.dumps(_hex(digests)), mesh)]
    name, other = next(
        (name, n)
        for name in dict.fromkeys(name for one in listed for name in one)
        for n, one in enumerate(listed)
        if one.get(name) != listed[0].get(name)
    )
    lines = list(parts.get(name, ()))
    hashed = [_digest(line).hex()[:16] for line in lines]
    all_hashed = [text.split() for text in gather_texts(" ".join(hashed), mesh)]
    pairs = enumerate(itertools.zip_longest(all_hashed[0], all_hashed[other]))
    at = next(n for n, (mine, theirs) in pairs if mine != theirs)
    quoted = gather_texts(lines[at] if at < len(lines) else "nothing more", mesh)
    numbers = processes_of(mesh)
    between = numbers[0], numbers[other]
    raise _differing(where, name, between, (quoted[0], quoted[other]), remedy)


def gather_texts(text: str, mesh: Mesh) -> list[str]:
    """The texts of all processes, in the order of `processes_of`."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = _together(mesh, np.array([len(mine)], np.int32), _stack)[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = _together(mesh, padded, _stack)
    return [
        row[:length].tobytes().decode(errors="replace")
        for row, length in zip(rows, lengths, strict=True)
    ]


def _differing(
    where: str, what: str, between: tuple[int, int], texts: tuple[str, str], remedy: str
) -> ValueError:
    first, other = between
    mine, theirs = _quoted(*texts)
    return ValueError(
        f"{where}: {what} differ between processes {first} and {other}: {mine!r} in process "
        f"{first}, {theirs!r} in process {other}; {remedy}"
    )


def _quoted(*texts: str) -> tuple[str, ...]:
    """How two lines start, and where they differ."""
    differs = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    )
    start = max(differs - CONTEXT, 0)
    if start <= 2 * CONTEXT:
        return tuple(text[: start + 3 * CONTEXT] for text in texts)
    return tuple(f"{text[:CONTEXT]} ... {text[start : start + 3 * CONTEXT]}" for text in texts)


def _digest(content: str | bytes) -> bytes:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()


def _hex(digests: Mapping[str, bytes]) -> dict[str, str]:
    return {name: digest.hex() for name, digest in digests.items()}


# --- the collectives -----------------------------------------------------------------------------


def _stack(rows: jax.Array) -> jax.Array:
    return rows


def _sum(rows: jax.Array) -> jax.Array:
    return rows.sum(0, dtype=rows.dtype)


@functools.cache
def _one_device_each(mesh: Mesh) -> Mesh:
    """A mesh of one device of each process."""
    firsts: dict[int, jax.Device] = {}
    for device in mesh.devices.flat:
        firsts.setdefault(device.process_index, device)
    devices = [firsts[process] for process in processes_of(mesh)]
    return auto_mesh(devices, ("process",))


@functools.cache
def _compiled(mesh: Mesh, combine: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(combine, out_shardings=NamedSharding(mesh, PartitionSpec()))


@jax.ensure_compile_time_eval()  # a plan may be made while a training step is traced
def _together(
    mesh: Mesh, mine: np.ndarray, combine: Callable[[jax.Array], jax.Array]
) -> np.ndarray:
    """What `combine` makes of the rows of all processes, in each.

    JAX's `multihost_utils` set a mesh, which is not allowed while a step is traced.
    """
    each = _one_device_each(mesh)
    split = NamedSharding(each, PartitionSpec("process"))
    shape = (each.size, *mine.shape)
    rows = jax.make_array_from_callback(shape, split, lambda _: mine[None], mine.dtype)
    with on_mesh(each):
        return np.asarray(_compiled(each, combine)(rows).addressable_data(0))
