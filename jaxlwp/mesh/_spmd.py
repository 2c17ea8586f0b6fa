"""One program on many devices: the only module that calls JAX's collectives and sets its meshes.

*The order of mesh axes.* Several axes named together, as in ("data", "model"), number the devices
along them; the first is the major one. Layouts, configs and halo exchanges count in the order in
which they name the axes, which need not be the order of the mesh. JAX's gathers, scatters,
all-to-alls, `axis_index` and PartitionSpecs count in the order given; `ppermute` alone counts in
the order of the mesh, whatever is given (from JAX 0.12 on it refuses any other). `permute` takes
pairs in the order given. All other modules call what is here, so none relies on an order of its
own (`tests/test_architecture.py` holds them to it).

*Meshes.* Programs are traced for a mesh of devices that need not exist (`trace_on_blocks`), or for
no mesh at all (`no_mesh`), whatever mesh the user has set around the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex_core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
"""Mesh axes, major to minor."""


# --- collectives, inside `jax.shard_map` --------------------------------------------------------


def device_index(axes: Axes) -> Any:
    """Number of this device along the axes; 0 for no axes."""
    return lax.axis_index(axes) if axes else 0


def vary(x: Any, axes: Iterable[str]) -> Any:
    """Mark a replicated value as varying over the axes; its cotangent is summed over them."""
    axes = tuple(axes)
    return lax.pcast(x, axes, to="varying") if axes else x


def all_reduce(x: Any, axes: Axes) -> Any:
    """Sum over the devices along the axes."""
    return lax.psum(x, axes)


def all_reduce_max(x: Any, axes: Axes) -> Any:
    """Maximum over the devices along the axes."""
    return lax.pmax(x, axes)


def all_reduce_min(x: Any, axes: Axes) -> Any:
    """Minimum over the devices along the axes."""
    return lax.pmin(x, axes)


def all_gather(x: Any, axes: Axes, dim: int, *, varying: bool) -> Any:
    """Blocks of a dimension put together in the order of the devices along the axes.

    Args:
      x: this device's block.
      axes: mesh axes that split the dimension.
      dim: the dimension.
      varying: the result is used differently by each device, so its transpose is a reduce-scatter;
        otherwise it is to take one's own block.
    """
    return lax.all_gather(x, axes, axis=dim, tiled=True, to="varying" if varying else "invarying")


def reduce_scatter(x: Any, axes: Axes, dim: int) -> Any:
    """This device's block, along a dimension, of the sum over the devices along the axes."""
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def all_to_all(x: Any, axes: Axes, *, split_dim: int, concat_dim: int) -> Any:
    """Split `split_dim` among the devices along the axes, and put `concat_dim` together."""
    return lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True)


def permute(x: Any, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Any:
    """Send blocks among devices; who receives nothing has zeros.

    Args:
      x: this device's block.
      axes: mesh axes along which devices are counted, major to minor.
      pairs: (sender, receiver), numbers of devices along `axes` in the order given.
    """
    sizes = dict(zip(*_mesh_axes(), strict=True))
    in_mesh_order = tuple(name for name in sizes if name in axes)
    if in_mesh_order != axes:
        shape = [sizes[name] for name in axes]
        places = [axes.index(name) for name in in_mesh_order]

        def renumbered(device: int) -> int:
            coordinates = _coordinates(device, shape)
            return _number([coordinates[p] for p in places], [shape[p] for p in places])

        pairs = [(renumbered(sender), renumbered(receiver)) for sender, receiver in pairs]
    return lax.ppermute(x, in_mesh_order, pairs)


def _mesh_axes() -> tuple[tuple[str, ...], tuple[int, ...]]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(mesh.axis_names), tuple(mesh.axis_sizes)


def _coordinates(device: int, shape: Sequence[int]) -> list[int]:
    """Position of a device along each axis, from its number."""
    result = []
    for size in reversed(shape):
        device, position = divmod(device, size)
        result.append(position)
    return result[::-1]


def _number(coordinates: Sequence[int], shape: Sequence[int]) -> int:
    result = 0
    for position, size in zip(coordinates, shape, strict=True):
        result = result * size + position
    return result


# --- meshes -------------------------------------------------------------------------------------


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
    sizes = tuple(axis_sizes.values())
    mesh = AbstractMesh(sizes, tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(sizes))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
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


def _mesh_text(mesh: Mesh | AbstractMesh) -> str:
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
