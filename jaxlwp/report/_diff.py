"""Two strategies beside each other, as a table that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxlwp.report._tables import num_bytes, render, seconds
from jaxlwp.report._widths import Cells, fitting, table_of, terminal_width, wrapped

if TYPE_CHECKING:
    from jaxlwp.optimize import StrategyDiff

_ABSENT = "(no such layer)"


def diff_text(diff: StrategyDiff, width: int | None = None) -> str:
    """The same as text.

    Args:
      diff: the two strategies.
      width: of the text, in columns; that of the terminal by default.
    """
    width = width or terminal_width()
    count = len(dict.fromkeys((*diff.strategies[0].configs, *diff.strategies[1].configs)))
    title = f"a is {diff.names[0]}, b is {diff.names[1]}: "
    title += f"{len(diff.layers)} of {count} layers differ" if diff.layers else "the same configs"
    parts: list[Any] = [Text(title)]
    if diff.layers:
        cells: Cells = {
            "layer": list(diff.layers),
            "a": [_config_text(diff, 0, layer) for layer in diff.layers],
            "b": [_config_text(diff, 1, layer) for layer in diff.layers],
        }
        shown = fitting(cells, width, (), configs=("a", "b"))
        parts.append(table_of(wrapped(shown, width, ("a", "b")), ("layer", "a", "b")))
    parts.append(_costs(diff))
    parts += [Text(line) for line in diff.differences]
    return render(Group(*parts), width)


def _config_text(diff: StrategyDiff, side: int, layer: str) -> str:
    config = diff.config(side, layer)
    return _ABSENT if config is None else config.describe(diff.strategies[side].axis_sizes)


def _costs(diff: StrategyDiff) -> Table:
    """What is predicted of each, by cause; "not known" where a file does not say."""
    records = [strategy.record for strategy in diff.strategies]
    causes = ("compute_s", "transfer_s", "sync_s", "overhead_s")
    rows = {"step ms": [record.step_s for record in records]} | {
        f"{cause.removesuffix('_s').replace('overhead', 'besides')} ms": [
            record.predicted_s.get(cause) for record in records
        ]
        for cause in causes
    }
    cells: Cells = {"predicted": [], "a": [], "b": [], "b - a": []}
    for name, (first, second) in rows.items():
        known = first is not None and second is not None
        more = 1e3 * (second - first) if first is not None and second is not None else 0.0
        texts = ["not known" if s is None else seconds(s) for s in (first, second)]
        _append(cells, name, *texts, f"{more:+.3g}" if known else "")
    first_b, second_b = (record.memory_bytes for record in records)
    texts = ["not known" if size is None else num_bytes(size) for size in (first_b, second_b)]
    _append(cells, "memory", *texts, "")
    return table_of(cells, ("predicted",))


def _append(cells: Cells, *texts: str) -> None:
    for column, text in zip(cells.values(), texts, strict=True):
        column.append(text)
