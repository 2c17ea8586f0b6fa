"""The command `jaxlwp cache`: measurements on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.table import Table

from jaxlwp.cli._options import json_option, target_file
from jaxlwp.cli._shell import Shell, notice, show, write_json
from jaxlwp.devices import Environment, Store
from jaxlwp.report import render


@click.group(cls=Shell)
def cache() -> None:
    """Show, move and clear what was measured."""


@cache.command("list")
@json_option("the list")
def cache_list(json_file: Path | None) -> None:
    """What was measured, and where it is kept."""
    with Store() as store:
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
    show(render(table))
    content = {
        "file": str(path),
        "environments": [
            {"key": each.key, **dataclasses.asdict(each), "measured": kinds}
            for each, kinds in known
        ],
    }
    write_json(json_file, json.dumps(content, indent=2))


_COUNT = json_option("how many measurements these were")
_ENVIRONMENT = click.option(
    "--environment", help="One environment only, by its key in `jaxlwp cache list`."
)


@cache.command("export")
@click.argument("file", type=click.Path(path_type=Path), callback=target_file)
@_ENVIRONMENT
@_COUNT
def cache_export(file: Path, environment: str | None, json_file: Path | None) -> None:
    """Write measurements to FILE, to plan on another machine (`jaxlwp plan --profile FILE`)."""
    with Store() as store:
        count = store.export(file, _chosen_environment(store, environment))
    _counted(f"wrote {count:,} measurements to {file}", count, json_file)


@cache.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@_COUNT
def cache_import(file: Path, json_file: Path | None) -> None:
    """Add the measurements in FILE; of two for the same thing the newer one stays."""
    with Store() as store:
        count = store.import_file(file)
    _counted(f"added {count:,} measurements", count, json_file)


@cache.command("clear")
@_ENVIRONMENT
@click.option("--kind", type=click.Choice(["layer", "rates"]), help="One kind only.")
@_COUNT
def cache_clear(environment: str | None, kind: str | None, json_file: Path | None) -> None:
    """Drop measurements, to take them again."""
    with Store() as store:
        count = store.forget(_chosen_environment(store, environment), kind)
    _counted(f"dropped {count:,} measurements", count, json_file)


def _counted(text: str, count: int, json_file: Path | None) -> None:
    notice(text)
    write_json(json_file, json.dumps({"measurements": count}))


def _chosen_environment(store: Store, key: str | None) -> Environment | None:
    if key is None:
        return None
    known = {environment.key: environment for environment, _ in store.environments()}
    if key not in known:
        raise click.ClickException(
            f"--environment: {key!r} is unknown; `jaxlwp cache list` shows those that there are: "
            f"{', '.join(known) or 'none'}"
        )
    return known[key]
