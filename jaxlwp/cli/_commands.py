"""The commands `jaxlwp plan`, `compare` and `profile MODEL`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from jax.sharding import Mesh

from jaxlwp._parallelize import parallelize
from jaxlwp._progress import Progress
from jaxlwp._version import __version__
from jaxlwp.check import (
    ROUNDS,
    Comparison,
    CompiledComparison,
    Target,
    batch_size,
    compare,
    compare_compiled,
)
from jaxlwp.cli._options import (
    at_least_one,
    given_rates,
    json_option,
    model_options,
    planning_options,
    shared_options,
    target_file,
)
from jaxlwp.cli._search import constraints_of, explained, memory_option, search_options
from jaxlwp.cli._shell import (
    Shell,
    describe,
    join_processes,
    notice,
    progress_bars,
    provide_devices,
    show,
    write_file,
    write_json,
)
from jaxlwp.cli._workload import DEFAULT_BATCH, load_workload
from jaxlwp.cost import price
from jaxlwp.devices import (
    DeviceGraph,
    GivenRates,
    Rates,
    Store,
    System,
    device_graph,
    environment_of,
    local_devices,
    make_mesh,
    preset,
    spans_processes,
)
from jaxlwp.graph import trace
from jaxlwp.measure import LayerTimer, TimingCache, load_profile
from jaxlwp.optimize import explain, pareto
from jaxlwp.report import model_explorer_data, page_html, plan_json
from jaxlwp.space import BASELINES, Strategy

# --- commands --------------------------------------------------------------------------------


@click.group(cls=Shell, name="jaxlwp")
@click.version_option(__version__, prog_name="jaxlwp")
@click.option(
    "--distributed",
    is_flag=True,
    help="Be one of several processes that Slurm, Open MPI or Kubernetes has started, and use the "
    "devices of all. The first one prints and writes.",
)
def main(distributed: bool) -> None:
    """Find, show and measure the fastest layer-wise parallelization of a network.

    MODEL is module:attribute, such as models.alexnet:AlexNet, and is looked for in the current
    folder too. It names a Flax module (Linen or NNX), which is trained as a classifier of random
    data, or a function that returns (loss_fn, params, batch).
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if distributed:
        join_processes()


@main.command()
@planning_options
@click.option(
    "--strategy",
    default="search",
    help=f"search, {', '.join(BASELINES)}, or a .json file that --save wrote; search by default.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    callback=target_file,
    help="Write the strategy to this JSON file.",
)
@click.option(
    "--save-problem",
    "problem",
    type=click.Path(path_type=Path),
    callback=target_file,
    help="Write all costs to this file: `jaxlwp search` searches it again, without the model and "
    "the devices.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    callback=target_file,
    help="Write the plan to this file as a page: the network as a graph, figures of each layer.",
)
@click.option(
    "--model-explorer",
    "explorer",
    type=click.Path(path_type=Path),
    callback=target_file,
    help="Write the network with its plan to this JSON file, which Model Explorer opens.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Plan with the measurements of another machine, from `jaxlwp cache export`.",
)
@search_options
@click.option(
    "--sum-dtype",
    metavar="DTYPE",
    help="The least dtype in which gradients are added up, such as float32; by default that in "
    "which each layer computes.",
)
@click.option(
    "--analytic",
    is_flag=True,
    help="Price layers by the devices' rates, without measuring them.",
)
@click.option(
    "--forward",
    is_flag=True,
    help="Plan an evaluation: a module's outputs, or whatever a function returns; no gradients.",
)
@json_option("the plan: strategy, layers, costs")
def plan(
    model: str,
    devices: int | str | None,
    batch: int | None,
    input_shape: tuple[int, ...] | None,
    dtype: str | None,
    strategy: str,
    save: Path | None,
    problem: Path | None,
    html: Path | None,
    explorer: Path | None,
    profile: Path | None,
    analytic: bool,
    forward: bool,
    memory_bytes: float | None,
    pin: dict[str, dict[str, int]],
    forbid: tuple[str, ...],
    replicated: tuple[str, ...],
    why: str | None,
    curve: bool,
    objective: str,
    sum_dtype: str | None,
    json_file: Path | None,
    rates: str | None,
    **by_hand: float | None,
) -> None:
    """Find a strategy for MODEL and print it, a row per layer."""
    given = given_rates(rates, by_hand)
    there = None if isinstance(devices, str) else provide_devices(devices)
    with progress_bars() as progress:
        wanted = Strategy.load(strategy) if strategy.endswith(".json") else strategy
        work = load_workload(
            model,
            batch=batch,
            input_shape=input_shape,
            dtype=dtype,
            train=not forward,
            abstract=True,
        )
        system = preset(devices) if isinstance(devices, str) else None
        mesh = None if there is None else make_mesh(there)
        rated: Any = given
        if profile:
            rated = load_profile(profile)
        elif mesh is not None:
            rated = _rated(mesh, given, progress)
        found = parallelize(
            work.loss,
            work.params,
            *work.batch,
            devices=system,
            mesh=mesh,
            strategy=wanted,
            rates=rated,
            measure=there is not None and given is None and profile is None and not analytic,
            memory_bytes=memory_bytes,
            constraints=constraints_of(pin, forbid, replicated),
            objective=objective,
            sum_dtype=sum_dtype,
            train=not forward,
            on_progress=progress,
        )
        explanation = None if why is None else explain(found.space)
        texts, layers = explained(explanation, why)
        points = pareto(found.space, progress=progress) if curve else None
        if points is not None:
            texts.append(str(points))
        content = ""
        if json_file is not None:
            content = plan_json(
                found,
                model=model,
                batch=batch_size(work.batch),
                explanation=explanation,
                explained=layers,
                curve=points,
            )
        page = None if html is None else page_html(found)
        graph = None if explorer is None else json.dumps(model_explorer_data(found))
    where = str(system) if there is None else describe(there)
    show(f"{model}, batch {batch_size(work.batch)}, on {where}")
    show(str(found))
    for text in texts:
        show(text)
    if save is not None:
        write_file(save, found.recorded.to_json())
    if problem is not None:
        found.space.save(problem)
        notice(f"wrote {problem}")
    if html is not None and page is not None:
        write_file(html, page)
    if explorer is not None and graph is not None:
        write_file(explorer, graph)
    write_json(json_file, content)


@main.command("compare")
@shared_options
@memory_option
@click.option(
    "--rounds",
    type=int,
    default=ROUNDS,
    callback=at_least_one,
    help=f"Measured steps of each strategy, after one to warm up; {ROUNDS} by default.",
)
@json_option("the results")
@click.option(
    "--target",
    metavar="GPU:[HOSTSx]COUNT",
    help="Run nothing: compile for these GPUs, which need not be there, and forecast every step "
    "from the compiled program, plain JAX's data parallelism too. As in h200:8 or h200:2x8; "
    "--rates names the system. Needs the extra gpu-aot.",
)
def compare_command(
    model: str,
    devices: int | None,
    batch: int | None,
    input_shape: tuple[int, ...] | None,
    dtype: str | None,
    memory_bytes: float | None,
    rounds: int,
    json_file: Path | None,
    target: str | None,
    rates: str | None,
    **by_hand: float | None,
) -> None:
    """Run the strategy found for MODEL and every baseline, and print predicted and measured."""
    given = given_rates(rates, by_hand)
    if target is not None:
        _refuse_beside_target(devices, given)
        system = None if rates is None else _system(target, rates)
        with progress_bars() as progress:
            work = load_workload(
                model, batch=batch, input_shape=input_shape, dtype=dtype, abstract=True
            )
            compiled = compare_compiled(
                work.loss,
                work.params,
                *work.batch,
                target=target,
                system=system,
                memory_bytes=memory_bytes,
                name=model,
                on_progress=progress,
            )
        _show(compiled, json_file)
        return
    chosen = provide_devices(devices)
    with progress_bars() as progress:
        _check_divides(batch or DEFAULT_BATCH, len(chosen))
        progress("making the model", 0, 1)
        work = load_workload(model, batch=batch, input_shape=input_shape, dtype=dtype)
        progress("making the model", 1, 1)
        _check_divides(batch_size(work.batch), len(chosen))
        comparison = compare(
            work.loss,
            work.params,
            *work.batch,
            devices=chosen,
            rounds=rounds,
            rates=given,
            memory_bytes=memory_bytes,
            name=model,
            on_progress=progress,
        )
    _show(comparison, json_file)


def _show(comparison: Comparison | CompiledComparison, json_file: Path | None) -> None:
    show(str(comparison))
    write_json(json_file, comparison.to_json())


def _check_divides(size: int, devices: int) -> None:
    """Data parallelism, which everything is compared with, splits the batch evenly."""
    if size % devices:
        raise click.ClickException(
            f"--batch: {size} examples cannot be shared evenly by {devices} devices, as data "
            f"parallelism must; give a multiple of {devices}, or fewer devices (`jaxlwp plan` "
            "takes any batch)"
        )


def _refuse_beside_target(devices: int | None, given: GivenRates | None) -> None:
    """Refuse what a target says itself, and rates that are not those of a system."""
    if devices is not None:
        raise click.ClickException(
            f"--devices: {devices} given beside --target, which has devices already; leave it out"
        )
    if isinstance(given, Rates):
        raise click.ClickException(
            "--flops: rates by hand given beside --target, whose forecast needs a system; name "
            "one, as in --rates dgx-h200, or give a TOML file"
        )


def _system(target: str, rates: str) -> System:
    """The system that rates name, with the target's hosts."""
    parsed = Target.parse(target)
    return preset(rates, hosts=parsed.hosts, gpus=parsed.gpus_per_host)


def _rated(mesh: Mesh, given: GivenRates | None, progress: Progress) -> DeviceGraph:
    """Rates of a mesh: given, cached, or measured now."""
    progress("measuring device rates", 0, 1)
    rated = device_graph(mesh, rates=given)
    progress("measuring device rates", 1, 1)
    return rated


@main.command("profile")
@model_options
@click.option("--again", is_flag=True, help="Measure what was measured before, too.")
@json_option("what was measured, how many figures and where they are kept,")
def profile_command(
    model: str,
    devices: int | None,
    batch: int | None,
    input_shape: tuple[int, ...] | None,
    dtype: str | None,
    again: bool,
    json_file: Path | None,
) -> None:
    """Measure every layer of MODEL in every way to split it, and keep the times.

    It can be interrupted, and goes on where it was.
    """
    chosen = provide_devices(devices)
    with progress_bars() as progress:
        work = load_workload(
            model, batch=batch, input_shape=input_shape, dtype=dtype, abstract=True
        )
        mesh = make_mesh(chosen)
        if again:
            device_graph(mesh, again=True)
        rated = _rated(mesh, None, progress)
        space = price(trace(work.loss, work.params, *work.batch), rated)
        pairs = [
            (layer, config)
            for layer, configs in zip(space.graph.layers, space.configs, strict=True)
            for config in configs
            if not layer.fused
        ]
        with Store() as store:
            here = local_devices(mesh)
            environment = environment_of(here)
            if again:
                store.forget(environment, TimingCache.kind)
            together = mesh if spans_processes(mesh) else None
            cache = TimingCache(store, environment, together)
            timer = LayerTimer(space.graph, rated, here, cache)
            programs = timer.measure(pairs, progress)
            path = store.path
    size = batch_size(work.batch)
    notice(
        f"{model}, batch {size}, on {describe(chosen)}: {len(pairs):,} pairs of layer and config "
        f"are measured, {programs:,} programs now; kept in {path}"
    )
    content = {
        "model": model,
        "batch": size,
        "devices": len(chosen),
        "pairs": len(pairs),
        "programs": programs,
        "file": str(path),
    }
    write_json(json_file, json.dumps(content, indent=2))
