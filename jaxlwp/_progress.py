"""Progress of what takes long: told to who asks, and shown in notebooks where nobody asks."""

from __future__ import annotations

import contextlib
import functools
import html
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

Function = TypeVar("Function", bound=Callable[..., Any])

PATIENCE_S = 1.0
"""What ends before is not shown."""


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


@contextlib.contextmanager
def progress_of(given: Progress | None) -> Iterator[Progress]:
    """Whom to report to.

    Args:
      given: who asked; None for a bar in a Jupyter notebook, that goes away at the end, and for
        nobody elsewhere.
    """
    if given is not None or not in_notebook():
        yield given or silent
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.close()


def reporting(function: Function) -> Function:
    """The function, its `on_progress` as of `progress_of` where none is given."""

    @functools.wraps(function)
    def reports(*args: Any, on_progress: Progress | None = None, **keywords: Any) -> Any:
        with progress_of(on_progress) as progress:
            return function(*args, on_progress=progress, **keywords)

    return reports  # type: ignore[return-value]


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel. IPython is not imported: a kernel has done that."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class _Bar:
    """A line in the cell's output: what is done, how far it is, and for how long it has run."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._told: tuple[str, int, int] | None = None
        self._handle: Any = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._show_until_closed, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            if self._told is None:
                self._watch.start()
            self._told = what, done, total

    def _show_until_closed(self) -> None:
        while not self._closed.wait(PATIENCE_S):
            with self._lock:
                if not self._closed.is_set():
                    self._show(self._text())

    def _text(self) -> str:
        assert self._told is not None
        what, done, total = self._told
        count = f", {done} of {total}" if total > 1 else ""
        share = f'value="{done}" max="{total}"' if total > 1 else ""
        passed = f"{time.monotonic() - self._begin_s:.0f} s"
        return f"<progress {share}></progress> {html.escape(what)}{count}, {passed}"

    def _show(self, text: str) -> None:
        display: Any = importlib.import_module("IPython.display")
        if self._handle is None:
            self._handle = display.display(display.HTML(text), display_id=True)
        else:
            self._handle.update(display.HTML(text))

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._handle is not None:
                self._show("")
