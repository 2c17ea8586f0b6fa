"""A step before there are devices: what runs when, from prices alone.

Read `_engine` first (tasks, resources, events; it knows no network), then `_parts` and `_prices`
(which collectives a price is for), `_links` (which links they keep busy), `_tasks` (the tasks of a
training step) and `_step` (their timeline, and what it says).
"""

from jaxlwp.simulate._engine import Event, Resource, Task, last_chain, one_by_one, run
from jaxlwp.simulate._step import ResourceUse, StepSimulation, simulate_step

__all__ = [
    "Event",
    "Resource",
    "ResourceUse",
    "StepSimulation",
    "Task",
    "last_chain",
    "one_by_one",
    "run",
    "simulate_step",
]
