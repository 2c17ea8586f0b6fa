"""Notebooks are stored without results, and use only what is public. `make notebook` runs them."""

from __future__ import annotations

import ast
import base64
import importlib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import jaxlwp
from tests.rendered import page

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path: Path) -> list[ast.Module]:
    """The code of each cell."""
    notebook = nbformat.read(path, as_version=4)
    return [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebooks_are_these() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["big-volumes", "how-it-works", "paper", "plan-a-cluster", "quickstart"]
    page_of_all = (ROOT / "docs" / "plots.md").read_text()
    assert all(f"(../notebooks/{name}.ipynb)" in page_of_all for name in names)


@each
def test_nothing_that_a_run_leaves_is_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert cell.cell_type in ("code", "markdown") and not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert notebook.cells[0].source.startswith("# ")


@each
def test_only_public_names(path: Path) -> None:
    """No private module, no private attribute; what a folder exports, not all that is in it."""
    for node in (node for tree in sources(path) for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            dunder = node.attr.startswith("__") and node.attr.endswith("__")
            assert dunder or not node.attr.startswith("_"), node.attr
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            assert not any(part.startswith("_") for part in module.split(".")), module
            if module.startswith("jaxlwp.") and isinstance(node, ast.ImportFrom):
                face = importlib.import_module(module)
                assert {alias.name for alias in node.names} <= set(face.__all__), module


@each
def test_links_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in [part.split(")")[0] for part in text.split("](")[1:]]:
        assert (path.parent / target.split("#")[0]).exists(), target


def test_a_notebook_as_a_page() -> None:
    picture = base64.b64encode(b"\x89PNG").decode()
    outputs: list[Any] = [
        new_output("stream", name="stdout", text="a < b"),
        new_output("display_data", data={"image/png": picture, "text/plain": "<Figure>"}),
        new_output("execute_result", data={"text/html": "<b>plan</b>", "text/plain": "plan"}),
        new_output("error", ename="ValueError", evalue="<bad>"),
    ]
    cells = [new_markdown_cell("# Head"), new_code_cell("x = 1", outputs=outputs)]
    made = page(new_notebook(cells=cells))
    for part in ("<h1>Head</h1>", "a &lt; b", f"base64,{picture}", "<b>plan</b>", "&lt;bad&gt;"):
        assert part in made
    assert "<Figure>" not in made


def test_the_page_of_plots_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its code, with small results in place of the reader's."""
    import matplotlib.pyplot as plt

    from tests import test_plot

    code = [
        part.split("```")[0] for part in (ROOT / "docs/plots.md").read_text().split("```python")
    ]
    monkeypatch.chdir(tmp_path)
    names = {
        "jaxlwp": jaxlwp,
        "plan": test_plot._plan("search"),
        "comparison": test_plot.comparison(),
        "study": test_plot._scaling(),
        "links": test_plot.threshold("links", 1e9),
    }
    exec("\n".join(code[1:]), names)
    assert Path("links.pdf").read_bytes().startswith(b"%PDF")
    plt.close(names["both"])
