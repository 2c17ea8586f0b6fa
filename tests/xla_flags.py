"""XLA's flags for tests on simulated devices: how many, and machine code that is quick to make.

Nearly all time of the tests is XLA's. These flags leave all of its passes over the program in place
and make the machine code cheap: two to four times faster to compile. Names come and go between
versions, and XLA ends a process that is given one that it does not know. So a process tries them
first; its children and those of `pytest -n` are told by the environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""Options of `jax.jit` that undo the flags."""

_KNOWN = "JAXLWP_TEST_XLA_FLAGS"
_COUNT = "--xla_force_host_platform_device_count"


def known_flags() -> tuple[str, ...]:
    """Those of the fast flags that the XLA of this environment has."""
    if _KNOWN not in os.environ:
        known = FAST if _works(FAST) else tuple(flag for flag in FAST if _works([flag]))
        os.environ[_KNOWN] = " ".join(known)
    return tuple(os.environ[_KNOWN].split())


def _works(flags: tuple[str, ...] | list[str]) -> bool:
    settings = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, check=False)
    return done.returncode == 0


def simulated(count: int, given: str = "", *, fast: bool = True) -> str:
    """XLA_FLAGS for simulated devices.

    Args:
      count: of devices.
      given: flags to keep; a count among them is left out.
      fast: whether to compile fast.
    """
    others = re.sub(rf"{_COUNT}=\S*", "", given).split()
    added = [flag for flag in known_flags() if flag not in others] if fast else []
    return " ".join([*others, *added, f"{_COUNT}={count}"])
