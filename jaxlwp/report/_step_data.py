"""A simulated step as plain data, for the timeline of a plan's page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from jaxlwp.simulate import StepSimulation, simulate_step

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

STREAMS = ("compute", "communication")
"""Rows of the timeline: kernels of a device, and its collectives."""


def step_data(plan: Plan) -> dict[str, Any] | None:
    """What runs when in a step of a plan; None for a plan that is not allowed.

    Args:
      plan: the plan.

    Returns:
      "total" and "serial", seconds of the step and of its tasks one after the other; "causes",
      what tasks are for; "critical", seconds by cause of the chain that makes the step as long as
      it is; "events", each as [row, cause, layer, begin, length, bytes]: numbers of `STREAMS`, of
      "causes" and of the layer (-1 for none), microseconds, bytes that a device gives.
    """
    if not math.isfinite(plan.cost.total_s):
        return None
    step = simulate_step(plan)
    causes = list(dict.fromkeys(event.task.cause for event in step.events))
    return {
        "total": step.total_s,
        "serial": step.serial_s,
        "causes": causes,
        "critical": [[cause, seconds] for cause, seconds in step.critical_s.items()],
        "events": _events(step, causes),
    }


def _events(step: StepSimulation, causes: list[str]) -> list[list[Any]]:
    numbers = {cause: n for n, cause in enumerate(causes)}
    return [
        [
            int(event.task.stream != STREAMS[0]),
            numbers[event.task.cause],
            -1 if event.task.layer is None else event.task.layer,
            round(1e6 * event.begin_s, 3),
            round(1e6 * event.seconds, 3),
            event.task.num_bytes,
        ]
        for event in step.events
    ]
