"""The command `jaxlwp simulate MODEL`: systems that are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jaxlwp.cli._options import at_least_one, data_options, json_option, positive, sizes_option
from jaxlwp.cli._shell import progress_bars, show, write_json
from jaxlwp.cli._workload import DEFAULT_BATCH, load_workload
from jaxlwp.devices import System, filled, preset
from jaxlwp.simulate import Scaling, Workload, batch_threshold, link_threshold, scaling


@click.command()
@data_options
@click.option(
    "--system",
    required=True,
    metavar="SYSTEM",
    help="A system as in dgx-h100, a GPU as in h200 for its newest system, or a TOML file.",
)
@click.option(
    "--hosts", callback=sizes_option, metavar="N,N,...", help="Numbers of hosts, as in 1,2,4,8."
)
@click.option(
    "--gpus",
    callback=sizes_option,
    metavar="N,N,...",
    help="Numbers of GPUs, in place of --hosts: as many hosts as they fill.",
)
@click.option(
    "--total",
    type=int,
    callback=at_least_one,
    help="Examples in all, the same on every size (strong scaling); by default --batch for each "
    "GPU (weak scaling).",
)
@click.option(
    "--thresholds",
    is_flag=True,
    help="Find the link rate and the batch from which on data parallelism is as good, on the "
    "largest size.",
)
@click.option(
    "--examples",
    type=float,
    callback=positive,
    help="Examples in a training, such as epochs times a data set: shows its GPU-hours.",
)
@json_option("the table")
def simulate(
    model: str,
    batch: int | None,
    input_shape: tuple[int, ...] | None,
    dtype: str | None,
    system: str,
    hosts: tuple[int, ...] | None,
    gpus: tuple[int, ...] | None,
    total: int | None,
    thresholds: bool,
    examples: float | None,
    json_file: Path | None,
) -> None:
    """Predict how MODEL trains on systems that are not at hand, found and baselines."""
    if total is not None and batch is not None:
        raise click.ClickException(
            f"--total: {total} given beside --batch {batch}; give the examples in all, or of a GPU"
        )

    def workload(examples: int) -> tuple[Any, Any, tuple[Any, ...]]:
        work = load_workload(
            model, batch=examples, input_shape=input_shape, dtype=dtype, abstract=True
        )
        return work.loss, work.params, work.batch

    each = batch or DEFAULT_BATCH
    with progress_bars() as progress:
        systems = _systems(system, hosts, gpus)
        found = scaling(
            workload,
            systems,
            batch=total or each,
            weak=total is None,
            name=model,
            on_progress=progress,
        )
        texts = [str(found)]
        if examples is not None:
            texts.append(_hours(found, examples))
        if thresholds:
            texts += _thresholds(workload, systems[-1], total or each * systems[-1].num_devices)
    show("\n".join(texts))
    write_json(json_file, found.to_json())


def _systems(
    name: str, hosts: tuple[int, ...] | None, gpus: tuple[int, ...] | None
) -> list[System]:
    """The systems of the sizes that are asked for."""
    if hosts is not None and gpus is not None:
        raise click.ClickException("--gpus: given beside --hosts; give one of both")
    if gpus is not None:
        return [filled(name, count) for count in gpus]
    return [preset(name, hosts=count) for count in hosts or (1,)]


def _hours(found: Scaling, examples: float) -> str:
    """GPU-hours of a training, found beside data parallelism, for each size."""
    lines = [f"{examples:,.0f} examples:"]
    for point in found.points:
        hours = {
            each.strategy: found.gpu_hours(point, examples, each.strategy)
            for each in point.outcomes
            if each.strategy in ("found", "data")
        }
        texts = [
            f"{value:,.4g} GPU-hours in {value / point.devices:,.3g} h ({name})"
            for name, value in hours.items()
        ]
        lines.append(f"  {point.devices:5} GPUs: {', '.join(texts)}")
    return "\n".join(lines)


def _thresholds(workload: Workload, system: System, batch: int) -> list[str]:
    with progress_bars() as progress:
        links = link_threshold(workload, system, batch=batch, on_progress=progress)
        batches = batch_threshold(workload, system, on_progress=progress)
    return [f"on {system}:", str(links), str(batches)]
