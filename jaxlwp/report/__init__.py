"""Text and pictures of what all other folders return.

`_rows` has what is known of each layer of a plan; `_plan_table` makes a table of it that fits the
terminal, `_plan_html` one for notebooks, `_page` a page (`page.html`) with the network as a graph
and a timeline (`_step_data`), `_explorer` the graph as Model Explorer opens it,
`_plan_json` JSON for scripts. `_problem_text` shows problems and what is found in them, `_diff`
sets two strategies beside each other; all of these fit by `_widths`. `_tables` has all other
tables, `_studies` those of systems. `_plot` and `_plot_plan` are the matplotlib figures (`_figure`
has their colours).

The reprs of plans and results, and `Plan.report`, import this folder when they are called, and
nothing else does but the command line.
"""

from jaxlwp.report._diff import diff_text
from jaxlwp.report._explorer import model_explorer_data, save_model_explorer
from jaxlwp.report._page import page_data, page_html, save_page
from jaxlwp.report._plan_html import plan_html
from jaxlwp.report._plan_json import plan_json
from jaxlwp.report._plan_table import plan_text
from jaxlwp.report._plot import plot_comparison, plot_pareto, plot_scaling, plot_threshold
from jaxlwp.report._plot_plan import plot_plan
from jaxlwp.report._problem_text import problem_text, result_text
from jaxlwp.report._studies import scaling_text, threshold_text
from jaxlwp.report._tables import (
    alternatives_table,
    comparison_text,
    compiled_text,
    explanation_table,
    forecast_text,
    num_bytes,
    pareto_table,
    render,
    simulation_text,
    verification_text,
)

__all__ = [
    "alternatives_table",
    "comparison_text",
    "compiled_text",
    "diff_text",
    "explanation_table",
    "forecast_text",
    "model_explorer_data",
    "num_bytes",
    "page_data",
    "page_html",
    "pareto_table",
    "plan_html",
    "plan_json",
    "plan_text",
    "problem_text",
    "plot_comparison",
    "plot_pareto",
    "plot_plan",
    "plot_scaling",
    "plot_threshold",
    "render",
    "result_text",
    "save_model_explorer",
    "save_page",
    "scaling_text",
    "threshold_text",
    "simulation_text",
    "verification_text",
]
