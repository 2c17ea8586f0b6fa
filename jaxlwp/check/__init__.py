"""What runs, beside what was priced.

Read `_verify` first, then `_hlo` (collectives of a compiled program, from its text, which `_module`
reads), `_target` (compiling for GPUs that are not there), `_forecast` (what such a program takes:
`_kernels` with `_operations` and `_traffic`, `_schedule`, `_timeline`, `_trace`), `_compiled`
(strategies side by side by such forecasts) and `_compare` (the same, measured by `_steps`).
"""

from jaxlwp.check._compare import Comparison, StrategyResult, compare, fastest
from jaxlwp.check._compiled import (
    CompiledComparison,
    CompiledStrategy,
    compare_compiled,
    fastest_compiled,
)
from jaxlwp.check._forecast import Forecast, forecast
from jaxlwp.check._hlo import CompiledCollective, compiled_collectives
from jaxlwp.check._steps import ROUNDS, batch_size, is_simulated
from jaxlwp.check._target import Target, TargetStep, compile_for, target_mesh
from jaxlwp.check._timeline import Event, KindTotal
from jaxlwp.check._trace import Span, spans_trace, write_trace
from jaxlwp.check._verify import LayerCheck, Traffic, Verification, verify

__all__ = [
    "Comparison",
    "CompiledCollective",
    "CompiledComparison",
    "CompiledStrategy",
    "Event",
    "Forecast",
    "KindTotal",
    "LayerCheck",
    "ROUNDS",
    "Span",
    "StrategyResult",
    "Target",
    "TargetStep",
    "Traffic",
    "Verification",
    "batch_size",
    "compare",
    "compare_compiled",
    "compile_for",
    "compiled_collectives",
    "fastest",
    "fastest_compiled",
    "forecast",
    "is_simulated",
    "spans_trace",
    "target_mesh",
    "verify",
    "write_trace",
]
