"""Notebooks as they look: executed, turned into a page, and photographed.

    python -m tests.rendered FOLDER notebooks/quickstart.ipynb [...]

For each notebook FOLDER gets a page (NAME.html) and, where there is a Chromium, screenshots
(NAME-1.png, NAME-2.png, ...), each as high as a tall window. The notebook itself is not changed.
"""

from __future__ import annotations

import html
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tests.chromium import browser, running

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 1100, 1600
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1000px; margin: 20px auto; color: #222 }
pre { font: 13px/1.35 monospace; overflow-x: auto; margin: 0 }
.code { background: #f5f5f5; border: 1px solid #ddd; padding: 8px; margin: 10px 0 4px }
.output { padding: 4px 8px; overflow-x: auto } pre.output { white-space: pre-wrap }
.error { background: #fdd } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: 2px 8px }
"""


def page(notebook: Any) -> str:
    """An executed notebook as HTML."""
    cells = "".join(map(_cell, notebook.cells))
    colours = HtmlFormatter().get_style_defs(".code")
    return f"<!DOCTYPE html><meta charset=utf-8><style>{colours}{STYLE}</style><body>{cells}"


def _cell(cell: Any) -> str:
    if cell.cell_type == "markdown":
        return MarkdownIt("commonmark").enable("table").render(cell.source)
    code = highlight(cell.source, PythonLexer(), HtmlFormatter(nowrap=True))
    return f"<div class=code><pre>{code}</pre></div>{''.join(map(_output, cell.outputs))}"


def _output(output: Any) -> str:
    if output.output_type == "error":
        return f"<pre class='output error'>{html.escape(output.ename + output.evalue)}</pre>"
    if output.output_type == "stream":
        kind = "output error" if output.name == "stderr" else "output"
        return f"<pre class='{kind}'>{html.escape(output.text)}</pre>"
    data = output.data
    if "text/html" in data:
        return f"<div class=output>{data['text/html']}</div>"
    if "image/png" in data:
        return f"<div class=output><img src='data:image/png;base64,{data['image/png']}'></div>"
    return f"<pre class=output>{html.escape(data.get('text/plain', ''))}</pre>"


def photograph(path: Path) -> list[Path]:
    """Screenshots of a page, from top to bottom."""
    found = []
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as window:
        window.open(path, width=WIDTH, height=HEIGHT)
        height = window.value("document.documentElement.scrollHeight")
        for number, top in enumerate(range(0, height, HEIGHT), start=1):
            window.value(f"window.scrollTo(0, {top})")
            found.append(path.with_name(f"{path.stem}-{number}.png"))
            window.screenshot(found[-1])
        assert not window.problems, window.problems
    return found


def main(folder: str, *notebooks: str) -> None:
    os.environ["PYTHONPATH"] = str(ROOT)  # of the kernel
    for given in notebooks:
        path, start = Path(given), time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=3600, allow_errors=True, resources=resources).execute()
        taken_s = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of all kernels up to now
        target = Path(folder) / f"{path.stem}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(notebook))
        photos = photograph(target) if browser() else []
        print(
            f"{path}: {taken_s:.0f} s, {target}, {len(photos)} screenshots; "
            f"processor seconds so far {used.ru_utime + used.ru_stime:.0f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
