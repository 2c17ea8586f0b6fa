"""The command `jaxlwp cache`: measurements on disk."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from jaxlwp.cli._shell import one_line_errors
from jaxlwp.devices import Environment, Store
from jaxlwp.report import render


@click.group()
def cache() -> None:
    """Show, move and clear what was measured."""


@cache.command("list")
def cache_list() -> None:
    """What was measured, and where it is kept."""
    with one_line_errors(), Store() as store:
        known, path = store.environments(), store.path
    table = Table(title=f"measurements in {path}", title_justify="left")
    for column in ("environment", "devices", "versions", "measured"):
        table.add_column(column)
    for environment, kinds in known:
        host = f" on {environment.host}, {environment.at_once} at once" if environment.host else ""
        table.add_row(
            environment.key,
            environment.device_kind + host,
            f"JAX {environment.jax}, jaxlib {environment.jaxlib}",
            ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())),
        )
    click.echo(render(table))


_ENVIRONMENT = click.option(
    "--environment", help="One environment only, by its key in `jaxlwp cache list`."
)


@cache.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@_ENVIRONMENT
def cache_export(file: Path, environment: str | None) -> None:
    """Write measurements to FILE, to plan on another machine (`jaxlwp plan --profile FILE`)."""
    with one_line_errors(), Store() as store:
        count = store.export(file, _chosen_environment(store, environment))
    click.echo(f"wrote {count:,} measurements to {file}")


@cache.command("import")
@click.argument("file", type=click.Path(path_type=Path))
def cache_import(file: Path) -> None:
    """Add the measurements in FILE; of two for the same thing the newer one stays."""
    with one_line_errors(), Store() as store:
        count = store.import_file(file)
    click.echo(f"added {count:,} measurements")


@cache.command("clear")
@_ENVIRONMENT
@click.option("--kind", type=click.Choice(["layer", "rates"]), help="One kind only.")
def cache_clear(environment: str | None, kind: str | None) -> None:
    """Drop measurements, to take them again."""
    with one_line_errors(), Store() as store:
        count = store.forget(_chosen_environment(store, environment), kind)
    click.echo(f"dropped {count:,} measurements")


def _chosen_environment(store: Store, key: str | None) -> Environment | None:
    if key is None:
        return None
    known = {environment.key: environment for environment, _ in store.environments()}
    if key not in known:
        raise click.ClickException(
            f"--environment: {key!r} is unknown; give one of {', '.join(known) or 'none'}, as "
            "`jaxlwp cache list` shows"
        )
    return known[key]
