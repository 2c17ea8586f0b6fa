"""Meshes: the only module that sets those of JAX.

Programs are traced for a mesh of devices that need not exist (`trace_on_blocks`), or for no mesh at
all (`no_mesh`), whatever mesh the user has set around the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlwp.mesh._collectives import Axes

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or of axes alone: what is planned for devices that are not there."""


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """Context in which no mesh is set: what is traced in it can be evaluated on any mesh."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def partition_spec(layout: Sequence[Axes]) -> PartitionSpec:
    """The PartitionSpec of a layout."""
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in layout]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


@dataclass(frozen=True, kw_only=True)
class OnBlocks:
    """What one device evaluates.

    Attributes:
      jaxpr: the closed jaxpr on blocks.
      positions: for each of its inputs that stands for an argument, the argument's position.
      constants: for each other input the constant that it stands for.
    """

    jaxpr: Any
    positions: dict[int, int]
    constants: dict[int, Any]


def trace_on_blocks(
    function: Callable[..., Any],
    arguments: Sequence[jax.ShapeDtypeStruct],
    in_layouts: Sequence[Sequence[Axes]],
    out_layouts: Sequence[Sequence[Axes]],
    axis_sizes: Mapping[str, int],
) -> OnBlocks:
    """Trace what one device of a mesh evaluates; the devices need not exist.

    Args:
      function: called with blocks inside `jax.shard_map`; returns blocks.
      arguments: global shapes and dtypes; every split dimension must divide.
      in_layouts: layout of each argument.
      out_layouts: layout of each result.
      axis_sizes: devices along each mesh axis.
    """
    mapped = jax.shard_map(
        function,
        mesh=abstract_mesh(axis_sizes),
        in_specs=tuple(map(partition_spec, in_layouts)),
        out_specs=tuple(map(partition_spec, out_layouts)),
    )
    with no_mesh():
        traced = jax.make_jaxpr(mapped)(*arguments)
    (eqn,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "shard_map")
    places = {var: n for n, var in enumerate(traced.jaxpr.invars)}
    consts = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    positions: dict[int, int] = {}
    constants: dict[int, Any] = {}
    for n, atom in enumerate(eqn.invars):
        if isinstance(atom, jex_core.Literal):
            constants[n] = atom.val
        elif atom in places:
            positions[n] = places[atom]
        else:
            constants[n] = consts[atom]
    body = eqn.params["jaxpr"]
    jaxpr = jex_core.ClosedJaxpr(getattr(body, "jaxpr", body), ())
    return OnBlocks(jaxpr=jaxpr, positions=positions, constants=constants)


def auto_mesh(devices: Any, names: Sequence[str]) -> Mesh:
    """A mesh with Auto axes, whatever this version of JAX makes by default.

    Args:
      devices: array of devices, one dimension for each axis.
      names: of the axes.
    """
    grid = np.array(devices, dtype=object)
    return Mesh(grid, tuple(names), axis_types=(AxisType.Auto,) * grid.ndim)


def abstract_mesh(axis_sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of axes alone, all of them Auto."""
    sizes = tuple(axis_sizes.values())
    return AbstractMesh(sizes, tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(sizes))


def need_devices(where: str, mesh: AnyMesh) -> Mesh:
    """The mesh, which must have devices.

    Raises:
      ValueError: it has axes alone.
    """
    if isinstance(mesh, Mesh):
        return mesh
    raise ValueError(
        f"{where}: the plan is for {mesh.size} devices that are not here, so that nothing can run "
        "on them; plan for devices at hand (parallelize(..., strategy=plan.strategy) runs the same "
        "strategy on a mesh of the same axes), or compile for a target that need not be there, as "
        'in mesh=jaxlwp.target_mesh("h200:8")'
    )


def is_first_process() -> bool:
    """Whether this process is the one that writes files: the first, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def set_mesh_or_none() -> Mesh | None:
    """The mesh that the user has set (`jax.set_mesh`), if there is one."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Context in which programs for `mesh` run, whatever mesh the user has set."""
    # Not set without need: a plan may be made while a step is traced, where JAX forbids it.
    with contextlib.nullcontext() if set_mesh_or_none() is None else jax.set_mesh(mesh):
        yield


def check_set_mesh(where: str, mesh: Mesh) -> None:
    """Check that a program for `mesh` can run where it is called.

    Raises:
      ValueError: another mesh is set.
    """
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and current != mesh.abstract_mesh:
        raise ValueError(
            f"{where}: it is for the mesh {_mesh_text(mesh)}, but {_mesh_text(current)} is set "
            "(jax.set_mesh); call it outside of that, or set its mesh"
        )


def _mesh_text(mesh: AnyMesh) -> str:
    types = {str(kind) for kind in mesh.axis_types}
    return f"{dict(mesh.shape)} ({', '.join(sorted(types))})"


def placed(x: Any, sharding: NamedSharding) -> Any:
    """The array as `jax.shard_map` wants it.

    With Auto axes that is any array; where axes are Explicit, shardings are part of types.
    """
    mesh = sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, sharding)
