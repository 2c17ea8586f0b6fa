"""One part of `tests.benchmarks.gpu_check`, in a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from jaxlwp.devices import System, preset
from tests.benchmarks.gpu_check import SHARES, read, write

RESERVE_S = 3.0
"""Left of a part's time for what is running when it should end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What a part is given.

    Attributes:
      name: of the part.
      out: the JSON file.
      until: when the part is ended, in seconds since the epoch.
      system: one GPU, with the figures that forecasts are with.
      small: tiny sizes.
    """

    name: str
    out: Path
    until: float
    system: System
    small: bool

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.until - RESERVE_S - time.time()

    @property
    def device(self) -> Any:
        """The device that all runs on."""
        return jax.devices()[0]

    def write(self, rows: Any) -> None:
        """Put the part's rows, all that there are so far, into the file."""
        write(self.out, read(self.out) | {self.name: rows})

    def read(self, name: str) -> Any:
        """What another part has left; None if nothing."""
        return read(self.out).get(name)

    def say(self, text: str) -> None:
        """Print a line of the report."""
        print(f"  {text}", flush=True)


def describe(part: Part) -> dict[str, Any]:
    """The device, as far as it tells."""
    try:
        stats = part.device.memory_stats() or {}
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError):
        stats = {}
    return {
        "kind": part.device.device_kind,
        "platform": part.device.platform,
        "count": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
    }


def main(arguments: list[str]) -> int:
    """Run a part; what it has written stays, whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(SHARES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    part = Part(
        name=given.name,
        out=given.out,
        until=given.until,
        system=preset(given.system, gpus=1),
        small=given.small,
    )
    write(part.out, read(part.out) | {"device": describe(part)})
    importlib.import_module(f"tests.benchmarks.on_gpu.{part.name}").run(part)
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A compilation that nobody waits for any more would be waited for by the interpreter.
    os._exit(status)
