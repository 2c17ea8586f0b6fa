"""Progress: told to who asks; else shown if it takes long, in notebooks and in scripts."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax.numpy as jnp
import nbformat
import pytest
from nbclient import NotebookClient

import jaxlwp
from jaxlwp import _progress
from jaxlwp._progress import progress_of, reporting

RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)

CELL = """
import time
from jaxlwp._progress import in_notebook, progress_of
with progress_of(None) as progress:
    progress("measuring <layers>", 2, 7)
    {work}
print(in_notebook())
"""


def outputs_of(code: str) -> list[Any]:
    """What a cell shows, while it runs and at the end, in a Jupyter kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    told: list[Any] = []
    client = NotebookClient(notebook, kernel_name="python3", timeout=120)
    process = client.process_message

    def noting(message: Any, *rest: Any) -> Any:
        if message["msg_type"] in ("display_data", "update_display_data"):
            told.append(message["content"]["data"].get("text/html"))
        return process(message, *rest)

    client.process_message = noting  # type: ignore[method-assign]
    client.execute()
    return [*told, notebook.cells[0].outputs]


def test_long_work_is_shown_in_a_notebook_and_taken_away() -> None:
    *told, outputs = outputs_of(CELL.format(work="time.sleep(2.5)"))
    assert told[0].startswith('<progress value="2" max="7"></progress> measuring &lt;layers&gt;')
    assert ", 2 of 7, " in told[0] and told[-1] == ""
    assert outputs[-1]["text"] == "True\n"


def test_short_work_is_not_shown() -> None:
    (outputs,) = outputs_of(CELL.format(work=""))
    assert [output["output_type"] for output in outputs] == ["stream"]


def test_a_script_is_told_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _progress.in_notebook()
    with progress_of(None) as progress:  # this ends at once
        progress("tracing", 0, 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(_progress._Lines, "every_s", 0.01)
    with progress_of(None) as progress:
        progress("measuring layers", 2, 7)
        while not (told := capsys.readouterr()).err:
            time.sleep(0.01)
    first = told.err.splitlines()[0]
    assert first.startswith("jaxlwp: measuring layers, 2 of 7, ") and not told.out
    threads = [thread for thread in threading.enumerate() if "_show_until" in thread.name]
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)


def test_who_asks_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "in_notebook", lambda: True)
    told: list[tuple[str, int, int]] = []
    with progress_of(lambda *step: told.append(step)) as progress:
        progress("tracing", 0, 1)

    @reporting
    def work(number: int, *, on_progress: Any = None) -> int:
        on_progress("working", number, 3)
        return number

    assert work(2, on_progress=lambda *step: told.append(step)) == 2
    assert told == [("tracing", 0, 1), ("working", 2, 3)]


def test_a_plan_tells_its_steps() -> None:
    told: list[tuple[str, int, int]] = []
    jaxlwp.parallelize(
        lambda w, x: jnp.sum(x @ w),
        *(jnp.ones((8, 8)), jnp.ones((8, 8))),
        devices=4,
        rates=RATES,
        on_progress=lambda *step: told.append(step),
    )
    steps = [what for what, _, _ in told]
    assert list(dict.fromkeys(steps)) == ["tracing", "pricing and searching"]
    assert all((what, 1, 1) in told for what in steps)
