"""Systems that are not at hand: how a network scales over them, and what would change the plan.

Read `_scaling` first (steps, memory and efficiency over numbers of hosts), then `_thresholds` (the
link rates and batches from which on another strategy is as good).
"""

from jaxlwp.simulate._scaling import Outcome, Point, Scaling, Workload, scaling
from jaxlwp.simulate._thresholds import Threshold, batch_threshold, link_threshold

__all__ = [
    "Outcome",
    "Point",
    "Scaling",
    "Threshold",
    "Workload",
    "batch_threshold",
    "link_threshold",
    "scaling",
]
