"""The command `jaxlwp doctor`: what is here, and whether it does what it should."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import jax
from rich.table import Table

from jaxlwp._parallelize import parallelize
from jaxlwp._version import __version__
from jaxlwp.check import is_simulated
from jaxlwp.cli._faults import (
    NUM_DEVICES,
    TOLERANCE,
    difference,
    gradients,
    known_faults,
    spatial_arguments,
    spatial_loss,
)
from jaxlwp.cli._options import json_option
from jaxlwp.cli._shell import ExitCode, describe, progress_bars, show, write_json
from jaxlwp.devices import KIND, Rates, Store, environment_of, make_mesh, rates_key
from jaxlwp.report import num_bytes, render

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "rich", "click", "platformdirs")

Data = dict[str, Any]


@click.command()
@json_option("all of it")
@click.pass_context
def doctor(context: click.Context, json_file: Path | None) -> None:
    """Show versions, devices, mesh, cache and known faults of this JAX, tried on the spot.

    Ends with 1 if something that jaxlwp needs does not hold: its own numbers, its cache. Faults of
    JAX that it works around are shown, and are no reason.
    """
    with progress_bars() as progress:
        progress("looking at the devices", 0, 1)
        devices = jax.devices()
        mesh = make_mesh(devices)
        cache, problems = _cache(environment_of(devices), rates_key(mesh))
        progress("trying known faults", 0, 1)
        tried = _tried(devices)
        progress("trying known faults", 1, 1)
    if "problem" in tried:
        problems.append(tried["problem"])
    elif not tried["own_error"] <= TOLERANCE:
        problems.append(
            f"a plan split by rows differs from one device by {tried['own_error']:.2g}: do not "
            "train with it; report this, with the versions above"
        )
    found: Data = {
        "versions": _versions(),
        "devices": {
            "text": describe(devices),
            "platform": devices[0].platform,
            "simulated": is_simulated(devices),
            "processes": jax.process_count(),
            "memory_bytes": _memory_bytes(devices[0]),
        },
        "mesh": dict(mesh.shape),
        "cache": cache,
        "tried": tried,
        "problems": problems,
    }
    show(_text(found))
    write_json(json_file, json.dumps(found, indent=2))
    if problems:
        context.exit(ExitCode.DOES_NOT_HOLD)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jaxlwp": __version__}
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}


def _memory_bytes(device: Any) -> int | None:
    """What programs may take of a device, if it says so."""
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def _cache(environment: Any, key: str) -> tuple[Data, list[str]]:
    """What is measured and kept, and what is wrong with the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Store() as store:
            known = store.environments()
            rates = store.get(environment, KIND, key)
            path = store.path
    content = {
        "file": str(path),
        "environments": len(known),
        "measurements": sum(sum(kinds.values()) for _, kinds in known),
        "rates_of_this_mesh": None if rates is None else rates.date,
    }
    return content, [f"cache: {warning.message}" for warning in caught]


# --- what is tried -------------------------------------------------------------------------------


def _tried(devices: list[Any]) -> Data:
    """Known faults and jaxlwp's own numbers, on the devices or, if they are few, simulated ones."""
    if len(devices) >= NUM_DEVICES and jax.process_count() == 1:
        return {"on": describe(devices[:NUM_DEVICES]), **try_all()}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    script = "import json; from jaxlwp.cli._doctor import try_all; print(json.dumps(try_all()))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        return {"problem": f"known faults cannot be tried (exit code {done.returncode}): {last}"}
    tried: Data = json.loads(done.stdout.splitlines()[-1])
    return {"on": f"{NUM_DEVICES} simulated devices", **tried}


def try_all() -> Data:
    """On the first devices of this process."""
    devices = jax.devices()[:NUM_DEVICES]
    arguments = spatial_arguments()
    plan = parallelize(
        spatial_loss,
        *arguments,
        devices=devices,
        strategy="spatial",
        rates=Rates(flops_per_s=1e12, memory_bytes_per_s=1e11),
    )
    pairs = zip(gradients(plan, arguments), gradients(spatial_loss, arguments), strict=True)
    faults = [
        {**dataclasses.asdict(fault), "present": fault.present} for fault in known_faults(devices)
    ]
    return {"own_error": max(difference(a, b) for a, b in pairs), "faults": faults}


# --- what is shown -------------------------------------------------------------------------------


def _text(found: Data) -> str:
    table = Table(title="jaxlwp doctor", title_justify="left", show_header=False)
    devices, cache, tried = found["devices"], found["cache"], found["tried"]
    memory = devices["memory_bytes"]
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    table.add_row(
        "devices",
        f"{devices['text']}, platform {devices['platform']}, {devices['processes']} process(es)"
        + (f", {num_bytes(memory)} each" if memory else ""),
    )
    table.add_row("mesh", " x ".join(f"{name}={size}" for name, size in found["mesh"].items()))
    rates = cache["rates_of_this_mesh"]
    table.add_row(
        "cache",
        f"{cache['file']}: {cache['measurements']:,} measurements of {cache['environments']} "
        "environments; rates of this mesh: "
        + (f"measured {rates}" if rates else "not yet, the first plan takes 30 to 60 s for them"),
    )
    for fault in tried.get("faults", ()):
        there = f"wrong in this JAX, by {fault['error']:.2g}" if fault["present"] else "right"
        concerned = f"; it concerns {fault['concerns']}" if fault["present"] else ""
        table.add_row("JAX alone", f"{fault['name']}: {there}{concerned}")
    if "own_error" in tried:
        right = tried["own_error"] <= TOLERANCE
        table.add_row(
            "jaxlwp",
            f"a convolution and a max pool split by rows, gradients beside one device's: "
            f"{'right' if right else 'WRONG'}, to {tried['own_error']:.2g}; on {tried['on']}",
        )
    verdict = "; ".join(found["problems"]) or "all that jaxlwp needs holds"
    return f"{render(table, width=100)}\n{verdict}"
