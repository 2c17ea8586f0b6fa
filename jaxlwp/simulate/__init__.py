"""A step before there are devices: what runs when, from prices alone.

Read `_engine` first (tasks, streams, links, events; it knows no network), then `_parts` and
`_prices` (which collectives a price is for), `_links` (which links they load), `_tasks` (the tasks
of a training step), `_step` (when they run, and what that says) and `_timeline` (as a trace).
"""

from jaxlwp.simulate._engine import Event, Load, Span, Task, last_chain, one_by_one, run
from jaxlwp.simulate._step import ResourceUse, StepSimulation, simulate_step

__all__ = [
    "Event",
    "Load",
    "ResourceUse",
    "Span",
    "StepSimulation",
    "Task",
    "last_chain",
    "one_by_one",
    "run",
    "simulate_step",
]
