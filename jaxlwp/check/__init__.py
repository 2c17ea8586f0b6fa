"""What runs, beside what was priced.

Read `_verify` first, then `_hlo` (collectives of a compiled program, from its text, which `_module`
reads), `_target` (compiling for GPUs that are not there), `_forecast` (what such a program takes:
`_kernels` with `_operations` and `_traffic`, `_schedule`, `_timeline`, `_trace`) and `_compare`
(measuring strategies side by side).
"""

from jaxlwp.check._compare import (
    ROUNDS,
    Comparison,
    Progress,
    StrategyResult,
    batch_size,
    compare,
    fastest,
    is_simulated,
)
from jaxlwp.check._forecast import Forecast, forecast
from jaxlwp.check._hlo import CompiledCollective, compiled_collectives
from jaxlwp.check._target import TargetStep, compile_for, target_mesh
from jaxlwp.check._timeline import Event, KindTotal
from jaxlwp.check._verify import LayerCheck, Traffic, Verification, verify

__all__ = [
    "Comparison",
    "CompiledCollective",
    "Event",
    "Forecast",
    "KindTotal",
    "LayerCheck",
    "Progress",
    "ROUNDS",
    "StrategyResult",
    "TargetStep",
    "Traffic",
    "Verification",
    "batch_size",
    "compare",
    "compile_for",
    "compiled_collectives",
    "fastest",
    "forecast",
    "is_simulated",
    "target_mesh",
    "verify",
]
