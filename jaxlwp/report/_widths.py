"""Tables that fit the terminal: what is left out, and what takes several lines.

The column "layer" has names, which are broken at slashes and dots. Columns of configs are broken
between splits. All others are never broken.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

ELSEWHERE = 120
"""Columns where there is no terminal: files, pipes, notebooks."""

Cells = dict[str, list[str]]
"""Name of a column -> its cells."""

_NARROWEST = 16
"""Columns of the terminal that a layer's name has at least; others are left out before."""


def terminal_width() -> int:
    """Columns of the terminal that is written to, or `ELSEWHERE`."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else ELSEWHERE


def table_of(cells: Cells, words: Sequence[str]) -> Table:
    """A table of cells; columns that are no words are numbers."""
    table = Table()
    for name in cells:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def natural_width(cells: Cells) -> int:
    """Columns of the terminal that a table takes if no cell is wrapped."""
    return 3 * len(cells) + 1 + sum(map(_widest, cells, cells.values()))


def fitting(
    cells: Cells,
    width: int,
    left_out: Sequence[str],
    *,
    before_wrapping: int = 0,
    configs: Sequence[str] = ("config",),
) -> Cells:
    """The columns that there is room for.

    Args:
      cells: all columns.
      width: of the terminal.
      left_out: columns in the order in which they are left out, only if names would have too little
        room else.
      before_wrapping: of these, how many are left out before anything is wrapped.
      configs: columns of configs.
    """
    kept = dict(cells)
    for position, name in enumerate(left_out):
        room = width - _fixed(kept, configs) - sum(_least(kept, c) for c in configs)
        wraps = room >= min(_widest("layer", kept["layer"]), _NARROWEST)
        if (position >= before_wrapping and wraps) or natural_width(kept) <= width:
            break
        kept.pop(name, None)
    return kept


def left_out_note(cells: Cells, shown: Cells, width: int) -> list[str]:
    """A line that names the columns that are not shown, if there are any."""
    names = [n.replace("\n/", "/").replace("\n", " ") for n in cells if n not in shown]
    return [f"left out at {width} columns: {', '.join(names)}"] if names else []


def wrapped(cells: Cells, width: int, configs: Sequence[str] = ("config",)) -> Cells:
    """Names in lines that fit what the other columns leave them."""
    if natural_width(cells) <= width:
        return cells
    room = width - _fixed(cells, configs)
    share = room // (2 + len(configs))
    taken = sum(min(_widest(c, cells[c]), max(_least(cells, c), share)) for c in configs)
    layer = max(room - taken, 1)
    return {**cells, "layer": ["\n".join(_lines(name, layer)) for name in cells["layer"]]}


def _fixed(cells: Cells, configs: Sequence[str]) -> int:
    """Columns of the terminal that all but names and configs take, borders included."""
    others = {name: cells[name] for name in cells if name not in ("layer", *configs)}
    return natural_width(others) + 3 * (1 + len(configs))


def _widest(name: str, column: Sequence[str]) -> int:
    return max(cell_len(line) for text in (name, *column) for line in text.split("\n"))


def _least(cells: Cells, name: str) -> int:
    """Columns of the longest split: a config is wrapped between its splits."""
    return max(cell_len(word) for text in (name, *cells[name]) for word in text.split())


def _lines(name: str, width: int) -> list[str]:
    """A layer's name in lines, broken behind a slash or a dot where that is possible."""
    lines, rest = [], name
    while cell_len(rest) > width:
        head = rest[: max(1, len(set_cell_size(rest, width).rstrip()))]
        cut = max(head.rfind("/"), head.rfind(".")) + 1 or len(head)
        lines.append(rest[:cut])
        rest = rest[cut:]
    return [*lines, rest]
