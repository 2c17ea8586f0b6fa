"""A plan as a table that fits the terminal: what is shown of it depends on the width."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxlwp.mesh import partition_spec
from jaxlwp.plan import OPTIMIZER
from jaxlwp.report._rows import LayerRow, layer_rows
from jaxlwp.report._tables import num_bytes, render, seconds
from jaxlwp.report._widths import (
    Cells,
    fitting,
    left_out_note,
    natural_width,
    table_of,
    terminal_width,
    wrapped,
)
from jaxlwp.space import Layout

if TYPE_CHECKING:
    from jaxlwp.plan import Plan

SHOWN = 300
"""Layers up to which a table has the memory: its prediction takes as long as tracing the step."""

_SPEC = "output\nPartitionSpec"
_LEFT_OUT = (_SPEC, "kind", "kept\n/device", "bytes\n/device", "sync\nms", "transfer\nms")
"""Columns in the order in which they are left out, the first three before a name is wrapped."""
_LEFT = ("layer", "config", "kind", _SPEC)
"""Columns of words; all others are numbers."""


def plan_text(plan: Plan, width: int | None = None) -> str:
    """A plan's title, table and notes as text.

    Args:
      plan: the plan.
      width: of the text, in columns; that of the terminal by default.
    """
    width = width or terminal_width()
    table, notes = plan_table(plan, width)
    return render(Group(Text(plan_title(plan)), table, Text("\n".join(notes))), width)


def plan_table(plan: Plan, width: int) -> tuple[Table, list[str]]:
    """A row per layer: config, PartitionSpec of its output, compute, transfer, sync, bytes.

    What depends on no argument is in one row more: the number of arrays, and their bytes.

    Transfer is what happens inside the layer (halo, partial sums) and on its incoming edges; bytes
    are those of its collectives, kept is what it leaves in memory for the backward pass. No cell
    is cut off: where the width does not allow for all columns, PartitionSpecs are shortened and
    then columns are left out, which the last of the notes names; names take several lines.

    Returns:
      The table, and the lines below it.
    """
    rows = layer_rows(plan, memory=shows_memory(plan))
    letters = dict(zip(plan.space.devices.axis_sizes, string.ascii_letters, strict=False))
    cells, notes = _cells(plan, rows, None), [plan_notes(plan)]
    if natural_width(cells) > width:
        cells = _cells(plan, rows, letters)
        shown = fitting(cells, width, _LEFT_OUT, before_wrapping=3)
        notes += left_out_note(cells, shown, width)
        if _SPEC in shown:
            legend = ", ".join(f"{letter} is {name}" for name, letter in letters.items())
            notes.append(f"PartitionSpecs: {legend}; - is not split")
        cells = wrapped(shown, width)
    return table_of(cells, _LEFT), notes


def _cells(plan: Plan, rows: Sequence[LayerRow], letters: Mapping[str, str] | None) -> Cells:
    """All that there is to show; mesh axes in PartitionSpecs as letters, if there are any."""
    sizes = plan.space.devices.axis_sizes
    cells = {
        "layer": [row.name for row in rows],
        "kind": [kind_text(row) for row in rows],
        "config": [row.config.describe(sizes) for row in rows],
        _SPEC: [_spec(row.output, letters) for row in rows],
        "compute\nms": [seconds(row.cost.compute_s) for row in rows],
        "transfer\nms": [seconds(row.cost.transfer_s) for row in rows],
        "sync\nms": [seconds(row.cost.sync_s) for row in rows],
        "bytes\n/device": [num_bytes(row.num_bytes) for row in rows],
        "kept\n/device": [num_bytes(row.kept_bytes or 0) for row in rows],
    }
    if not shows_memory(plan):
        del cells["kept\n/device"]
    if text := constants_text(plan):
        shown = {"layer": "(constants)", "kind": "constant", "config": text, _SPEC: "P()"}
        for name, column in cells.items():
            column.append(shown.get(name, "0 B" if "device" in name else "0"))
    return cells


def _spec(layout: Layout, letters: Mapping[str, str] | None) -> str:
    """The PartitionSpec of a layout, or one letter for each mesh axis: `P(ab, -, c)`."""
    if letters is None or not all(axis in letters for axes in layout for axis in axes):
        return str(partition_spec(layout)).replace("PartitionSpec", "P")
    entries = ["".join(letters[axis] for axis in axes) or "-" for axes in layout]
    while entries and entries[-1] == "-":
        entries.pop()
    return f"P({', '.join(entries)})"


def kind_text(row: LayerRow) -> str:
    """What a layer does, and whether it has a rule."""
    return row.kind if row.has_rule else f"{row.kind} (no rule)"


def constants_text(plan: Plan) -> str:
    """How many arrays depend on no argument, and their bytes; empty if there are none."""
    constants = plan.graph.constants
    size = sum(math.prod(value.shape) * value.itemsize for value in constants)
    arrays = "1 array" if len(constants) == 1 else f"{len(constants):,} arrays"
    return f"{arrays}, {num_bytes(size)}" if constants else ""


# --- words -------------------------------------------------------------------------------------


def plan_title(plan: Plan) -> str:
    """The strategy, the devices, the predicted seconds of a step, and what is proven of it."""
    space, proof = plan.space, plan_proof(plan)
    return (
        f"strategy {plan.strategy.name} on {space.devices.num_devices} x "
        f"{space.devices.device_kind} {space.devices.axis_sizes}: predicted "
        f"{seconds(plan.cost.total_s)} ms a step{', ' if proof else ''}{proof}"
    )


def plan_proof(plan: Plan) -> str:
    """What is proven of the strategy: "optimal", or how far from it; empty if it is given."""
    proof = ""
    if plan.result is not None:
        proof = "optimal" if plan.result.optimal else f"within {plan.result.gap:.1%}"
        if not plan.space.whole and plan.result.gap == 1:
            proof = "the best of the configs looked at"
    if plan.space.constraints is not None:
        proof = f"{proof} under the constraints given".strip()
    return proof


def plan_notes(plan: Plan) -> str:
    """The step by cause, where rates are from, memory, measurements, operators without a rule."""
    cost = plan.cost
    return (
        f"compute {seconds(cost.compute_s)} ms, transfer {seconds(cost.transfer_s)} ms, sync "
        f"{seconds(cost.sync_s)} ms, besides (update, new memory, input, dispatch) "
        f"{seconds(cost.overhead_s)} ms; rates: {plan.space.devices.source}"
        + _measured_note(plan)
        + _baseline_note(plan)
        + f"\n{_memory_note(plan)}"
        + _elsewhere_note(plan)
        + _checked_note(plan)
        + _replication_notes(plan)
    )


def shows_memory(plan: Plan) -> bool:
    """Whether the table has the memory: of few layers, or if it has been asked for already."""
    return len(plan.graph.layers) <= SHOWN or "memory" in vars(plan)


def _memory_note(plan: Plan) -> str:
    """What a step takes on each device, and of what."""
    if not shows_memory(plan):
        return f"memory of a device: not shown for more than {SHOWN} layers; ask plan.memory first"
    memory = plan.memory
    assumed = " (SGD with momentum is assumed)" if plan.optimizer is OPTIMIZER else ""
    parts = (
        ("parameters", memory.parameter_bytes),
        (f"optimizer{assumed}", memory.optimizer_bytes),
        ("batch", memory.batch_bytes),
        ("kept for the backward pass", memory.kept_bytes),
        ("temporary", memory.temporary_bytes),
    )
    listed = ", ".join(f"{name} {num_bytes(value)}" for name, value in parts if value)
    return f"memory of a device, if compiled for GPUs: {num_bytes(memory.peak_bytes)} ({listed})"


def _elsewhere_note(plan: Plan) -> str:
    """What it costs that parameters stay as another plan stores them."""
    if plan.elsewhere_s is None:
        return ""
    return (
        "\nparameters stay as the plan given stores them; stored as is best for this one, it is "
        f"predicted to take {seconds(plan.elsewhere_s)} ms"
    )


def _measured_note(plan: Plan) -> str:
    """What of the layers' times was measured."""
    space = plan.space
    if not space.measured:
        return "; layers: priced by these rates"
    return f"; layers measured: {space.num_measured:,} of {space.num_pairs:,} (layer, config)"


def _baseline_note(plan: Plan) -> str:
    """How data parallelism compares with what a search has found."""
    if plan.result is None:
        return ""
    try:
        data = plan.space.baseline("data")
    except ValueError:  # it does not apply, or constraints forbid it
        return ""
    if data.configs == plan.strategy.configs:
        by_time = math.isclose(plan.result.value, plan.cost.total_s)  # other objectives differ
        best = ": nothing else is predicted to be faster" if plan.result.optimal and by_time else ""
        return f"\nthis is data parallelism{best}"
    taken_s = plan.space.evaluate(data).total_s
    if not math.isfinite(taken_s):
        return ""
    ratio = taken_s / plan.cost.total_s
    return (
        f"\ndata parallelism is predicted to take {seconds(taken_s)} ms, {ratio:.2f} times as long"
    )


def _checked_note(plan: Plan) -> str:
    """What a check of whole steps gave."""
    if not plan.checked:
        return ""
    steps = ", ".join(
        f"{name} {seconds(s)} ms" if math.isfinite(s) else f"{name} needs more memory"
        for name, s in plan.checked.items()
    )
    return f"\n{plan.checked_by} steps: {steps}; kept: {plan.strategy.name}"


def _replication_notes(plan: Plan) -> str:
    """A line for each operator without a rule: what it costs to run it whole on every device."""
    choices, tables = plan.space.choices(plan.strategy), plan.space.tables
    devices = plan.space.devices.num_devices
    lines = []
    for layer in plan.graph.unknown():
        compute_s = tables.compute_s[layer.index][choices[layer.index]]
        moved_s = sum(
            table_s[choices[source], choices[target]]
            for (source, target), table_s in zip(tables.edges, tables.transfer_s, strict=True)
            if layer.index in (source, target)
        )
        lines.append(
            f"\nno rule for {layer.kind} ({layer.name}): it runs whole on each of {devices} "
            f"devices, {seconds(compute_s)} ms of compute in place of "
            f"{seconds(compute_s / devices)} ms if it were split, and {seconds(moved_s)} ms to "
            "bring its tensors together and apart"
        )
    return "".join(lines)
