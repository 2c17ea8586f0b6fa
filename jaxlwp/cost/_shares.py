"""What of a layer's time is the forward pass's: prices and measurements give one time for both."""

from __future__ import annotations

from jaxlwp.cost._model import AnalyticCostModel, passes_of
from jaxlwp.devices import DeviceGraph
from jaxlwp.graph import Layer


def forward_share(layer: Layer, devices: DeviceGraph) -> float:
    """The forward pass's share of a layer's computation, from 0 to 1; 1 if it has no gradient.

    Each operator does its work once forward, and backward once for each operand that has a
    cotangent (`passes_of`): a convolution's forward pass is one of three, or of two where its input
    is the batch. Operators count by their analytic time, not split.
    """
    model = AnalyticCostModel(devices=devices)
    whole_s = [model.whole_s(member) for member in layer.members]
    forward_s = [
        seconds / passes_of(member) for seconds, member in zip(whole_s, layer.members, strict=True)
    ]
    if not sum(whole_s):
        return 1 / max(map(passes_of, layer.members), default=1)
    return sum(forward_s) / sum(whole_s)
