"""What all commands share: devices, progress, errors, files."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import rich.progress
from rich.console import Console

from jaxlwp.check import Progress, is_simulated
from jaxlwp.files import write_file as write_whole
from jaxlwp.mesh import is_first_process

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def provide_devices(count: int | None) -> list[Any]:
    """The devices to use: those that exist, or simulated ones if there are only processors.

    The flag has to be set before JAX starts its backends, and means nothing to accelerators.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = [int(n) for n in re.findall(rf"{_DEVICE_COUNT_FLAG}=(\d+)", flags)]
    if count is not None and count > max(asked, default=1):
        others = re.sub(rf"{_DEVICE_COUNT_FLAG}=\S*", "", flags).split()
        os.environ["XLA_FLAGS"] = " ".join([*others, f"{_DEVICE_COUNT_FLAG}={count}"])
    present = jax.devices()
    if count is not None and count > len(present):
        raise click.ClickException(
            f"--devices: {count} given, but {len(present)} exist ({present[0].device_kind}); ask "
            "for fewer, or set JAX_PLATFORMS=cpu to simulate them"
        )
    return present[:count]


def join_processes() -> None:
    """Become one of several processes, as JAX finds out from what started them."""
    try:
        if not jax.distributed.is_initialized():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(
            "--distributed: JAX does not see what started this process (Slurm, Open MPI, "
            f"Kubernetes): {' '.join(str(error).split())}; start it with srun or mpirun, or leave "
            "the option out"
        ) from error
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")


def describe(devices: list[Any]) -> str:
    cores = f", simulated on {os.cpu_count()} processor cores" if is_simulated(devices) else ""
    return f"{len(devices)} x {devices[0].device_kind}{cores}"


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars on stderr, none if it is not a terminal."""
    console = Console(stderr=True)
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    tasks: dict[str, rich.progress.TaskID] = {}
    with rich.progress.Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that the user can mend are told in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


def write_file(path: Path, text: str) -> None:
    """Write a file in one step: it is complete or as it was before. The first process does."""
    if is_first_process():
        write_whole(path, text)


def write_json(path: Path | None, text: str) -> None:
    """Write results where `--json` asks for it, and say so."""
    if path is not None:
        with one_line_errors():
            write_file(path, text)
        click.echo(f"wrote {path}")
