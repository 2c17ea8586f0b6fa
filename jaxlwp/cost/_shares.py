"""The passes of a layer: prices and measurements give one time for forward and backward."""

from __future__ import annotations

from typing import NamedTuple

from jaxlwp.cost._model import AnalyticCostModel, passes_of
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import Layer, Member


class PassShares(NamedTuple):
    """What of a layer's computation is which pass; they add up to 1.

    Attributes:
      forward: the forward pass.
      cotangents: the backward pass that other layers wait for: cotangents of what the layer reads,
        and what `jax.checkpoint` evaluates again for them.
      parameters: the gradients of parameters.
    """

    forward: float
    cotangents: float
    parameters: float


def pass_shares(layer: Layer, devices: DeviceGraph) -> PassShares:
    """The shares of a layer's passes.

    Each operator does its work once forward, and backward once for each operand that has a
    cotangent (`passes_of`): a convolution's three passes are alike, and where its input is the
    batch there are two. Operators count by their analytic time, not split.
    """
    model = AnalyticCostModel(devices=devices)
    seconds = [model.whole_s(member) for member in layer.members]
    if not any(seconds):
        seconds = [1.0] * len(seconds)
    parameters = {use.value for use in layer.uses if use.argument and use.gradient}
    sums = [0.0, 0.0, 0.0]
    for member, whole_s in zip(layer.members, seconds, strict=True):
        count, passes = _parameter_passes(member, parameters), passes_of(member)
        for n, some in enumerate((1, passes - 1 - count, count)):
            sums[n] += whole_s * some / passes
    total_s = sum(sums) or 1.0
    return PassShares(*(part_s / total_s for part_s in sums))


def _parameter_passes(member: Member, parameters: set[int]) -> int:
    """The passes of an operator that make gradients of parameters, casts of which are added."""
    operands = member.equation.operands
    if all(operand in parameters for operand in operands):
        parameters.update(member.equation.results)
    wanted = [
        operand in parameters
        for operand, gradient in zip(operands, member.gradient, strict=True)
        if gradient
    ]
    backward = passes_of(member) - 1 - member.recomputed
    # One pass for all operands where they are fused: others wait for it.
    return sum(wanted) if backward == len(wanted) else backward * all(wanted)
