"""Before there are devices: when what runs in a step, how networks scale, what changes a plan.

A step: read `_engine` first (tasks, streams, links, events; it knows no network), then `_parts` and
`_prices` (which collectives a price is for), `_links` (which links they load), `_tasks` (the tasks
of a training step), `_step` (when they run, and what that says) and `_timeline` (as a trace).

Systems: `_scaling` (steps, memory and efficiency over numbers of hosts) and `_thresholds` (the link
rates and batches from which on another strategy is as good).
"""

from jaxlwp.simulate._engine import Event, Load, Span, Task, last_chain, one_by_one, run
from jaxlwp.simulate._scaling import Outcome, Point, Scaling, Workload, scaling
from jaxlwp.simulate._step import ResourceUse, StepSimulation, simulate_step
from jaxlwp.simulate._thresholds import Threshold, batch_threshold, link_threshold

__all__ = [
    "Event",
    "Load",
    "Outcome",
    "Point",
    "ResourceUse",
    "Scaling",
    "Span",
    "StepSimulation",
    "Task",
    "Threshold",
    "Workload",
    "batch_threshold",
    "last_chain",
    "link_threshold",
    "one_by_one",
    "run",
    "scaling",
    "simulate_step",
]
