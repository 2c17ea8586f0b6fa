"""What all figures share: how they are made, shown by notebooks, and told apart.

The only file that imports matplotlib when it is imported; `_plot` and `_plot_plan` do so when they
draw. Figures are made without pyplot: none stays open, and no setting of the user's is changed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Colours of Okabe and Ito, which the colour-blind can tell apart; markers for greyscale print.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
ALL = (SKY, RED, GREEN, ORANGE, YELLOW, PURPLE, BLUE)
DARK = (BLUE, GREEN, RED)
"""On these, text is white."""

FOUND = (BLUE, "o")
_STYLES = {
    "found": FOUND,
    "search": FOUND,
    "data": (ORANGE, "s"),
    "model": (RED, "^"),
    "owt": (GREEN, "D"),
    "spatial": (PURPLE, "v"),
}
"""Name of a strategy -> its colour and marker, the same in all figures."""
_OTHER = (SKY, "P")


def style(strategy: str) -> tuple[str, str]:
    """Colour and marker of a strategy."""
    return _STYLES.get(strategy, _OTHER)


class Picture(Figure):
    """A figure that a notebook shows where it is a cell's last value, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def drawing(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The figure of the axes given, or a new one of a size in inches with axes of its own."""
    if ax is not None:
        return ax.figure.figure, ax
    figure = Picture(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles of a figure and its axes; a frame on two sides; a faint grid."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


class _InFull(LogFormatter):
    """Numbers in full (40,000 and not 4e+04) at the places that matplotlib would label."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.10g}" if super().__call__(x, pos) else ""


def plain_log(axis: Axis) -> None:
    """Numbers of a logarithmic axis in full, those between powers too where there is room."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(_InFull(minor_thresholds=(1.2, 0.4)))


def ticks_at(axes: Axes, values: Sequence[float]) -> None:
    """The values themselves as ticks of a logarithmic x axis."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
