"""Compiling a plan for GPUs that are not there.

XLA needs no GPU to compile for one: a description of the device is enough. The result cannot run,
but it tells what the program would communicate and how much memory it would take on the cluster,
before anybody pays for it.

The optional extra `gpu-aot` brings the compiler (no driver and no NVIDIA library is needed). JAX's
plugin for CUDA 13 knows H200, H100 and A100; the one for CUDA 12, which cannot be installed beside
it, P100 and V100 (`gpu-aot-cuda12`). On a machine without a GPU, the plugin needs
`JAX_PLATFORMS=cpu`, or JAX looks for one when it starts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxlwp.check._hlo import CompiledCollective, bytes_by_kind, compiled_collectives
from jaxlwp.devices import System, make_mesh
from jaxlwp.memory import Memory
from jaxlwp.mesh import AnyMesh, auto_mesh
from jaxlwp.plan import (
    OPTIMIZER,
    Plan,
    ProgramMemory,
    lower_step,
    plan_memory,
    program_memory,
    state_shapes,
)

GPUS = {
    "h200": ("h200", 13),
    "h100": ("h100_sxm", 13),
    "a100": ("a100_sxm_80", 13),
    "v100": ("v100", 12),
    "p100": ("p100", 12),
}
"""GPU -> (file of its description, version of CUDA whose plugin compiles for it)."""

EXTRAS = {13: "gpu-aot", 12: "gpu-aot-cuda12"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """GPUs to compile for.

    Attributes:
      gpu: one of `GPUS`.
      hosts: how many machines.
      gpus_per_host: GPUs in each.
    """

    gpu: str
    hosts: int = 1
    gpus_per_host: int = 1

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "h200:16" (one host) or "h200:2x8" (two hosts with eight each).

        Raises:
          ValueError: not of that form, or an unknown GPU.
        """
        found = re.fullmatch(r"(\w+):(?:([1-9]\d*)x)?([1-9]\d*)", text.lower(), re.ASCII)
        if found is None or found[1] not in GPUS:
            raise ValueError(
                f"target: {text!r} is not GPU:COUNT or GPU:HOSTSxCOUNT with a GPU of "
                f"{', '.join(GPUS)}; write it as in h200:16 or h200:2x8"
            )
        return cls(gpu=found[1], hosts=int(found[2] or 1), gpus_per_host=int(found[3]))

    @classmethod
    def of(cls, system: System) -> Target:
        """The GPUs of a system.

        Raises:
          ValueError: they are none that can be compiled for.
        """
        gpu = system.gpu.name.partition("-")[0].lower()
        if gpu not in GPUS:
            raise ValueError(
                f"system {system.name}: its GPU {system.gpu.name} is none that can be compiled "
                f"for, of {', '.join(GPUS)}; plan without a check by compiling"
            )
        return cls(gpu=gpu, hosts=system.num_hosts, gpus_per_host=system.inside.devices)

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.hosts * self.gpus_per_host

    def __str__(self) -> str:
        """As `parse` reads it."""
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        return f"{self.gpu}:{hosts}{self.gpus_per_host}"


@dataclass(frozen=True, kw_only=True)
class TargetStep:
    """A training step compiled for a target: predicted, and what the compiler made of it.

    Attributes:
      target: what it was compiled for.
      strategy: name of the plan's strategy.
      predicted_bytes_by_kind: operand bytes per device of its collectives, as predicted.
      collectives: those of the compiled program.
      predicted_memory: bytes per device, as predicted.
      memory: the compiler's account; what cuDNN needs as workspace is not in it.
      text: the compiled program.
    """

    target: Target
    strategy: str
    predicted_bytes_by_kind: dict[str, int]
    collectives: tuple[CompiledCollective, ...] = field(repr=False)
    predicted_memory: Memory
    memory: ProgramMemory
    text: str = field(repr=False)

    @property
    def compiled_bytes_by_kind(self) -> dict[str, int]:
        """Operand bytes per device of the compiled program's collectives."""
        return bytes_by_kind(self.collectives)

    @property
    def memory_error(self) -> float:
        """Predicted memory relative to the compiler's account, less one."""
        return self.predicted_memory.peak_bytes / self.memory.reserved_bytes - 1


def target_mesh(target: str | Target) -> Mesh:
    """A mesh of GPUs that need not exist, its axes of prime size, hosts first.

    Plans on it are made, printed and compiled like others, with rates given by hand; only running
    them needs the devices.

    Args:
      target: as in "h200:16" or "h200:2x8".

    Raises:
      ValueError: the target is unknown.
      RuntimeError: the compiler for it is not installed.
    """
    return make_mesh(_devices(_resolved(target)))


def mesh_like(mesh: AnyMesh, target: Target) -> Mesh:
    """A mesh of the same axes, of a target's GPUs.

    Raises:
      RuntimeError: the compiler for the target is not installed.
    """
    devices = np.array(_devices(target), dtype=object).reshape(mesh.axis_sizes)
    return auto_mesh(devices, mesh.axis_names)


def compile_for(
    plan: Plan,
    target: str | Target,
    *,
    optimizer: optax.GradientTransformation = OPTIMIZER,
) -> TargetStep:
    """Compile a plan's training step for GPUs that need not exist.

    Args:
      plan: the plan, on any mesh of as many devices.
      target: as in "h200:16" or "h200:2x8".
      optimizer: of the training step; SGD with momentum by default.

    Returns:
      What the compiled program communicates and the memory that it takes, beside the prediction.

    Raises:
      ValueError: the target is unknown, or has another number of devices than the plan.
      RuntimeError: the compiler for it is not installed.
    """
    target = _resolved(target)
    if target.num_devices != plan.mesh.size:
        raise ValueError(
            f"compile_for: the plan is for {plan.mesh.size} devices, {target} has "
            f"{target.num_devices}; plan for as many: parallelize(..., mesh=target_mesh("
            f"{str(target)!r}), rates=...)"
        )
    plan = dataclasses.replace(plan, mesh=mesh_like(plan.mesh, target))
    state, batch = state_shapes(plan, optimizer), plan.batch_shapes
    program = compiled(lower_step(plan, state, batch, optimizer), target)
    text = program.as_text()
    predicted: dict[str, int] = {}
    for collective in plan.collectives:
        predicted[collective.kind] = predicted.get(collective.kind, 0) + collective.num_bytes
    return TargetStep(
        target=target,
        strategy=plan.strategy.name,
        predicted_bytes_by_kind=predicted,
        collectives=compiled_collectives(text),
        predicted_memory=plan_memory(plan, optimizer),
        memory=program_memory(program, "gpu"),
        text=text,
    )


def _resolved(target: str | Target) -> Target:
    return Target.parse(target) if isinstance(target, str) else target


@functools.lru_cache(maxsize=8)
def _devices(target: Target) -> tuple[Any, ...]:
    """The target's GPUs, as JAX describes devices that are not there."""
    name, cuda = GPUS[target.gpu]
    if importlib.util.find_spec("jax_plugins") is None or (
        importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}") is None
    ):
        raise _missing(target)
    config = (
        importlib.resources.files("jaxlwp.check").joinpath("gpu_specs", f"{name}.txtpb").read_text()
    )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=config,
            topology=f"1x{target.hosts}x{target.gpus_per_host}",
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f"target {target}: JAX looked for GPUs of this machine and found none, so its plugin "
            "is not there to compile either; set JAX_PLATFORMS=cpu before JAX is first imported"
        ) from error
    return tuple(topology.devices)


def compiled(lowered: Any, target: Target | None = None) -> Any:
    """A lowered program, compiled for its devices.

    Raises:
      RuntimeError: the compiler for the target is not installed.
      jax.errors.JaxRuntimeError: it refuses the program.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if target is not None and re.search(r"ptxas|libdevice|nvvm|nvlink", str(error)):
            raise _missing(target) from error
        raise


def first_line(error: Exception) -> str:
    """What a compiler says, without the places in it."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def _missing(target: Target) -> RuntimeError:
    cuda = GPUS[target.gpu][1]
    other = EXTRAS[25 - cuda]
    return RuntimeError(
        f"target {target}: its compiler, JAX's plugin for CUDA {cuda} with NVIDIA's assembler, is "
        f"not installed; run: pip install 'jaxlwp[{EXTRAS[cuda]}]' (in an environment without "
        f"{other}: the plugins do not go together)"
    )
