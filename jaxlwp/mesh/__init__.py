"""JAX's collectives and meshes: the only folder that calls or sets them.

Collectives here count devices in the order in which they are given mesh axes, whatever the order of
the mesh. Functions are traced with no mesh set, and run on the mesh that a plan is bound to.
"""

from jaxlwp.mesh._collectives import (
    all_gather,
    all_reduce,
    all_reduce_max,
    all_reduce_min,
    all_reduce_together,
    all_to_all,
    device_index,
    permute,
    put_together,
    reduce_scatter,
    taken_apart,
    vary,
)
from jaxlwp.mesh._meshes import (
    AnyMesh,
    OnBlocks,
    abstract_mesh,
    auto_mesh,
    check_set_mesh,
    is_first_process,
    need_devices,
    no_mesh,
    on_mesh,
    partition_spec,
    placed,
    set_mesh_or_none,
    trace_on_blocks,
)

__all__ = [
    "AnyMesh",
    "OnBlocks",
    "abstract_mesh",
    "all_gather",
    "all_reduce",
    "all_reduce_max",
    "all_reduce_min",
    "all_reduce_together",
    "all_to_all",
    "auto_mesh",
    "check_set_mesh",
    "device_index",
    "is_first_process",
    "need_devices",
    "no_mesh",
    "on_mesh",
    "partition_spec",
    "permute",
    "placed",
    "put_together",
    "reduce_scatter",
    "set_mesh_or_none",
    "trace_on_blocks",
    "taken_apart",
    "vary",
]
