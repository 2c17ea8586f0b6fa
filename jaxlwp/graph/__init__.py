"""From a function to its graph of layers.

Read `_trace` first: it has the steps in order. `_graph` is the result, as data, and `_outline` what
is left of it without the program; `_constants` are values that depend on no argument; `_samples`
says which dimensions are samples; `_group` joins equations to layers and names their dimensions.
"""

from jaxlwp.graph._graph import FUSED, ComputationGraph, Edge, Layer, Member, Use
from jaxlwp.graph._group import pull, whole
from jaxlwp.graph._outline import LayerOutline, Outline, Outlined, Parameter
from jaxlwp.graph._trace import is_loss, trace

__all__ = [
    "ComputationGraph",
    "Edge",
    "FUSED",
    "Layer",
    "LayerOutline",
    "Member",
    "Outline",
    "Outlined",
    "Parameter",
    "Use",
    "is_loss",
    "pull",
    "trace",
    "whole",
]
