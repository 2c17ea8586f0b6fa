"""A plan in a notebook: a table that reads well in light and dark themes, without a script."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from jaxlwp.report._plan_table import (
    constants_text,
    kind_text,
    plan_notes,
    plan_title,
    shows_memory,
)
from jaxlwp.report._rows import LayerRow, layer_rows
from jaxlwp.report._tables import num_bytes, seconds

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

# Okabe and Ito's colours. Only edges are coloured: text is the theme's, on the theme's paper.
_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
_TABLE = "border-collapse:collapse;color:inherit;font:inherit"
_RULE = "border-bottom:1px solid rgba(128,128,128,.3)"
_WORD = f"text-align:left;padding:1px 10px;{_RULE}"
_NUMBER = f"text-align:right;padding:1px 10px;white-space:nowrap;{_RULE}"
_HEADS = ("layer", "kind", "config", "compute ms", "transfer ms", "sync ms", "bytes/device")


def plan_html(plan: Plan) -> str:
    """A row per layer: config, seconds by cause, bytes; the totals around it."""
    memory = shows_memory(plan)
    rows = layer_rows(plan, memory=memory)
    sizes = plan.space.devices.axis_sizes
    texts = list(dict.fromkeys(row.config.describe(sizes) for row in rows))
    colours = {text: _COLOURS[n % len(_COLOURS)] for n, text in enumerate(texts)}
    heads = (*_HEADS, "kept/device") if memory else _HEADS
    cells = "".join(
        f'<th style="{_WORD if n < 3 else _NUMBER}">{head}</th>' for n, head in enumerate(heads)
    )
    body = "".join(_row(row, row.config.describe(sizes), colours) for row in rows)
    notes = plan_notes(plan)
    if text := constants_text(plan):
        notes = f"constants, whole on every device: {text}\n{notes}"
    return (
        f"<div><p><b>{escape(plan_title(plan))}</b></p>"
        f'<div style="max-height:32em;overflow:auto"><table style="{_TABLE}">'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p style="opacity:.8">{"<br>".join(escape(notes).splitlines())}</p></div>'
    )


def _row(row: LayerRow, config: str, colours: dict[str, str]) -> str:
    numbers = [
        seconds(row.cost.compute_s),
        seconds(row.cost.transfer_s),
        seconds(row.cost.sync_s),
        num_bytes(row.num_bytes),
    ]
    if row.kept_bytes is not None:
        numbers.append(num_bytes(row.kept_bytes))
    edge = f"{_WORD};border-left:5px solid {colours[config]}"
    words = ((row.name, _WORD), (kind_text(row), _WORD), (config, edge))
    cells = [f'<td style="{style}">{escape(text)}</td>' for text, style in words]
    cells += [f'<td style="{_NUMBER}">{number}</td>' for number in numbers]
    return f"<tr>{''.join(cells)}</tr>"
