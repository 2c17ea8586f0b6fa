"""Several processes that make one plan: what one has measured, all must use.

Every process traces, prices and searches on its own. They end with the same plan because they start
with the same numbers: those of the first process.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices of a mesh belong to several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def local_devices(mesh: Mesh) -> list[Any]:
    """The mesh's devices that this process can run programs on."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


@jax.ensure_compile_time_eval()  # a plan may be made while a training step is traced
def from_first(value: Any) -> Any:
    """The first process's value, in every process; every process must call this.

    Args:
      value: plain JSON data; only the first process's counts.
    """
    mine = json.dumps(value).encode()
    (length,) = multihost_utils.broadcast_one_to_all(np.array([len(mine)], np.int32))
    padded = np.zeros(int(length), np.uint8)
    known = np.frombuffer(mine, np.uint8)[: int(length)]
    padded[: len(known)] = known
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
