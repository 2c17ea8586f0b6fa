"""What all commands share: exit codes, errors and warnings of one line, results, progress."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TextIO

import click
import jax
import rich.progress
from rich.console import Console

from jaxlwp._progress import Progress
from jaxlwp.check import is_simulated
from jaxlwp.files import write_file as write_whole
from jaxlwp.mesh import is_first_process

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


class ExitCode(IntEnum):
    """What a command ends with; docs/command-line.md says so too."""

    DONE = 0
    DOES_NOT_HOLD = 1
    """Something that the command checks does not hold."""
    BAD_INPUT = 2
    """What was given cannot be used, or a file or device is not as needed; nothing was written."""
    OUR_FAULT = 3
    """A fault of jaxlwp, with a traceback."""
    INTERRUPTED = 130
    """Ctrl-C."""


USER_ERRORS = (ValueError, OSError, RuntimeError)
"""Classes of the errors that users can mend, which the package documents; all others are ours."""


class Shell(click.Group):
    """Commands with the same habits.

    Each has `--quiet`. Whatever ends a command is told in one line, without a traceback unless the
    fault is ours, and by an exit code.
    """

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and its `--quiet`."""
        if not isinstance(cmd, click.Group):
            cmd.params.append(_quiet_option())
        super().add_command(cmd, name)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and end the process."""

        def run() -> Any:
            return super(Shell, self).main(
                args, prog_name, complete_var, standalone_mode=False, **extra
            )

        if not standalone_mode:
            return run()
        # Tracing makes many small objects and little garbage; looking for it takes a sixth of it.
        gc.set_threshold(200_000, 20, 100)
        with _one_line_warnings():
            sys.exit(_ended(run))


def _ended(run: Callable[[], Any]) -> int:
    """Run a command; its exit code, when what ended it is told."""
    try:
        return int(run() or ExitCode.DONE)
    except click.Abort:
        _tell_error(
            "Interrupted: files that were being written are as they were before, and what was "
            "measured is kept"
        )
        return ExitCode.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except click.UsageError as error:
        text = error.format_message().rstrip(".")
        see = " See" if text.endswith("?") else "; see"
        command = error.ctx.command_path if error.ctx else "jaxlwp"
        _tell_error(f"Error: {text}{see} `{command} --help`")
    except click.ClickException as error:
        _tell_error(f"Error: {error.format_message()}")
    except (RecursionError, NotImplementedError):
        return _our_fault()
    except USER_ERRORS as error:
        _tell_error(f"Error: {error}")
    except Exception:
        return _our_fault()
    return ExitCode.BAD_INPUT


def _our_fault() -> int:
    traceback.print_exc()
    _tell_error("Error: this is a fault of jaxlwp, not of what you gave; report the lines above")
    return ExitCode.OUR_FAULT


def _tell_error(text: str) -> None:
    """One line, also where it quotes what the terminal cannot show."""
    line = " ".join(text.split())
    click.echo(line.encode(errors="backslashreplace").decode(), err=True)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the line of code that they are from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        context = click.get_current_context(silent=True)
        if context is None or not context.meta.get(_QUIET):
            _tell_error(f"Warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# --- results -------------------------------------------------------------------------------------

_QUIET = "jaxlwp.quiet"
_PIPED = "jaxlwp.piped"


def _quiet_option() -> click.Option:
    def keep(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.meta[_QUIET] = value

    return click.Option(
        ["--quiet", "-q"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=keep,
        help="Results and errors only: no progress, warnings or notices.",
    )


def pipe_json() -> None:
    """`--json -`: standard output is for JSON alone."""
    click.get_current_context().meta[_PIPED] = True


def show(text: str) -> None:
    """Print a result, unless its JSON is printed."""
    if not click.get_current_context().meta.get(_PIPED):
        click.echo(text.rstrip("\n"))


def notice(text: str) -> None:
    """Say what was done, unless nobody wants to know."""
    if not click.get_current_context().meta.get(_QUIET):
        show(text)


def write_file(path: Path, text: str) -> None:
    """Write a file in one step, and say so. The first process does."""
    if is_first_process():
        write_whole(path, text)
    notice(f"wrote {path}")


def write_json(path: Path | None, text: str) -> None:
    """Write results where `--json` asks for it: to a file, or to standard output for "-"."""
    if path == PIPE:
        click.echo(text)
    elif path is not None:
        write_file(path, text)


PIPE = Path("-")
"""Stands for standard output."""


# --- devices, progress, processes ----------------------------------------------------------------


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
    """Progress bars on stderr, none if it is not a terminal or with `--quiet`."""
    console = Console(stderr=True)
    quiet = click.get_current_context().meta.get(_QUIET, False)
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
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
