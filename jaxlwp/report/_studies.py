"""Tables of studies: scaling over systems, and thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from jaxlwp.report._tables import num_bytes, render, seconds

if TYPE_CHECKING:
    from jaxlwp.simulate import Scaling, Threshold


def scaling_text(scaling: Scaling) -> str:
    """A row for each system and strategy."""
    kind = "weak" if scaling.weak else "strong"
    table = Table(
        title=f"{scaling.model} on {scaling.gpu}, {kind} scaling, predicted",
        caption=f"efficiency: of as many single GPUs, each with a step of "
        f"{seconds(scaling.one_s)} ms; *: more than the {num_bytes(scaling.gpu_bytes)} of a GPU "
        "allow, by the margin of a search",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("hosts", "GPUs", "batch"):
        table.add_column(column, justify="right")
    table.add_column("strategy")
    for column in ("step ms", "examples/s", "efficiency", "sent", "memory"):
        table.add_column(column, justify="right")
    for point in scaling.points:
        place = [f"{point.hosts}", f"{point.devices}", f"{point.batch}"]
        for outcome in point.outcomes:
            table.add_row(
                *place,
                outcome.strategy,
                seconds(outcome.step_s),
                _rate(outcome.examples_per_s),
                f"{outcome.efficiency:.0%}",
                num_bytes(outcome.sent_bytes),
                num_bytes(outcome.memory_bytes) + ("" if outcome.fits else " *"),
            )
            place = [""] * len(place)
        table.add_section()
    return render(table)


def _rate(value: float) -> str:
    """Four digits that matter, in full from a thousand on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def threshold_text(threshold: Threshold) -> str:
    """A row for each plan, and the threshold in words."""
    links = threshold.what == "links"
    table = Table(
        title="links: plans at other rates" if links else "batch: plans of other sizes",
        caption=_in_words(threshold),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("GB/s of a GPU" if links else "examples of a GPU", justify="right")
    for column in ("found ms", f"{threshold.against} ms", "gain"):
        table.add_column(column, justify="right")
    for sample in threshold.samples:
        table.add_row(
            f"{sample.value / 1e9:.3g}" if links else f"{sample.value:g}",
            seconds(sample.found_s),
            seconds(sample.other_s),
            f"{sample.gain:.1%}",
        )
    return render(table)


def _in_words(threshold: Threshold) -> str:
    value, last = threshold.value, threshold.samples[-1].value
    close = f"{threshold.against} is within {threshold.within:.0%} of the best"
    if threshold.what == "batch":
        return (
            f"{close} from {value:g} examples of a GPU on"
            if value is not None
            else f"{close} at none of these; {last:g} is the largest"
        )
    if value is None or threshold.now is None:
        return f"{close} at none of these rates"
    times = value / threshold.now
    return f"{close} from {value / 1e9:.3g} GB/s of a GPU on, {times:.2g} times what there is"
