"""The commands `jaxlwp search FILE` and `diff A B`: what needs neither the model nor devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from jaxlwp.cli._options import (
    Command,
    bytes_option,
    json_option,
    pins_option,
    positive,
    target_file,
    with_options,
)
from jaxlwp.cli._shell import progress_bars, show, write_file, write_json
from jaxlwp.cost import load_problem, restrict
from jaxlwp.optimize import OBJECTIVES, Explanation, diff_strategies, explain, pareto, search
from jaxlwp.report import alternatives_table, problem_text, render, result_text
from jaxlwp.space import Constraints, Strategy

memory_option = click.option(
    "--memory",
    "memory_bytes",
    metavar="SIZE",
    callback=bytes_option,
    help="Bytes of each device that a training step may take, as in 16GB, 16GiB or 70e9.",
)
_OPTIONS: tuple[Callable[[Command], Command], ...] = (
    memory_option,
    click.option(
        "--pin",
        multiple=True,
        metavar="LAYER:DIM=N,...",
        callback=pins_option,
        help="Split a layer (or all that match a pattern) so: conv1:sample=4,channel=2; conv1: "
        "alone replicates it.",
    ),
    click.option(
        "--forbid", multiple=True, metavar="DIM", help="Split no layer by this dimension."
    ),
    click.option(
        "--replicated",
        multiple=True,
        metavar="PARAMETER",
        help="Keep a parameter (or all that match a pattern) whole on every device.",
    ),
    click.option(
        "--why",
        metavar="LAYER[:DIM]",
        help="Show what the best strategy with each other config of this layer would cost, or with "
        "those alone that split DIM; 'all' shows every layer's best three.",
    ),
    click.option(
        "--curve",
        is_flag=True,
        help="Show the fastest strategies for less and less memory too.",
    ),
    click.option(
        "--objective",
        type=click.Choice(list(OBJECTIVES)),
        default="sum",
        help="What to make least: sum (computation, transfers and synchronisation one after the "
        "other; the default), overlap (gradients synchronised behind the backward pass), bytes or "
        "memory.",
    ),
)


def search_options(command: Command) -> Command:
    """What is searched for, and what is shown of it."""
    return with_options(command, *_OPTIONS)


def constraints_of(
    pin: dict[str, dict[str, int]], forbid: tuple[str, ...], replicated: tuple[str, ...]
) -> Constraints | None:
    if not (pin or forbid or replicated):
        return None
    return Constraints(pin=pin, forbid=forbid, replicated=replicated)


def explained(explanation: Explanation | None, why: str | None) -> tuple[list[str], Sequence[str]]:
    """What the other configs of a layer, or of all layers, would cost; and which layers these are.

    Raises:
      ValueError: there is no such layer.
    """
    if explanation is None or why is None:
        return [], ()
    if why == "all":
        return [str(explanation)], [layer.name for layer in explanation.space.graph.layers]
    layer, _, dimension = why.partition(":")
    table = alternatives_table(explanation, layer, (dimension,) if dimension else ())
    return [render(table)], [layer]


_FILE = click.Path(path_type=Path)


@click.command("search")
@click.argument("problem", type=_FILE)
@search_options
@click.option(
    "--slots",
    type=float,
    default=1.0,
    callback=positive,
    help="Arrays like the parameters that the optimizer keeps, for --memory and --curve: 1 for SGD "
    "with momentum (the default), 2 for Adam.",
)
@click.option(
    "--strategy",
    "others",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="Show what this strategy, from --save, costs here beside the one found; may be repeated.",
)
@click.option("--show", "shown", is_flag=True, help="Show the problem: layers, configs, baselines.")
@click.option("--save", type=_FILE, callback=target_file, help="Write the strategy found here.")
@json_option("what was found")
def search_command(
    problem: Path,
    memory_bytes: float | None,
    pin: dict[str, dict[str, int]],
    forbid: tuple[str, ...],
    replicated: tuple[str, ...],
    why: str | None,
    curve: bool,
    objective: str,
    slots: float,
    others: tuple[Path, ...],
    shown: bool,
    save: Path | None,
    json_file: Path | None,
) -> None:
    """Search a saved PROBLEM again, without its model and its devices.

    PROBLEM is a file that `jaxlwp plan --save-problem` or `space.save` wrote.
    """
    with progress_bars() as progress:
        whole = space = load_problem(problem)
        if constraints := constraints_of(pin, forbid, replicated):
            space = restrict(whole, constraints)
        texts = [problem_text(space)] if shown else []
        found = search(space, objective=objective, memory_bytes=memory_bytes, optimizer_slots=slots)
        given = {str(path): whole.evaluate(Strategy.load(path)) for path in others}
        texts.append(result_text(found, given))
        texts += explained(None if why is None else explain(space), why)[0]
        if curve:
            texts.append(str(pareto(space, optimizer_slots=slots, progress=progress)))
    show("\n".join(texts))
    if save is not None:
        write_file(save, found.strategy.to_json())
    write_json(json_file, found.to_json())


@click.command("diff")
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@json_option("the differences")
def diff_command(a: Path, b: Path, json_file: Path | None) -> None:
    """Show how two strategies differ, from files A and B that --save wrote.

    The layers whose configs differ, what each strategy was predicted to take, and whether they are
    for other models, meshes or rates.
    """
    found = diff_strategies(Strategy.load(a), Strategy.load(b), names=(str(a), str(b)))
    show(str(found))
    write_json(json_file, found.to_json())
