"""Evaluation beside training: parameters stay as the training plan stores them."""

from __future__ import annotations

import dataclasses

from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import ComputationGraph
from jaxlwp.plan._plan import Plan
from jaxlwp.space import Constraints


def kept_in_place(
    graph: ComputationGraph, constraints: Constraints | None, training: Plan
) -> Constraints:
    """The constraints, and that no layer moves a parameter from where another plan stores it.

    Args:
      graph: of the function that is evaluated.
      constraints: the user's own.
      training: the plan that stores the parameters.

    Raises:
      ValueError: the parameters differ from the plan's in a name or a shape.
    """
    known = {
        name: (training.graph.program.values[value].shape, layout)
        for name, value, layout in zip(
            training.graph.argument_names[: training.graph.num_parameters],
            training.graph.program.inputs,
            training.lowered.input_layouts(),
            strict=False,
        )
    }
    stored = {}
    names = graph.argument_names[: graph.num_parameters]
    for name, value in zip(names, graph.program.inputs, strict=False):
        shape = graph.program.values[value].shape
        if name not in known or known[name][0] != shape:
            have = f"of shape {list(known[name][0])}" if name in known else "not there"
            raise ValueError(
                f"params_as: {name} is of shape {list(shape)}, and in the plan given {have}; give "
                "the parameters that the plan was made for"
            )
        stored[name] = known[name][1]
    constraints = constraints or Constraints()
    return dataclasses.replace(constraints, stored={**constraints.stored, **stored})


def check_beside(training: Plan, train: bool, given: DeviceGraph | None = None) -> None:
    """Check that a plan may be made beside another one.

    Args:
      training: the plan given.
      train: whether the new plan trains.
      given: the devices of the new plan, if they are known yet.

    Raises:
      ValueError: it trains, or it is for another mesh.
    """
    if train:
        raise ValueError(
            "params_as: given for a plan that trains, which stores parameters as is best for it; "
            "give train=False, or leave it out"
        )
    if given is not None and given.axis_sizes != training.space.devices.axis_sizes:
        raise ValueError(
            f"params_as: its plan is for mesh axes {training.space.devices.axis_sizes}, the new "
            f"one for {given.axis_sizes}; leave out mesh and devices: the plan's mesh is taken"
        )
