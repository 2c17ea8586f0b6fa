"""Options of the commands, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import click

from jaxlwp.cli._shell import PIPE, pipe_json
from jaxlwp.cli._workload import DEFAULT_BATCH
from jaxlwp.devices import GivenRates, Rates
from jaxlwp.files import unwritable
from jaxlwp.mesh import is_first_process

Command = Callable[..., None]


def at_least_one(_: click.Context, option: click.Parameter, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise click.ClickException(f"{option.opts[0]}: {value} given; give a number of at least 1")
    return value


def _input_shape(
    _: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", value, re.ASCII):
        raise click.ClickException(
            f"{option.opts[0]}: {value!r} given; give the shape of one example as sizes of at "
            "least 1 joined by x, channels last, as in 224x224x3"
        )
    return tuple(int(size) for size in value.split("x"))


def positive(_: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.ClickException(
            f"{option.opts[0]}: {value} given; give a positive finite number"
        )
    return value


def _not_negative(_: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.ClickException(
            f"{option.opts[0]}: {value} given; give a finite number of seconds of at least 0"
        )
    return value


_UNITS = {
    prefix + unit: base**power
    for base, unit in ((1000, "b"), (1024, "ib"))
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    if prefix or unit == "b"
}
"""Bytes of each unit, in small letters."""


def bytes_option(_: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A number of bytes, with or without a unit."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*([a-z]*)", value.strip().lower(), re.ASCII)
    unit = _UNITS.get(found[2] or "b") if found else None
    size = float(found[1]) * unit if found and unit else 0.0
    if not 0 < size < math.inf:
        raise click.ClickException(
            f"{option.opts[0]}: {value!r} given; give a positive number of bytes, as in 16GB, "
            "16GiB (1,073,741,824 bytes each) or 16e9"
        )
    return size


def sizes_option(
    _: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """N,N,... as numbers."""
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value, re.ASCII):
        raise click.ClickException(
            f"{option.opts[0]}: {value!r} given; give numbers of at least 1, as in 1,2,4"
        )
    return tuple(map(int, value.split(",")))


def pins_option(
    _: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """LAYER:DIM=N,... as layer -> dimension -> degree."""
    result = {}
    for value in values:
        layer, colon, splits = value.rpartition(":")
        pairs = [split.split("=") for split in splits.split(",") if split]
        if not colon or not all(len(p) == 2 and re.fullmatch(r"[1-9]\d*", p[1]) for p in pairs):
            raise click.ClickException(
                f"{option.opts[0]}: {value!r} given; give a layer and its split, as in "
                "conv1:sample=4,channel=2"
            )
        result[layer] = {dimension: int(degree) for dimension, degree in pairs}
    return result


def target_file(_: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """Find out before a long run that its result cannot be written."""
    if value is None or not is_first_process():
        return value
    problem = unwritable(value)
    if problem is None:
        return value
    name = option.opts[0] if option.param_type_name == "option" else option.human_readable_name
    raise click.ClickException(f"{name}: cannot write {value}: {problem}")


def _count_or_system(
    context: click.Context, option: click.Parameter, value: str | None
) -> int | str | None:
    """A number of devices, or the name of a system."""
    if value is None or not re.fullmatch(r"[+-]?\d+", value):
        return value
    return at_least_one(context, option, int(value))


def json_option(what: str) -> Callable[[Command], Command]:
    """`--json FILE`."""
    return click.option(
        "--json",
        "json_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        callback=_json_target,
        help=f"Write {what} to this JSON file; '-' prints it, in place of anything else.",
    )


def _json_target(
    context: click.Context, option: click.Parameter, value: Path | None
) -> Path | None:
    if value == PIPE:
        pipe_json()
        return value
    return target_file(context, option, value)


_DEVICES = "How many devices; all by default. Without accelerators they are simulated."
_MODEL = click.argument("model")
_COUNT = click.option("--devices", type=int, callback=at_least_one, help=_DEVICES)
_COUNT_OR_SYSTEM = click.option(
    "--devices",
    metavar="COUNT|SYSTEM",
    callback=_count_or_system,
    help=f"{_DEVICES} Or a system that need not be there: dgx-h100:4 (four hosts), h200:8 (eight "
    "GPUs), h200:2x8, cluster.toml:4.",
)
_DATA_OPTIONS = (
    click.option(
        "--batch",
        type=int,
        callback=at_least_one,
        help=f"Examples in a batch; {DEFAULT_BATCH} by default.",
    ),
    click.option(
        "--input",
        "input_shape",
        metavar="HxWxC",
        callback=_input_shape,
        help="Shape of one example; the model's input_shape by default.",
    ),
    click.option(
        "--dtype",
        metavar="DTYPE",
        help="Dtype of the computation, such as bfloat16, of a Flax module that takes one.",
    ),
)
_RATE_OPTIONS = (
    click.option(
        "--rates",
        metavar="SYSTEM",
        help="Rates of a system by its published figures: a GPU as in h200, a system as in "
        "dgx-a100, or a TOML file; in place of the four by hand.",
    ),
    click.option(
        "--flops",
        type=float,
        callback=positive,
        help="Operations per second of one device. Rates by hand are given all four or not at all; "
        "by default they are measured, and kept for the next time.",
    ),
    click.option(
        "--memory-bandwidth",
        type=float,
        callback=positive,
        help="Bytes per second that one device reads and writes.",
    ),
    click.option(
        "--latency",
        type=float,
        callback=_not_negative,
        help="Seconds of a small all-reduce of all devices.",
    ),
    click.option(
        "--bandwidth",
        type=float,
        callback=positive,
        help="Bytes per second that one device sends.",
    ),
)


def data_options(command: Command) -> Command:
    """The model and its data."""
    return with_options(command, _MODEL, *_DATA_OPTIONS)


def model_options(command: Command) -> Command:
    """The model, its data, and how many devices."""
    return with_options(command, _MODEL, _COUNT, *_DATA_OPTIONS)


def shared_options(command: Command) -> Command:
    """Those, and rates."""
    return with_options(command, _MODEL, _COUNT, *_DATA_OPTIONS, *_RATE_OPTIONS)


def planning_options(command: Command) -> Command:
    """The same, and devices that need not be there."""
    return with_options(command, _MODEL, _COUNT_OR_SYSTEM, *_DATA_OPTIONS, *_RATE_OPTIONS)


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """The command with options, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def given_rates(system: str | None, given: dict[str, float | None]) -> GivenRates | None:
    """Rates of a system or by hand; None if they are to be measured."""
    by_hand = [name for name, value in given.items() if value is not None]
    if system is None:
        return _rates_by_hand(given)
    if by_hand:
        raise click.ClickException(
            f"--rates: {system} given beside --{by_hand[0].replace('_', '-')}; give a system, or "
            "all four rates by hand"
        )
    return system


def _rates_by_hand(given: dict[str, float | None]) -> Rates | None:
    names = {name: "--" + name.replace("_", "-") for name in given}
    missing = [names[name] for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise click.ClickException(
            f"{', '.join(missing)}: missing; rates by hand are given all four or not at all: give "
            f"all of {', '.join(names.values())}, or none to measure them"
        )
    values = {name: value or 0.0 for name, value in given.items()}
    return Rates(
        flops_per_s=values["flops"],
        memory_bytes_per_s=values["memory_bandwidth"],
        latency_s=(values["latency"],),
        link_bytes_per_s=(values["bandwidth"],),
    )
