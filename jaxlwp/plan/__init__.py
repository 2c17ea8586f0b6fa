"""A strategy bound to a mesh, called like the function that it was made from.

Read `_plan` first, then `_planning` (all steps in one) and `_step` (a training step as one
program).
"""

from jaxlwp.plan._plan import (
    OPTIMIZER,
    Plan,
    baselines,
    bind,
    place_arguments,
    plan_memory,
    with_strategy,
)
from jaxlwp.plan._planning import MEMORY_MARGIN, plan_for
from jaxlwp.plan._step import (
    ProgramMemory,
    initial_state,
    lower_step,
    program_memory,
    state_shapes,
)

__all__ = [
    "MEMORY_MARGIN",
    "OPTIMIZER",
    "Plan",
    "ProgramMemory",
    "baselines",
    "bind",
    "initial_state",
    "lower_step",
    "place_arguments",
    "plan_for",
    "plan_memory",
    "program_memory",
    "state_shapes",
    "with_strategy",
]
