"""The function on one device's blocks.

Read `_steps` first: the program of one device as data, collectives among its steps. `_build` makes
them of a strategy, `_sharing` lets what several of them receive be received once, `_joined` puts
small sums together, `_lower` carries the steps out. `_halo` is the geometry of halo exchanges along
one dimension, `_haloed` puts together what they bring along several, `_padding` says what padding
holds, `_filters` which gradients are vectors, `_reshard` moves blocks.
"""

from jaxlwp.lower._build import build, build_layer, read_elsewhere
from jaxlwp.lower._filters import filter_kind
from jaxlwp.lower._halo import plan_halo
from jaxlwp.lower._lower import (
    LAYER_SCOPE,
    Lowered,
    Made,
    carry_out,
    layer_index,
    run,
    step_groups,
)
from jaxlwp.lower._steps import (
    AddUp,
    Again,
    Block,
    Change,
    DeviceProgram,
    Items,
    Op,
    Operate,
    Receive,
    Region,
    Step,
    Vary,
    every_step,
)

__all__ = [
    "AddUp",
    "Again",
    "Block",
    "Change",
    "DeviceProgram",
    "Items",
    "LAYER_SCOPE",
    "Lowered",
    "Made",
    "Op",
    "Operate",
    "Receive",
    "Region",
    "Step",
    "Vary",
    "build",
    "build_layer",
    "carry_out",
    "every_step",
    "filter_kind",
    "layer_index",
    "plan_halo",
    "read_elsewhere",
    "run",
    "step_groups",
]
