"""Text and pictures of what all other folders return.

`_tables` has the tables, `_studies` those of systems, `_plot` the pictures. The reprs of plans and
results import this folder when they are called, and nothing else does but the command line.
"""

from jaxlwp.report._studies import scaling_text, threshold_text
from jaxlwp.report._tables import (
    alternatives_table,
    comparison_text,
    compiled_text,
    explanation_table,
    forecast_text,
    pareto_table,
    plan_text,
    render,
    simulation_text,
    verification_text,
)

__all__ = [
    "alternatives_table",
    "comparison_text",
    "compiled_text",
    "explanation_table",
    "forecast_text",
    "pareto_table",
    "plan_text",
    "render",
    "scaling_text",
    "threshold_text",
    "simulation_text",
    "verification_text",
]
