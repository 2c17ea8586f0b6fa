"""What one session on a GPU machine is for: `make gpu-check`, unattended, in under 8 minutes.

On the first GPU, one after the other, in the order of their importance:

1. correctness: plans of small networks against the plain function, loss and gradients;
2. ceilings: memory, arithmetic and the start of a kernel, fitted to the fields of
   `jaxlwp.devices.Gpu` and set beside those of the preset;
3. steps: whole training steps of plain JAX and of ours in turns, and beside each its forecast;
4. layers: layer times of the local shapes of AlexNet, VGG-16, ResNet-50 and Inception-v3 on 8
   devices, until the time is up, and the profile (`jaxlwp.load_profile`) that they make.

Each part is a process of its own with a share of the time, ended when that is over: a part that
fails, hangs or takes the GPU down costs no other. Time that a part leaves goes to those behind it.
All leave one JSON file, written anew after every row.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu-check.json"
SHARES = {"correctness": 60.0, "ceilings": 95.0, "steps": 210.0, "layers": 75.0}
"""Part -> seconds of the 7.4 minutes that it should have; they keep their proportions."""

PACKAGES = ("jaxlwp", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax")
DRIVER = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = map(str.strip, out.splitlines()[0].split(",")) if out.strip() else ()
    return dict(zip(DRIVER.split(","), values, strict=False))


def versions() -> dict[str, str]:
    """Versions of what is installed of `PACKAGES`; jaxlwp may be run from its folder."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """The file as it is."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def run_part(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; how it went."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.benchmarks.on_gpu.part", name, "--out", options.out]
    command += ["--until", f"{time.time() + seconds:.1f}", "--system", options.system]
    log = options.out.with_name(f"{options.out.name}.{name}.log")
    with log.open("w+") as stream:
        child = subprocess.Popen(
            list(map(str, [*command, *(["--small"] if options.small else [])])),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        stream.seek(0)
        text = stream.read()
    log.unlink()
    state = "cut off" if code is None else f"failed ({code})" if code else "done"
    print(f"{name}: {state} after {time.monotonic() - start:.0f} of {seconds:.0f} s", flush=True)
    print(text[-3000:] if code else _told(text), flush=True)
    result = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    return result | ({} if code == 0 else {"log": text[-3000:]})


def _told(text: str) -> str:
    """What the part itself printed, without what libraries log."""
    return "\n".join(line for line in text.splitlines() if line.startswith("  "))


def main(arguments: list[str]) -> int:
    """Run the parts; 1 if numbers are wrong or a part did not run to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.4, help="for all parts")
    parser.add_argument("--parts", nargs="*", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--system", default="h200", help="preset that forecasts are with")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it without a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.uname().machine}, {os.cpu_count()} cores",
        "driver": driver(),
        "versions": versions() | {"python": sys.version.split()[0]},
        "system": options.system,
        "small": options.small,
        "parts": {},
    }
    write(options.out, content)
    for number, name in enumerate(options.parts):
        left_s = end - time.monotonic()
        of_s = sum(SHARES[other] for other in options.parts[number:])
        result = run_part(name, max(left_s, 1.0) * SHARES[name] / of_s, options)
        content = read(options.out)
        content["parts"][name] = result
        write(options.out, content)
    wrong = [row for row in content.get("correctness", ()) if not row["passed"]]
    return int(bool(wrong) or any(p["state"] != "done" for p in content["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
